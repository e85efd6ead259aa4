"""Small tokenizers of each kind, as tokenizer.json holds them."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lumina_fn.vocab import END_TEXT, NEWLINE_TEXT, SEP_TEXT, START_TEXT, size_text

_SPECIAL = ["<s>", "</s>", START_TEXT, END_TEXT, NEWLINE_TEXT, SEP_TEXT, *(size_text(n) for n in range(1, 5))]
IDS = {"start": 2, "end": 3, "newline": 4, "sep": 5, "size0": 5, "code0": 4000, "codes": 16}
WORDS: Sequence[str] = (
    "BPE", "WordPiece", "WordLevel", "Unigram", "ByteLevel", "Split", "Regex", "String", "Isolated", "Removed", "Contiguous", "Precompiled",
    "Sequence", "Replace", "Prepend", "Metaspace", "Digits", "TemplateProcessing", "BertProcessing", "BertNormalizer", "BertPreTokenizer", "NFKC", "(a+)+$", "(?<=a)",
    "([a-z ]*)*X", "\\", "", "vocab", "merges", "unk_token", "content", "id", "special", "normalizer", "pre_tokenizer", "</s>", "<s>",
)  # fmt: skip


def _spec(model: models.Model, **parts: object) -> dict:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(_SPECIAL)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return json.loads(tokenizer.to_str())


def specs() -> list[dict]:
    """Each has the special tokens at the ids of IDS."""
    vocab = {text: i for i, text in enumerate(_SPECIAL)}
    letters = {c: len(vocab) + i for i, c in enumerate(("[UNK]", *"abcdehrt", "▁", "Ġ", "he", "##e"))}
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w+"), "isolated")
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return [
        _spec(models.BPE(vocab | letters, [("h", "e")], unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel()),
        _spec(models.BPE(vocab | letters, [("h", "e")], byte_fallback=True), pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.Digits()])),
        _spec(models.WordLevel(vocab | letters, unk_token="[UNK]"), pre_tokenizer=pre_tokenizers.Whitespace(), post_processor=template),
        _spec(models.WordPiece(vocab | letters, unk_token="[UNK]"), normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer()),
        _spec(
            models.Unigram([(text, -float(i)) for text, i in (vocab | letters).items()], unk_id=len(vocab)),
            normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" +"), " ")]),
            pre_tokenizer=pre_tokenizers.Metaspace(),
        ),
    ]  # fmt: skip
