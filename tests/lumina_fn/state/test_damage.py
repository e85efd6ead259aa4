"""A checkpoint that is not what was written never loads, and a disk that does not take one harms none that is there."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from experiments.finetuning import resuming
from experiments.launching import processes
from lumina_fn import checkpoint, model, sharding
from lumina_fn.disk import marks
from lumina_fn.errors import InputError
from lumina_fn.process import entry
from lumina_fn.state import manifest, saved_state
from lumina_fn.state.manifest import Damaged
from tests.support.resumed_runs import RUN, TINY, assert_same_bits, cut, finetune, random_state, written_inputs  # noqa: F401

pytestmark = pytest.mark.slow


def two_ranks(rank: int, size: int, folder: Path) -> None:
    mesh = sharding.Mesh(dist.group.WORLD, rank, size)
    for step in (1, 2):
        checkpoint.save(folder, cut(random_state(step=step), mesh), {}, mesh, barrier=lambda: dist.barrier()).wait()


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Checkpoints of steps 1 and 2, in two shards."""
    folder = tmp_path_factory.mktemp("written")
    processes.run(2, two_ranks, folder)
    return folder


def flip(path: Path, pick: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
    path.write_bytes(content)


def zero(path: Path, pick: random.Random) -> None:
    """A block of zeros over something else."""
    content = bytearray(path.read_bytes())
    at = pick.choice([i for i, byte in enumerate(content) if byte])
    begin = at // 512 * 512
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    path.write_bytes(content)


def truncate(path: Path, pick: random.Random) -> None:
    os.truncate(path, pick.randrange(path.stat().st_size))


def is_state(path: Path) -> bool:
    """The mark tells what may be removed, and nothing of the state."""
    return path.is_file() and path.name != marks.NAME


def delete(path: Path, pick: random.Random) -> None:
    path.unlink()


def swap(path: Path, pick: random.Random) -> None:
    """With another file of its kind, or with any other."""
    root = next(p for p in path.parents if p.name == "2")
    others = [p for p in root.rglob("*") if is_state(p) and p.read_bytes() != path.read_bytes()]
    other = pick.choice([p for p in others if p.suffix == path.suffix] or others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


HARMS: list[tuple[Callable[[Path, random.Random], None], int]] = [
    (flip, 6), (zero, 2), (truncate, 2), (delete, 1), (swap, 2)
]  # fmt: skip


def test_every_harm_is_told_with_its_file(written, tmp_path):
    """In every file, several times: 13 harms each."""
    pick, harmed = random.Random(0), 0
    names = sorted(p.relative_to(written) for p in (written / "2").rglob("*") if is_state(p))
    kinds = {name.name if "shard" not in name.name else "index" for name in names if name.parent.name != "d"}
    assert kinds >= {
        "MANIFEST.json",
        "index",
        "_METADATA",
        "manifest.ocdbt",
        "commit_success.txt",
        "_CHECKPOINT_METADATA",
    }
    folder = tmp_path / "harmed"
    for name in names:
        for harm, times in HARMS:
            for _ in range(times if (written / name).stat().st_size else 0):
                shutil.copytree(written, folder)
                harm(folder / name, pick)
                found = checkpoint.verify(folder)
                assert found[1] is None
                wrong = [
                    p for p in sorted(folder.rglob("*")) if p.is_file() and not same(p, written / p.relative_to(folder))
                ]
                assert any(str(p) in found[2] for p in [*wrong, folder / name]), (name, harm, found)
                with pytest.raises(InputError, match="the last good one is 1") as told:
                    checkpoint.restore(folder)
                assert str(folder / "2") in str(told.value)
                shutil.rmtree(folder)
                harmed += 1
    assert harmed >= 200


def same(path: Path, other: Path) -> bool:
    return other.exists() and path.read_bytes() == other.read_bytes()


def test_a_file_too_many_is_told(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "harmed")
    extra = folder / "2/shard_00001/d/extra"
    extra.write_bytes(b"")
    with pytest.raises(InputError, match="extra was not written"):
        checkpoint.restore(folder)


def test_a_checkpoint_under_another_s_name_is_told(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "harmed")
    (folder / "2").rename(folder / "3")
    with pytest.raises(InputError, match="belongs to step 2"):
        checkpoint.restore(folder)


@pytest.mark.parametrize("name", ["MANIFEST.json", "shard_00001.json"])
def test_a_folder_in_place_of_a_file_is_told(written, tmp_path, name):
    folder = shutil.copytree(written, tmp_path / "harmed")
    (folder / "2" / name).unlink()
    (folder / "2" / name).mkdir()
    with pytest.raises(Damaged, match=f"{name} (cannot be read|is missing).*the last good one is 1"):
        checkpoint.restore(folder)
    assert resuming.starting_step(folder, "last-good") == 1


def test_a_file_that_the_disk_does_not_give_back_is_told(written, monkeypatch):
    hashed = manifest._hashed

    def failing(path: Path) -> tuple[int, str]:
        if path.parent.name == "d" and "2" in path.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hashed(path)

    monkeypatch.setattr(manifest, "_hashed", failing)
    with pytest.raises(Damaged, match=r"/d/\w+ cannot be read: Input/output error; the last good one is 1"):
        checkpoint.restore(written)
    assert resuming.starting_step(written, "last-good") == 1


def test_a_checkpoint_that_goes_while_it_is_read_is_told(written, tmp_path):
    """As it does where it is converted while its run goes on, and prunes."""
    folder = shutil.copytree(written, tmp_path / "pruned")
    stored = saved_state.Stored(folder, 2)
    unit = lambda number: torch.empty(sum(leaf.numel() for leaf in pytree.tree_leaves(stored.units[number])))
    stored.fill(unit(0), "params", 0, 0)
    shutil.rmtree(folder / "2")
    with pytest.raises(Damaged, match=r"2/shard_0000. went away or changed while it was read"):
        stored.fill(unit(1), "params", 1, 0)


def test_what_a_killed_run_left_is_not_listed_and_goes(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "left")
    (folder / "2").rename(folder / ".2.tmp")
    (folder / ".9.tmp").write_text("a file")  # not ours: we make folders of such names
    (folder / ".8.old").mkdir()
    (folder / ".8.old" / "notes.txt").write_text("mine")
    assert checkpoint.steps(folder) == [1]
    manifest.tidy(folder)
    assert sorted(p.name for p in folder.iterdir()) == [".8.old", ".9.tmp", "1"]
    assert (folder / ".8.old" / "notes.txt").exists()


def test_machines_without_a_shared_disk_are_told(tmp_path):
    """Where another machine's shard does not arrive, nothing gets the name of a checkpoint."""
    mesh = sharding.Mesh("none", 0, 2)
    saving = checkpoint.save(tmp_path, cut(random_state(step=1), mesh), {}, mesh)
    with pytest.raises(InputError, match=r"shard_00001\.json did not arrive"):
        saving.wait()
    assert checkpoint.steps(tmp_path) == []


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A small disk with these options. Root can mount one; others skip."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        return place

    yield mount
    subprocess.run(["umount", "-l", place], check=False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, of what it could not write
def test_a_full_disk_is_said_and_older_checkpoints_stay(mounted, monkeypatch):
    folder = mounted("size=800k") / "checkpoints"
    state = random_state(step=1)
    with pytest.raises(InputError, match="MB are free: make room"):
        checkpoint.save(folder, state, {})
    assert not folder.exists()
    # What was free when it began is taken by somebody else meanwhile.
    monkeypatch.setattr("lumina_fn.state.saved_state.ROOM", -(1 << 40))
    checkpoint.save(folder, state, {}).wait()
    (folder.parent / "other").write_bytes(bytes(shutil.disk_usage(folder).free - 8192))
    with pytest.raises(InputError, match=r"cannot write checkpoint 2 .*no space left; the last one there is 1"):
        checkpoint.save(folder, random_state(step=2), {}).wait()
    manifest.tidy(folder)  # a thread of Orbax may have written on while what it wrote was removed
    assert [p.name for p in folder.iterdir()] == ["1"]
    assert checkpoint.verify(folder) == {1: None}
    assert_same_bits(checkpoint.restore(folder)[0], state)


WITHOUT_ROOM = (
    "from lumina_fn.state import saved_state; saved_state.ROOM = -(1 << 40)"  # found full only while it is written
)


@pytest.mark.parametrize("first", ["", WITHOUT_ROOM], ids=["before", "meanwhile"])
def test_a_full_disk_ends_finetune_with_one_line(inputs, mounted, tmp_path, first):
    out = mounted("size=80m") / "run"
    finetune(inputs, out, "--compile", "off", "--steps", 6, "--save-every", 3)
    free = shutil.disk_usage(out).free
    (out.parent / "other").write_bytes(bytes(free - (32 << 10) if first else 32 << 20))
    flags = [*inputs, "--out", out, *RUN, "--compile", "off", "--steps", 20, "--save-every", 3]
    command = f"{first}\nfrom experiments import finetune\nfrom experiments.launching import distributed\ndistributed.run(finetune.main)"
    done = subprocess.run(
        [sys.executable, "-c", command, *map(str, flags)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ("no space left; the last one there is 6" if first else "MB are free: make room") in line
    assert "Traceback" not in done.stderr
    assert checkpoint.verify(out / "checkpoints") == dict.fromkeys([3, 6])


def test_a_disk_that_may_not_be_written_is_said(mounted, monkeypatch):
    folder = mounted("size=1m") / "checkpoints"
    monkeypatch.setattr("lumina_fn.state.saved_state.ROOM", 0)
    checkpoint.save(folder, random_state(step=1), {}).wait()
    (folder / ".9.tmp").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    for change in (manifest.tidy, lambda folder: manifest.set_aside(folder, 0)):
        with pytest.raises(InputError, match=r"cannot write .*[Rr]ead-only"):
            change(folder)
    with pytest.raises(InputError, match=r"cannot write .*[Rr]ead-only"):
        checkpoint.save(folder, random_state(step=2), {}).wait()
    assert checkpoint.verify(folder) == {1: None}


def test_another_model_s_checkpoint_is_refused(written):
    with pytest.raises(InputError, match="another model"):
        checkpoint.restore(written, like=model.init(replace(TINY, width=8), device="meta"))
    with pytest.raises(InputError, match="holds no checkpoint of step 7"):
        checkpoint.restore(written, 7)
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.restore(written / "nowhere")
    with pytest.raises(SystemExit) as ended:
        entry.run(lambda _: checkpoint.restore(written / "nowhere"))
    assert ended.value.code == 2
