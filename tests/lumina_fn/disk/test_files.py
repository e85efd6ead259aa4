import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lumina_fn.disk import files, marks, places
from lumina_fn.errors import InputError
from tests.support.paths import ROOT

KIND = "result"


def contents(folder: Path) -> dict[str, str]:
    """Every file but marks."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != marks.NAME)
    return {str(p.relative_to(folder)): p.read_text() for p in found}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_new_folder_appears_whole(tmp_path):
    dst = tmp_path / "deep" / "dst"
    with files.new_folder(dst, KIND) as tmp:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "a").write_text("1")
        assert not dst.exists()
        assert tmp.parent == dst.parent
    assert contents(dst) == {"sub/a": "1"}
    assert names(dst.parent) == ["dst"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_things_as_they_were(tmp_path, overwrite):
    dst = tmp_path / "dst"
    if overwrite:
        with files.new_folder(dst, KIND) as tmp:
            (tmp / "old").write_text("old")
    before = contents(tmp_path)

    def fail():
        with files.new_folder(dst, KIND, overwrite) as tmp:
            (tmp / "a").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert contents(tmp_path) == before
    assert names(tmp_path) == (["dst"] if overwrite else [])


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_whole_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda *_: False)
    dst = tmp_path / "dst"
    for name in "ab":
        with files.new_folder(dst, KIND, overwrite=True) as tmp:
            (tmp / name).write_text(name)
    assert contents(dst) == {"b": "b"}
    assert names(tmp_path) == ["dst"]


def test_an_existing_place_is_an_error(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, overwrite in [("dst", False), ("file", True), ("link", True)]:
        with pytest.raises(InputError, match=name), files.new_folder(tmp_path / name, KIND, overwrite):
            pass
    assert names(tmp_path) == ["dst", "file", "link"]


def test_a_place_that_holds_an_input_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "set" / "data.json")
    for read in (tmp_path / "set", tmp_path / "set" / "data.json", tmp_path / "link"):
        with pytest.raises(InputError, match="which this run reads"):
            places.place(tmp_path / "set", [read])
    assert places.place(tmp_path / "set" / "out", [tmp_path / "set"]) == tmp_path / "set" / "out"


def test_a_full_disk_is_an_input_error_that_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="dst: No space left"), files.new_folder(tmp_path / "dst", KIND):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="not ours") as other, files.new_folder(tmp_path / "dst", KIND):
        raise OSError(errno.EIO, "not ours")
    assert not isinstance(other.value, InputError)
    assert names(tmp_path) == []


def test_a_place_that_appears_meanwhile_is_an_error(tmp_path):
    dst = tmp_path / "dst"
    with pytest.raises(InputError, match="dst"), files.new_folder(dst, KIND):
        dst.mkdir()
    assert names(tmp_path) == ["dst"]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="current folder"), files.new_folder(".", KIND, overwrite=True):
        pass


def test_an_unwritable_parent_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), files.new_folder(tmp_path / "file" / "dst", KIND):
        pass
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("a" * 300, "loop/dst"):
        with pytest.raises(InputError, match="cannot write"), files.new_folder(tmp_path / name, KIND):
            pass
    with pytest.raises(InputError, match="cannot write"):
        files.write_atomic(tmp_path / "missing" / "a", "text")


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    for data in ("one", b"two"):
        files.write_atomic(tmp_path / "a", data)
    assert contents(tmp_path) == {"a": "two"}


def test_a_killed_run_leaves_no_result_and_the_next_run_tidies_up(tmp_path):
    dst = tmp_path / "dst"
    code = (
        "import sys, time\nfrom lumina_fn.disk import files\n"
        "with files.new_folder(sys.argv[1], 'result') as tmp:\n  (tmp / 'a').write_text('1'); print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(dst)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"in\n"
    with files.new_folder(tmp_path / "dst2", KIND):  # another destination: the living writer's folder stays
        pass
    files.recover(dst)
    assert len([p for p in names(tmp_path) if p.startswith(".dst.")]) == 1
    child.send_signal(signal.SIGKILL)
    child.communicate()
    time.sleep(0.05)
    assert not dst.exists()
    with files.new_folder(dst, KIND) as tmp:
        (tmp / "b").write_text("2")
    assert names(tmp_path) == ["dst", "dst2"]
