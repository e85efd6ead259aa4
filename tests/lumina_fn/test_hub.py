"""Models named as on the Hub: found in this machine's cache, whose files are links; fetched only if asked for."""

import builtins
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from torch.utils import _pytree as pytree

from experiments import dataset, finetune, migrate, plan, pretokenize, sample
from lumina_fn import checkpoint, convert, export, hub, prompt
from lumina_fn.errors import InputError
from tests.support.folders import SMALL, small_state, write_hf

REVISION = "a" * 40


def put(repository, files, inner="."):
    """A snapshot of these files in a repository's folder of a cache, laid out as huggingface_hub does it: links to blobs."""
    folder = repository / "snapshots" / REVISION / inner
    folder.mkdir(parents=True)
    for name in ("refs", "blobs"):
        (repository / name).mkdir(exist_ok=True)
    (repository / "refs/main").write_text(REVISION)
    for path in files.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


@pytest.fixture(name="cache")
def cached(tmp_path, monkeypatch):
    """A cache with one model in one revision."""
    put(tmp_path / "cache/models--some--model", write_hf(tmp_path / "files", small_state(), SMALL))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(path, other):
    a, b = (pytree.tree_leaves(checkpoint.load_model(p)[0]) for p in (path, other))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["some/model", "some/model@main", f"some/model@{REVISION}", "{cache}/models--some--model", "{cache}/models--some--model/snapshots/" + REVISION])  # fmt: skip
def test_a_name_and_a_folder_of_the_cache_are_its_snapshot(tmp_path, cache, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found = hub.local(tmp_path / name.format(cache=cache) if "{" in name else Path(name))
    assert found == cache / "models--some--model/snapshots" / REVISION
    assert same(found, tmp_path / "files")


def test_a_file_of_a_repository(tmp_path, cache):
    assert hub.local(Path("some/model/config.json")).read_text() == json.dumps(SMALL)
    with pytest.raises(InputError, match=re.escape("some/model/none.ckpt")):
        hub.local(Path("some/model/none.ckpt"))


def test_a_folder_in_a_repository_may_link_to_its_blobs_and_to_nothing_else(tmp_path, cache):
    folder = put(cache / "models--some--parts", tmp_path / "files", "model/main")
    for found in (hub.local(Path("some/parts/model/main")), folder):
        assert same(found, tmp_path / "files")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "files/model.safetensors")
    with pytest.raises(InputError, match=r"'model.safetensors' lies outside of the folder"):
        checkpoint.load_model(folder)


def test_a_link_to_a_repository_is_its_main_snapshot(tmp_path, cache):
    (tmp_path / "link").symlink_to(cache / "models--some--model")
    assert same(hub.local(tmp_path / "link"), tmp_path / "files")


def test_a_pull_request_is_a_revision(cache):
    refs = cache / "models--some--model/refs/refs/pr"
    refs.mkdir(parents=True)
    (refs / "1").write_text(REVISION)
    assert hub.local(Path("some/model@refs/pr/1")).name == REVISION
    assert hub.local(Path("some/model@refs/pr/1/config.json")).name == "config.json"


@pytest.mark.parametrize("left", ["nothing", "a link to a blob that is not there", "an index without its files"])
def test_a_part_of_a_model_names_the_command_that_fetches_the_rest(cache, left):
    weights = hub.local(Path("some/model")) / "model.safetensors"
    weights.unlink()
    if left.startswith("a link"):
        weights.symlink_to("../../blobs/none")
    elif left.startswith("an index"):
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    for name in (Path("some/model"), weights.parent):
        for read in (checkpoint.load_model, prompt.load_tokenizer):
            with pytest.raises(InputError, match=f"the rest comes by: hf download some/model --revision {REVISION}"):
                read(hub.local(name))


def test_a_cache_that_lists_more_files_than_it_has_is_read_as_far_as_it_goes(tmp_path, cache, monkeypatch):
    """huggingface_hub 2 refuses such a snapshot, also where the files that it lacks are of no use here."""

    class Incomplete(LocalEntryNotFoundError):
        snapshot_path = str(cache / "models--some--model/snapshots" / REVISION)

    def refuse(*args, **how):
        raise Incomplete("3 file(s) are missing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert same(hub.local(Path("some/model")), tmp_path / "files")
    with pytest.raises(InputError, match=r"cannot be fetched from the Hub: 3 file"):
        hub.local(Path("some/model"), download=True)


def test_a_folder_on_this_machine_wins(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/model").mkdir(parents=True)
    assert hub.local(Path("some/model")) == Path("some/model")


def test_what_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **how: pytest.fail("the network was used"))
    for name, command in (
        ("other/model", "hf download other/model$"),
        ("some/model@v2", "hf download some/model --revision v2$"),
        ("other/model@v2/a.ckpt", "hf download other/model a.ckpt --revision v2$"),
        ("other/model/a", re.escape("hf download other/model --include 'a/*'") + "$"),
    ):
        with pytest.raises(InputError, match=f"--download to fetch it, or run: {command}"):
            hub.local(Path(name))


COMMANDS = {
    "pretokenize --model": (pretokenize, "data.json out --vq . --model"),
    "pretokenize --vq": (pretokenize, "data.json out --model . --vq"),
    "finetune": (finetune, "--features f --out o --model"),
    "sample --model": (sample, "--vq . --out o --prompt p --model"),
    "sample --vq": (sample, "--model . --out o --prompt p --vq"),
    "plan": (plan, "--devices 1 --model"),
    "report --model": (dataset, "report data.json --model"),
    "report --vq": (dataset, "report f --vq"),
    "verify --model": (dataset, "verify f --data data.json --vq . --model"),
    "verify --vq": (dataset, "verify f --data data.json --vq"),
    "migrate": (migrate, "f --out o --model"),
    "export": (export, "o --what forward --target cpu"),
    "convert": (convert, "o --to native"),
    "convert --norm-from": (convert, ". o --to native --norm-from"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_looks_into_the_cache_and_fetches_only_if_asked(tmp_path, cache, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    command, flags = COMMANDS[name]
    words = ["other/model", *flags.split()] if name in ("export", "convert") else [*flags.split(), "other/model"]
    with pytest.raises(InputError, match="other/model does not exist here, nor in the Hub's cache"):
        command.main(words)

    def fetch(repository, *, local_files_only, **how):
        raise OSError(f"{local_files_only=}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(InputError, match="other/model cannot be fetched from the Hub: local_files_only=False"):
        command.main([*words, "--download"])


def test_only_download_fetches(tmp_path, cache, monkeypatch):
    asked = []

    def fetch(repository, **how):
        asked.append((repository, how["revision"], how["local_files_only"]))
        return str(tmp_path / "files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--download"]):
        assert convert.main(["other/model@v2", f"out{len(asked)}", "--to", "native", *flags]) == 0
    assert asked == [("other/model", "v2", True), ("other/model", "v2", False)]
    assert same(tmp_path / "out0", tmp_path / "files")


def test_a_fault_of_the_network_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **how):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"other/model cannot be fetched from the Hub: no route$"):
        hub.local(Path("other/model"), download=True)


def test_a_folder_of_revisions_without_a_main_one_asks_for_one(cache):
    repository = cache / "models--some--model"
    (repository / "refs/main").rename(repository / "refs/v2")
    assert hub.local(repository).name == REVISION
    (repository / "snapshots/other").mkdir()
    with pytest.raises(InputError, match="2 revisions, and none of them is its main one"):
        hub.local(repository)
    (repository / "refs/main").write_text("absent")
    with pytest.raises(InputError, match=r"main revision; fetch them: hf download some/model$"):
        hub.local(repository)


def test_what_can_be_no_name_on_the_hub_is_a_path(cache):
    for path in ("a--b/c", "a/b..c", "a/b.git", "a/" + "b" * 100):
        assert hub.local(Path(path)) == Path(path)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"lumina-fn\[hub\]"):
        hub.local(Path("some/model"))
    for path in ("/none/such", "runs/a/b/c d", "../x", "a" * 5000):
        assert hub.local(Path(path)) == Path(path)
