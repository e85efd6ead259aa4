"""Ids and labels against the reference's, the grammar of an image, and tokenizers that do not fit."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lumina_fn import data, images, prompt, vocab
from lumina_fn.errors import InputError
from lumina_fn.vocab import Ids
from tests.support import paths

GOLDENS = paths.GOLDENS / "tokens"
NAMES = ("bpe_nobos", "wordlevel_bos")
SMALL = Ids(start=5, end=6, newline=7, sep=8, size0=10, code0=100, codes=64)


def golden(name):
    about = json.loads((GOLDENS / f"tok_{name}.json").read_text())
    tensors = {key: t.tolist() for key, t in load_file(GOLDENS / f"tok_{name}.safetensors").items()}
    return about, tensors, prompt.load_tokenizer(GOLDENS / about["tokenizer_dir"])


def fake_codes(width, height, k=5):
    return (37 * torch.arange(height // 8)[:, None] + 101 * torch.arange(width // 8) + k) % 16384


@pytest.mark.parametrize("name", NAMES)
def test_training_items(name):
    about, tensors, tokenizer = golden(name)
    for case in about["t2i"]:
        codes = fake_codes(*case["cropped_wh"])
        ids, labels = data.training_item(tokenizer, case["prompt"], codes, with_size=case["with_size_text"])
        assert ids == tensors[case["key"] + ".input_ids"]
        assert labels == tensors[case["key"] + ".labels"]
        cut = images.cut(tuple(case["image_wh"]), case["target_size"])
        assert tuple(case["cropped_wh"]) == (cut.size if cut else tuple(case["image_wh"]))


@pytest.mark.parametrize("name", NAMES)
def test_prompts(name):
    about, tensors, tokenizer = golden(name)
    assert (tokenizer.bos, tokenizer.eos) == (about["bos_id"], about["eos_id"])
    caption = about["infer"][0]["question"].partition(":\n")[2]
    assert prompt.prompt_ids(tokenizer, caption, 768, 768) == tensors["infer0.input_ids"]
    for case in about["infer"]:
        ids = [tokenizer.bos, *tokenizer.encode(case["question"] + vocab.SEP_TEXT)]
        assert ids == tensors[case["key"] + ".input_ids"] == case["ids"]


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_says_width_first_and_the_picture_height_first(name):
    tokenizer = golden(name)[2]
    ids, _ = data.training_item(tokenizer, "a", fake_codes(64, 96), with_size=True)
    assert ids[: ids.index(tokenizer.ids.start)] == prompt.prompt_ids(tokenizer, "a", 64, 96)
    assert "64x96" in prompt.prompt_text("a", 64, 96, True)
    start = ids.index(tokenizer.ids.start)
    assert ids[start + 1 : start + 3] == [tokenizer.ids.size0 + 3, tokenizer.ids.size0 + 2]


@pytest.mark.parametrize("name", NAMES)
def test_caption_drop(name):
    about, tensors, tokenizer = golden(name)
    for case in about["cfg_dropout"]:
        item = tensors[case["source"] + ".input_ids"], tensors[case["source"] + ".labels"]
        expected = tensors[case["key"] + ".input_ids"], tensors[case["key"] + ".labels"]
        if case["random_value"] < 0.1:
            item = data.drop_caption(*item, tokenizer.ids.end)
        assert item == expected


@pytest.mark.parametrize("name", NAMES)
def test_decode_reads_the_codes_back(name):
    about, tensors, tokenizer = golden(name)
    h, w = about["decode"]["latent_h"], about["decode"]["latent_w"]
    codes = torch.tensor(tensors["decode.codes"]).reshape(h, w).tolist()
    tokens = tensors["decode.image_tokens"]
    whole = vocab.image_tokens(codes, tokenizer.ids)
    assert tokens == whole or tokens == whole[1:-1] or tokens == whole[3:-1] or tokens == whole[:-1]
    assert vocab.image_codes(whole, tokenizer.ids) == codes


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 63))
def test_every_token_of_an_image_is_allowed_and_only_it(rows, columns, code):
    height, width = 4 * rows, 4 * columns
    codes = [[(code + i * j) % 64 for j in range(width)] for i in range(height)]
    tokens = vocab.image_tokens(codes, SMALL)
    assert len(tokens) == vocab.image_length(height, width)
    for n, token in enumerate(tokens[1:]):
        may = vocab.allowed(n, height, width, SMALL)
        assert token in may
        assert len(may) == (64 if SMALL.code0 <= token else 1)
    assert vocab.image_codes(tokens, SMALL) == codes


@pytest.mark.parametrize(("place", "token"), [(0, 6), (1, 12), (3, 7), (7, 100), (3, 164), (-1, 7)])
def test_a_malformed_image_is_refused(place, token):
    tokens = vocab.image_tokens([[0] * 4] * 4, SMALL)
    tokens[place] = token
    with pytest.raises(ValueError, match=r"token|image"):
        vocab.image_codes(tokens, SMALL)


def test_codes_and_sizes_without_ids_are_refused():
    tokenizer = golden("bpe_nobos")[2]
    with pytest.raises(InputError, match="16384"):
        data.training_item(tokenizer, "a", torch.full((4, 4), 16384), with_size=True)
    with pytest.raises(InputError, match="multiple of 32"):
        data.training_item(tokenizer, "a", torch.zeros(5, 4).long(), with_size=True)
    with pytest.raises(InputError, match=r"reserved08865.*2048"):
        prompt.check_size(tokenizer, 65 * 32, 64)


@pytest.mark.parametrize(
    "caption",
    [
        "a <eoss> cat",
        "<reserved08706>",
        "<|image|>",
        "x<reserved09999>",
        "<|im_end|>",
        "<MOVQGAN0>",
        "\ud83d",
        "<racm3:break>",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_captions_with_control_tokens_are_found(name, caption):
    assert prompt.caption_problem(golden(name)[2], caption)


@pytest.mark.parametrize("caption", ["a cat", "an <angle> & [UNK] \x1b[31m", "", "猫 🙂"])
@pytest.mark.parametrize("name", NAMES)
def test_other_captions_pass(name, caption):
    assert prompt.caption_problem(golden(name)[2], caption) is None


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDENS / "toy_tokenizer_bpe", tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


def rename(folder, text, new=None, id=None):
    def change(spec):
        token = next(t for t in spec["added_tokens"] if t["content"] == text)
        token["content"] = new or text
        token["id"] = token["id"] if id is None else id
        del spec["model"]["vocab"][text]
        spec["model"]["vocab"][token["content"]] = token["id"]

    edit(folder / "tokenizer.json", change)


@pytest.mark.parametrize("text", ["<racm3:break>", "<eoss>", "<reserved08799>", "<reserved08706>"])
def test_a_missing_special_token_is_named(folder, text):
    rename(folder, text, new="<gone>")
    with pytest.raises(InputError) as caught:
        prompt.load_tokenizer(folder)
    assert text in str(caught.value)
    assert "missing" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "id", "wanted"), [("<eoss>", 160_001, 151_666), ("<reserved08805>", 160_001, 151_676)]
)
def test_a_moved_special_token_is_named_with_both_ids(folder, text, id, wanted):
    rename(folder, text, id=id)
    with pytest.raises(InputError, match=f"{text} has id {id}, expected id {wanted}"):
        prompt.load_tokenizer(folder)


def test_a_special_token_that_text_never_becomes_is_missing(folder):
    edit(
        folder / "tokenizer.json",
        lambda spec: spec.update(added_tokens=[t for t in spec["added_tokens"] if t["content"] != "<eoss>"]),
    )
    with pytest.raises(InputError, match="<eoss> is missing"):
        prompt.load_tokenizer(folder)


def test_a_small_model_has_its_own_ids(folder):
    for text, id in (("<eoss>", 900), ("<racm3:break>", 901), ("<reserved08799>", 902), ("<MOVQGAN0>", 1000)):
        rename(folder, text, id=id)
    own = {"start": 901, "end": 900, "newline": 902, "code0": 1000, "codes": 64}
    edit(folder / "config.json", lambda c: c.update(vocab_size=2000, ids=own))
    ids = prompt.load_tokenizer(folder).ids
    assert (ids.start, ids.end, ids.newline, ids.code0, ids.codes) == (901, 900, 902, 1000, 64)
    edit(folder / "config.json", lambda c: c.update(vocab_size=vocab.LUMINA_VOCAB))
    with pytest.raises(InputError, match="expected id 151665"):
        prompt.load_tokenizer(folder)
    edit(folder / "config.json", lambda c: c.update(vocab_size=2000, ids={**own, "end": 3}))
    with pytest.raises(InputError, match="<eoss> has id 900, expected id 3"):
        prompt.load_tokenizer(folder)


def test_bos_and_eos(folder):
    config = folder / "tokenizer_config.json"
    edit(config, lambda c: c.update(bos_token={"content": "<|im_start|>"}, eos_token={"content": "<|im_end|>"}))
    assert (prompt.load_tokenizer(folder).bos, prompt.load_tokenizer(folder).eos) == (151644, 151645)
    edit(config, lambda c: c.update(bos_token=None))
    assert prompt.load_tokenizer(folder).bos == 151645
    edit(config, lambda c: c.update(bos_token="<nowhere>"))
    with pytest.raises(InputError, match="bos_token '<nowhere>' is not in"):
        prompt.load_tokenizer(folder)
    edit(config, lambda c: c.update(bos_token=None, eos_token=None))
    with pytest.raises(InputError, match="no eos_token"):
        prompt.load_tokenizer(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3}', "\xff", "[" * 100_000])
def test_a_broken_tokenizer_file_is_an_input_error(folder, text):
    (folder / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        prompt.load_tokenizer(folder)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder):
    for name in ("config.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            prompt.load_tokenizer(folder)


def test_ids_beyond_any_vocabulary_are_an_input_error(folder):
    (folder / "config.json").write_text('{"ids": {"codes": 1000000000}}')
    with pytest.raises(InputError, match="whole numbers up to"):
        prompt.load_tokenizer(folder)


def test_a_git_lfs_pointer_is_named(folder):
    """What a clone without Git LFS leaves in place of the released tokenizer.json."""
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"tokenizer\.json is not JSON .* a Git LFS pointer, download the file itself"):
        prompt.load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        prompt.load_tokenizer(tmp_path)


def test_the_fingerprint_is_of_the_meaning(folder):
    before = prompt.load_tokenizer(folder).fingerprint
    edit(folder / "tokenizer.json", lambda c: None)  # other white space
    assert prompt.load_tokenizer(folder).fingerprint == before
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<|im_end|>"))
    assert prompt.load_tokenizer(folder).fingerprint != before
