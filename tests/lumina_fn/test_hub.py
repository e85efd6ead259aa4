"""Models named as on the Hub: found in this machine's cache, whose files are links; fetched only if asked for."""

import builtins
import json
import re
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch.utils import _pytree as pytree

from experiments import sample
from lumina_fn import checkpoint, convert, hub
from lumina_fn.errors import InputError
from tests.support.folders import SMALL, small_state, write_hf

REVISION = "a" * 40


@pytest.fixture(name="cache")
def cached(tmp_path, monkeypatch):
    """A cache with one model in one revision, laid out as huggingface_hub does it."""
    cache = tmp_path / "cache"
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    (repository / "blobs").mkdir()
    for path in write_hf(tmp_path / "files", small_state(), SMALL).iterdir():
        blob = repository / "blobs" / f"{abs(hash(path.name)):x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


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
    ):
        with pytest.raises(InputError, match=f"--download to fetch it, or run: {command}"):
            hub.local(Path(name))
        with pytest.raises(InputError, match=re.escape(name)):
            sample.main(["--model", name, "--vq", "x", "--out", "out", "--prompt", "p"])


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
    (cache / "models--some--model/refs/main").unlink()
    assert hub.local(cache / "models--some--model").name == REVISION
    (cache / "models--some--model/snapshots/other").mkdir()
    with pytest.raises(InputError, match="2 revisions, and none of them is its main one"):
        hub.local(cache / "models--some--model")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"lumina-fn\[hub\]"):
        hub.local(Path("some/model"))
    for path in ("/none/such", "runs/a/b/c d", "../x"):
        assert hub.local(Path(path)) == Path(path)
