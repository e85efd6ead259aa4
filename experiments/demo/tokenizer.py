"""The small language model's own tokenizer: byte-level BPE trained on the pretraining captions, so it can spell a word it never saw."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.demo import shapes, splits
from lumina_fn.prompt import prompt_text
from lumina_fn.vocab import END_TEXT, NEWLINE_TEXT, SEP_TEXT, START_TEXT, Ids, size_text

LARGEST = 32  # patches of 32 pixels
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    START_TEXT,
    END_TEXT,
    NEWLINE_TEXT,
    SEP_TEXT,
    *(size_text(n) for n in range(1, LARGEST + 1)),
]


def build(codes: int) -> tuple[tokenizers.Tokenizer, Ids]:
    """The tokenizer, and the id space of a model with this many image codes; those follow the text's ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, show_progress=False, special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    captions = [shapes.caption(s) for s in splits.pretraining()]
    tokenizer.train_from_iterator(
        [prompt_text(c, shapes.SIZE, shapes.SIZE, size) for c in captions for size in (True, False)], trainer
    )
    at = SPECIAL.index
    ids = Ids(
        start=at(START_TEXT), end=at(END_TEXT), newline=at(NEWLINE_TEXT), sep=at(SEP_TEXT), size0=at(size_text(1)) - 1,
        code0=tokenizer.get_vocab_size(), codes=codes,
    )  # fmt: skip
    return tokenizer, ids


def save(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
