"""Hugging Face folders with pytorch_model.bin, and with embeddings that another tool has resized."""

import json
import os
import pickle
import re
import shlex

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from lumina_fn import checkpoint, convert
from lumina_fn.errors import InputError
from tests.support.folders import SMALL, small_state, write_hf, write_mindspeed


def write_bin(folder, state, config=SMALL, files=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    where = {key: f"pytorch_model-{1 + i % files:05d}-of-{files:05d}.bin" for i, key in enumerate(state)}
    for name in set(where.values()):
        torch.save({key: state[key] for key in state if where[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def leaves(path):
    return pytree.tree_leaves(checkpoint.load_model(path, dtype=torch.bfloat16)[0])


@pytest.mark.parametrize("files", [1, 3])
def test_pytorch_model_bin_is_read_as_safetensors_are(tmp_path, files):
    first = write_hf(tmp_path / "first", small_state(), SMALL)
    found = leaves(write_bin(tmp_path / "bin", small_state(), files=files))
    assert all(torch.equal(a, b) for a, b in zip(found, leaves(first), strict=True))
    assert convert.main([str(tmp_path / "bin"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(leaves(tmp_path / "hf"), leaves(first), strict=True))


def test_parts_without_their_index_and_a_dict_within_the_file(tmp_path):
    expected = leaves(write_hf(tmp_path / "first", small_state(), SMALL))
    parts = write_bin(tmp_path / "parts", small_state(), files=3)
    (parts / "pytorch_model.bin.index.json").unlink()
    within = [write_bin(tmp_path / key, {key: small_state(), "epoch": 3}) for key in ("state_dict", "model", "module")]
    for folder in (parts, *within):
        (folder / "training_args.bin").write_text("not read")
        assert all(torch.equal(a, b) for a, b in zip(leaves(folder), expected, strict=True))


def test_safetensors_of_something_else_beside_do_not_win(tmp_path):
    folder = write_bin(tmp_path / "bin", small_state())
    save_file({"base_model.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    assert torch.equal(leaves(folder)[0], small_state()["model.embed_tokens.weight"])


def test_an_index_leads_to_no_file_outside_of_its_folder(tmp_path):
    folder = write_bin(tmp_path / "bin", small_state(), files=2)
    index, name = folder / "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"
    (folder / name).rename(tmp_path / name)
    text = index.read_text()
    for given in (f"../{name}", str(tmp_path / name)):
        index.write_text(text.replace(name, given))
        with pytest.raises(InputError, match="lies outside of the folder"):
            checkpoint.load_model(folder)
    index.write_text(text)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="lies outside of the folder"):
        checkpoint.load_model(folder)


def test_safetensors_win_and_an_absent_file_is_named(tmp_path):
    both = write_bin(tmp_path / "both", {key: t + 1 for key, t in small_state().items()})
    write_hf(tmp_path / "first", small_state(), SMALL)
    (tmp_path / "first/model.safetensors").rename(both / "model.safetensors")
    assert torch.equal(leaves(both)[0], small_state()["model.embed_tokens.weight"])
    parts = write_bin(tmp_path / "parts", small_state(), files=3)
    (parts / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match=r"lacks the files of its index: pytorch_model-00002-of-00003.bin"):
        checkpoint.load_model(parts)


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_no_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_bin(tmp_path / "bin", {})
    for content in ({**small_state(), "x": Attack()}, Attack()):
        torch.save(content, folder / "pytorch_model.bin", pickle_module=pickle)
        if isinstance(content, Attack):
            with pytest.raises(InputError):
                checkpoint.load_model(folder)
        else:
            checkpoint.load_model(folder)
        assert not (tmp_path / "attacked").exists()


def resized(rows, unembed=None):
    generator = torch.Generator().manual_seed(1)
    state = small_state()
    for key, count in (("model.embed_tokens.weight", rows), ("lm_head.weight", unembed or rows)):
        state[key] = torch.cat([state[key], torch.randn(count, 16, generator=generator).bfloat16()])[:count]
    return state


def write_mindspeed_with_config(folder, state, config):
    write_mindspeed(folder, state)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_columns(folder, state, config):
    """Files in which the embeddings lie column by column."""
    return write_bin(folder, {key: t.T.contiguous().T if len(t) > 40 else t for key, t in state.items()}, config)


@pytest.mark.parametrize("write", [write_hf, write_bin, write_mindspeed_with_config, by_columns])
def test_a_vocabulary_that_another_tool_made_longer_is_cut_or_kept_on_request(tmp_path, write):
    folder, state = write(tmp_path / "long", resized(47), SMALL), resized(47)
    with pytest.raises(InputError) as refused:
        checkpoint.load_model(folder)
    assert "the embeddings have 47 rows, and vocab_size in config.json is 40" in str(refused.value)
    assert re.search(
        r"lumina convert \S+ DST --to native --vocab cut \(to 40\) or --vocab keep \(47\)", str(refused.value)
    )
    for choice, rows in (("cut", 40), ("keep", 47)):
        for to in ("native", "hf"):
            out = tmp_path / f"{choice}-{to}"
            assert convert.main([str(folder), str(out), "--to", to, "--vocab", choice]) == 0
            params, cfg = checkpoint.load_model(out, dtype=torch.bfloat16)
            assert cfg.vocab == rows
            assert torch.equal(params.embed, state["model.embed_tokens.weight"][:rows])
            assert torch.equal(params.head.unembed, state["lm_head.weight"][:rows])


def test_the_line_about_a_longer_vocabulary_can_be_pasted_into_a_shell(tmp_path):
    folder = write_hf(tmp_path / "with a space", resized(47), SMALL)
    with pytest.raises(InputError) as refused:
        checkpoint.load_model(folder)
    words = shlex.split(str(refused.value).split(": lumina convert ")[1])
    assert words[:5] == [str(folder), "DST", "--to", "native", "--vocab"]


@pytest.mark.parametrize("flags", [[], ["--vocab", "cut"], ["--vocab", "keep"]])
def test_longer_embeddings_without_an_output_layer_are_an_error(tmp_path, flags):
    state = resized(47)
    del state["lm_head.weight"]
    folder = write_hf(tmp_path / "tied", state, SMALL)
    with pytest.raises(InputError, match=r"missing: lm_head.weight; misshapen: model.embed_tokens.weight"):
        convert.main([str(folder), str(tmp_path / "out"), "--to", "native", *flags])


@pytest.mark.parametrize("rows", [(39, 39), (47, 40), (47, 48)])
def test_other_sizes_stay_errors(tmp_path, rows):
    folder = write_hf(tmp_path / "wrong", resized(*rows), SMALL)
    for flags in ([], ["--vocab", "cut"], ["--vocab", "keep"]):
        with pytest.raises(InputError, match="does not hold the tensors that its sizes call for: misshapen"):
            convert.main([str(folder), str(tmp_path / "out"), "--to", "native", *flags])
