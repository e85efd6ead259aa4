"""What is the user's stays: marks, locks, places, and the one opener."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lumina_fn.disk import files, locks, marks, places, reading
from lumina_fn.errors import InputError
from lumina_fn.state import manifest
from tests.support.paths import ROOT

KIND = "result"


def made(dst: Path, *names: str, kind: str = KIND, overwrite: bool = False) -> Path:
    with files.new_folder(dst, kind, overwrite) as folder:
        for name in names or ("a", "sub/b"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
    return dst


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, links as what they say."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): bytes(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in found
    }


STRANGERS = {
    "a file": lambda d: (d / "thesis.tex").write_text("years"),
    "a folder": lambda d: (d / "thesis").mkdir(),
    "a file in a folder of ours": lambda d: (d / "sub" / "notes.txt").write_text("mine"),
    "a link": lambda d: (d / "link").symlink_to("/etc/hostname"),
    "a link in the place of a file of ours": lambda d: ((d / "a").unlink(), (d / "a").symlink_to("/etc/hostname")),
    "a pipe": lambda d: os.mkfifo(d / "pipe"),
    "another result": lambda d: made(d / "inner"),
    "a name like ours": lambda d: (d / "A").write_text("mine"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_folder_with_a_stranger_is_not_replaced(tmp_path, stranger):
    dst = made(tmp_path / "dst")
    STRANGERS[stranger](dst)
    before = tree(dst) if stranger != "a pipe" else None
    with pytest.raises(InputError, match="did not write there"):
        made(dst, overwrite=True)
    assert before is None or tree(dst) == before
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


@pytest.mark.parametrize("mark", [None, "{}", "[]", "\0", json.dumps({"format": "lumina_fn/mark/1", "kind": KIND, "version": "1", "files": [3]}), marks.text("another", ["a"])])  # fmt: skip
def test_only_our_own_mark_of_the_same_kind_lets_a_folder_be_replaced(tmp_path, mark):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "a").write_text("mine")
    if mark is not None:
        (dst / marks.NAME).write_text(mark)
    before = tree(dst)
    with pytest.raises(InputError, match=r"dst"):
        made(dst, overwrite=True)
    assert tree(dst) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_strangers_that_come_while_a_folder_is_replaced_move_along(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda *_: False)
    dst = made(tmp_path / "dst", "a", "b")
    with files.new_folder(dst, KIND, True) as folder:
        (folder / "a").write_text("new")
        (dst / "notes.txt").write_text("mine")  # after it was looked at
    assert {p.name: p.read_text() for p in dst.iterdir() if p.name != marks.NAME} == {"a": "new", "notes.txt": "mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_a_renewed_folder_keeps_what_others_put_there(tmp_path):
    """Also in one without a mark, of a version that wrote none: its files go where the new one has them too."""
    dst = made(tmp_path / "dst", "a", "old")
    for name, text in (("tokenizer.json", "mine"), ("a", "edited")):
        (dst / name).write_text(text)
    with files.renewed_folder(dst, KIND) as folder:
        (folder / "a").write_text("new")
    assert {p.name: p.read_text() for p in dst.iterdir() if p.name != marks.NAME} == {
        "a": "new",
        "tokenizer.json": "mine",
    }
    (dst / marks.NAME).unlink()
    with files.renewed_folder(dst, KIND) as folder:
        (folder / "a").write_text("newer")
    assert {p.name: p.read_text() for p in dst.iterdir() if p.name != marks.NAME} == {
        "a": "newer",
        "tokenizer.json": "mine",
    }


def test_a_name_leaves_room_for_what_lies_beside_it(tmp_path):
    for _ in range(2):
        with files.new_folder(places.place(tmp_path / ("n" * places.LONGEST)), "a result", overwrite=True) as folder:
            (folder / "x").write_text("x")
    for name in ("n" * (places.LONGEST + 1), "\u732b" * 80):
        with pytest.raises(InputError, match="its name is longer than"):
            places.place(tmp_path / name)


def test_an_input_is_found_through_every_link(tmp_path):
    dst = made(tmp_path / "dst")
    reads = tmp_path / "model"
    reads.mkdir()
    (reads / "deep").mkdir()
    places.place(dst, [reads])
    (reads / "deep" / "weights").symlink_to(dst / "a")
    with pytest.raises(InputError, match="leads to, which this run reads"):
        places.place(dst, [reads])
    (tmp_path / "hard").hardlink_to(dst / "a")
    for name in ("a", "sub/../a"):
        with pytest.raises(InputError, match="which this run reads"):
            places.place_of_file(tmp_path / "hard", [dst / name])
    (tmp_path / "soft").symlink_to(dst / "a")
    for given in ("soft", "dst/sub/b", "dst"):
        with pytest.raises(InputError):
            places.place_of_file(tmp_path / given, [dst])
    assert places.place_of_file(tmp_path / "new", [dst]) == tmp_path / "new"


KILLED = """
import os, sys
from pathlib import Path
from lumina_fn.disk import files
dst, exchange, at = Path(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3])
calls = [0]
def killing(name, real):
    def call(*args, **more):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), 9)
        return real(*args, **more)
    return call
if not exchange:
    files._renameat2 = lambda *_: False
for owner, name in ((files, "_renameat2"), (os, "fsync"), (os, "open"), (os, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "rmdir")):
    setattr(owner, name, killing(name, getattr(owner, name)))
with files.new_folder(dst, "result", True) as folder:
    (folder / "new").write_text("new")
    (folder / "both").write_text("new")
print("done")
"""  # killed just before its n-th call of the system


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_moment_loses_neither_the_old_nor_the_new(tmp_path, exchange):
    """Before each call in turn until none is left to be killed before: what stands there is whole, at the latest at the next start."""
    for at in range(1, 200):
        dst = made(tmp_path / f"{at}" / "dst", "old", "both")
        run = [sys.executable, "-c", KILLED, str(dst), "01"[exchange], str(at)]
        ended = subprocess.run(run, cwd=ROOT, capture_output=True, check=False)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        files.recover(dst)
        found = {p.name for p in dst.iterdir()} - {marks.NAME}
        assert found in ({"old", "both"}, {"new", "both"}), (at, found)
        assert (dst / "both").read_text() == ("new" if "new" in found else "both")
        made(dst, "next", overwrite=True)
        assert [p.name for p in dst.parent.iterdir()] == ["dst"], at
        if ended.returncode == 0:
            assert at > 15
            return
    pytest.fail("it never came to its end")


REPLACED = """
import os, sys
from pathlib import Path
from lumina_fn.disk import files
if sys.argv[2] == "0":
    real = files._renameat2
    files._renameat2 = lambda src, dst, flags: flags != files._EXCHANGE and real(src, dst, flags)
os.write(1, b"ready")
for n in range(10**6):
    with files.new_folder(sys.argv[1], "result", True) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(str(n))
"""  # one replacement after another, until it is killed


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_a_random_moment_leaves_one_of_them_whole(tmp_path, tmp_path_factory, exchange):
    """A hundred of them, on one folder, which is what the last kill left of it."""
    dst, moments, seen = made(tmp_path / "dst", "a", "b"), random.Random(0), set()
    timed = tmp_path_factory.mktemp("timed") / "dst"
    began = time.perf_counter()
    for _ in range(10):
        with files.new_folder(timed, "result", overwrite=True) as folder:
            (folder / "a").write_text("")
    one = (time.perf_counter() - began) / 10  # a replacement takes 1 ms on one machine and 10 on another
    for trial in range(100):
        child = subprocess.Popen(
            [sys.executable, "-c", REPLACED, str(dst), "01"[exchange]], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout.read(5) == b"ready"
        time.sleep(moments.uniform(0, 8 * one))
        child.kill()
        child.communicate()
        files.recover(dst)
        assert {p.name for p in dst.iterdir()} == {"a", "b", marks.NAME}, trial
        seen.add((dst / "a").read_text())
        assert seen == {"a"} or (dst / "a").read_text() == (dst / "b").read_text(), trial
    assert len(seen) > 5
    made(dst, "next", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_two_writers_of_one_folder(tmp_path):
    out = tmp_path / "out"
    with locks.one_writer(out), pytest.raises(InputError, match=f"by process {os.getpid()}"), locks.one_writer(out):
        pass
    out.mkdir()
    with locks.one_writer(out), locks.held_folder(out):
        (tmp_path / ".out.lock").unlink()  # a cleaner came by
        with locks.one_writer(out), pytest.raises(InputError, match="by another process"), locks.held_folder(out):
            pass
    with locks.one_writer(out), locks.held_folder(out):
        pass


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    take, removed = locks.take, []

    def removing(fd, wait=False):
        got = take(fd, wait)
        if not removed:
            removed.append(os.fstat(fd).st_ino)
            (tmp_path / ".out.lock").unlink()
        return got

    monkeypatch.setattr(locks, "take", removing)
    with locks.one_writer(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == str(os.getpid())


def test_a_file_system_without_locks_is_used_and_said(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.one_writer(tmp_path / "out"):
        pass
    assert "has no locks" in caplog.text
    dst = made(tmp_path / "dst")
    dst.rename(tmp_path / ".dst.lumina-old-0123")
    assert tree(made(dst, "new", overwrite=True)).keys() == {"new", marks.NAME}


@pytest.mark.parametrize("what", ["a link", "a hard link", "a folder", "a pipe", "another's file"])
def test_a_lock_s_place_that_something_else_has(tmp_path, what):
    victim, place = tmp_path / "victim", tmp_path / ".out.lock"
    victim.write_text("mine")
    {
        "a link": lambda: place.symlink_to(victim), "a hard link": lambda: place.hardlink_to(victim), "a folder": place.mkdir,
        "a pipe": lambda: os.mkfifo(place), "another's file": lambda: place.write_text("mine"),
    }[what]()  # fmt: skip
    with pytest.raises(InputError, match=r"\.out\.lock"), locks.one_writer(tmp_path / "out"):
        pass
    assert victim.read_text() == "mine"
    assert what != "another's file" or place.read_text() == "mine"


def test_what_is_appended_goes_through_no_link(tmp_path):
    files.append(tmp_path / "metrics.jsonl", "one\n")
    files.append(tmp_path / "metrics.jsonl", "two\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\n"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a link"):
        files.append(tmp_path / "link", "x")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("read", [reading.text, reading.json_object, lambda p: reading.contents(p, 100), lambda p: list(reading.lines(p, "x"))])  # fmt: skip
def test_what_is_no_file_of_bounded_size_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "terabyte").touch()
    os.truncate(tmp_path / "terabyte", 1 << 40)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", ".", "terabyte", "loop", "nothing", "a\0b", "/dev/zero", "/proc/self/mem"):
        with pytest.raises(InputError):
            read(tmp_path / name)


def test_text_that_is_no_utf8_is_told_by_its_line(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\ntwo\nthr\xe9e\n")
    with pytest.raises(InputError, match=r"x, line 3: not UTF-8 \(byte 0xe9\)"):
        reading.text(tmp_path / "x")


def test_a_checkpoint_with_a_stranger_in_it_is_not_thinned_out(tmp_path, caplog):
    for step in (1, 2, 3):
        tmp = manifest.unfinished(tmp_path, step)
        (tmp / "shard_00000" / "d").mkdir(parents=True)
        (tmp / "shard_00000" / "d" / "data").write_text("numbers")
        manifest.seal_shard(tmp, 0)
        manifest.commit(tmp_path, step, {"parts": 1})
    (tmp_path / "1" / "notes.txt").write_text("the good one")
    manifest.prune(tmp_path, manifest.Keep(last=1))
    assert manifest.steps(tmp_path) == [1, 3]
    assert caplog.text.count("notes.txt") == 1


# Where a user's file is opened, replaced or removed: the modules that are there for it, and what fills a folder that new_folder gave.
DISK = re.compile(
    r"(?<![\w.])open\(|\.open\(|os\.(open|remove|unlink|rename|replace|rmdir|truncate|link|symlink)\(|\.(read_text|read_bytes|unlink|rmdir|rename|touch|symlink_to|hardlink_to)\("
    r"|shutil\.(rmtree|move|copy\w*)\(|safe_open\(|load_file\(|FileIO\)|np\.(load|fromfile|memmap)\("
)
ALLOWED = {
    "lumina_fn/disk": "the room itself",
    "lumina_fn/formats/torch_zip.py": "reads on in a file that `reading` opened; writes into a new folder",
    "lumina_fn/picture_files.py": "Pillow, over a file that `reading` opened",
    "lumina_fn/formats/tensor_files.py": "writes into a new folder",
    "lumina_fn/state/manifest.py": "checkpoints of a run, aside and away, after their marks were read",
    "lumina_fn/features/foreign.py": "a zip in bytes that `reading` read",
    "lumina_fn/programs/graphs.py": "the package's own lists",
    "lumina_fn/process/entry.py": "/dev/null",
    "lumina_fn/disk/compile_cache.py": "Inductor's own files in its cache, by their names",
    "kernels": "its own lists, and the table that it writes",
    "experiments/demo": "its own assets and runs/demo",
    "experiments/launching": "this launch's private folder, and a temporary one",
    "experiments/pretokenizing/folder.py": "shards that it made, by their names, in a locked folder",
    "experiments/planning/memory.py": "/proc and /sys",
    "experiments/notebooks": "temporary folders",
}


def test_no_file_is_touched_but_through_the_disk_s_room():
    found = {}
    for floor in ("kernels", "ops", "lumina_fn", "experiments"):
        for path in sorted((ROOT / floor).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(tuple(ALLOWED)):
                code = "\n".join(line.split("  # ")[0] for line in path.read_text().splitlines())
                if hits := [m[0] for m in DISK.finditer(code)]:
                    found[name] = hits
    assert found == {}


def test_the_rule_sees_what_it_forbids():
    for line in (
        "open(p)",
        "p.open('rb')",
        "os.unlink(p)",
        "p.read_text()",
        "shutil.rmtree(p)",
        "p.rename(q)",
        "safe_open(p)",
    ):
        assert DISK.search(line), line
