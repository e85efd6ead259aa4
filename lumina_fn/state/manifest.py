"""A folder of checkpoints: list, check, add and remove them.

checkpoints/STEP/              appears by one rename, after everything in it is on the disk
    MANIFEST.json              description of the state; hashes of the indices, and of itself
    shard_00000.json           an index: size and SHA-256 of every file under shard_00000
    shard_00000/...            the files that Orbax wrote for one rank
checkpoints/.STEP.tmp          unfinished: being written, or left by a killed writer
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lumina_fn.disk import files, marks, places, reading
from lumina_fn.errors import InputError, printable
from lumina_fn.state.manifest_content import Content, Hashes

FORMAT = "lumina_fn/checkpoint/1"
CHECKPOINTS, ORIGIN = (
    "checkpoints",
    "origin",
)  # in a run's folder; the latter holds what a model takes over beside weights
MANIFEST = "MANIFEST.json"
LARGEST = 64 << 20  # bytes of a manifest or an index
_TMP, _OLD = ".tmp", ".old"
# Names that are ours. The files of a finished shard are listed in the checkpoint's mark; in an unfinished one all files are Orbax's.
_OURS = re.compile(
    rf"(\d+(\.aside\d*)?|\.\d+\.(tmp|old))/(\.?({MANIFEST}|shard_\d{{5}}\.json)(\.lumina-tmp-[0-9a-f]+)?)?"
    r"|\.\d+\.(tmp|old)/shard_\d{5}[^/]*/.*", re.ASCII | re.DOTALL
)  # fmt: skip

log = logging.getLogger(__name__)


class Unusable(InputError):
    """A checkpoint cannot be loaded; an older one may be loadable."""


class Damaged(Unusable):
    """A checkpoint is damaged, or cannot be read."""


def steps(folder: Path) -> list[int]:
    """The steps of complete checkpoints, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isascii() and p.name.isdigit() and p.is_dir())


def unfinished(folder: Path, step: int) -> Path:
    """The path under which a checkpoint is written before it gets its name."""
    return folder / f".{step}{_TMP}"


def shard(rank: int) -> str:
    """The name of a rank's part of a checkpoint."""
    return f"shard_{rank:05d}"


def is_ours(path: str) -> bool:
    """Whether a path below a folder of checkpoints belongs to a checkpoint; the path of a folder ends with "/"."""
    return _OURS.fullmatch(path) is not None


def tidy(folder: Path) -> None:
    """Remove the remains of killed runs. No process may be writing the folder."""
    if not folder.is_dir():
        return
    with places.writable(folder):
        files.remove_unfinished(folder)
        for step in steps(folder):
            with suppress(InputError):
                if marks.read(folder / str(step)) is None:  # an earlier version's
                    _mark(folder / str(step), sorted(path.name for path in (folder / str(step)).glob("shard_*.json")))
        for path in list(folder.iterdir()):
            if is_ours(f"{path.name}/") and path.suffix in (_TMP, _OLD) and path.is_dir() and not path.is_symlink():
                _discard(path)


def _mark(folder: Path, indices: list[str]) -> None:
    """Write a checkpoint's mark, with the files that its indices list."""
    shards = [(name, _read_json(folder / name)) for name in indices]
    inner = [f"{name.removesuffix('.json')}/{file}" for name, index in shards for file in index]
    files.write_atomic(folder / marks.NAME, marks.text("checkpoint", sorted([MANIFEST, *indices, *inner])))


def discard(folder: Path, step: int) -> None:
    """Remove a checkpoint that cannot be finished."""
    if (tmp := unfinished(folder, step)).is_dir():
        _discard(tmp)


def seal_shard(folder: Path, rank: int) -> None:
    """Force a rank's files onto the disk, and write their index beside them."""
    files.sync(folder / shard(rank))
    index = {name: list(_hashed(folder / shard(rank) / name)) for name in _listed(folder / shard(rank))}
    files.write_atomic(folder / f"{shard(rank)}.json", _text(index))


def commit(folder: Path, step: int, content: dict[str, Any]) -> None:
    """Write the manifest of an unfinished checkpoint with sealed shards, and rename it to its step; an existing one is replaced."""
    tmp, final = unfinished(folder, step), folder / str(step)
    names = [f"{shard(rank)}.json" for rank in range(content["parts"])]
    if absent := [name for name in names if not (tmp / name).exists()]:
        raise InputError(f"{absent[0]} did not arrive: all machines must write to one disk that they share")
    indices = {name: list(_hashed(tmp / name)) for name in names}
    content = {"format": FORMAT, "step": step, **content, "indices": indices}
    digest = hashlib.sha256(_text(content)).hexdigest()
    files.write_atomic(tmp / MANIFEST, _text({"sha256": digest, "content": content}))
    _mark(tmp, names)
    files.take_place(tmp, final, overwrite=True)
    files.sync_one(folder)
    if tmp.exists():  # the checkpoint that was replaced
        files.retire(tmp, final, lambda path: is_ours(f"{step}/{path}"))


class Keep(NamedTuple):
    """Which checkpoints of a run stay: the newest `last` (None: all), and those of each multiple of `every` steps."""

    last: int | None = None
    every: int | None = None


EVERYTHING = Keep()


def prune(folder: Path, keep: Keep) -> None:
    """Remove the checkpoints that are not kept.

    A checkpoint that contains files of others stays, with a warning.
    """
    for step in [] if keep.last is None else steps(folder)[: -keep.last]:
        if keep.every is None or step % keep.every:
            _remove(folder / str(step))


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename the checkpoints after a step, from which a run continues differently, so that they are no longer listed."""
    aside = []
    if not folder.is_dir():
        return aside
    with places.writable(folder):
        for step in [step for step in steps(folder) if step > after]:
            names = (folder / f"{step}.aside{n or ''}" for n in count())
            aside.append((folder / str(step)).rename(next(name for name in names if not name.exists())))
        files.sync_one(folder)
    return aside


def read(folder: Path, step: int) -> dict[str, Any]:
    """The content of a checkpoint's manifest. Raises InputError if there is none, Unusable for a newer format, Damaged for a damaged one."""
    if not (folder / str(step)).is_dir():
        there = ", ".join(map(str, steps(folder))) or "none"
        raise InputError(f"{folder} holds no checkpoint of step {step}; there are: {there}")
    path = folder / str(step) / MANIFEST
    whole = _read_json(path)
    content = whole.get("content")
    if not isinstance(content, dict) or whole.get("sha256") != hashlib.sha256(_text(content)).hexdigest():
        raise Damaged(f"{path} is damaged: its checksum differs")
    if content.get("format") != FORMAT:
        raise Unusable(
            printable(f"{path}: format {content.get('format')!r}, this version reads {FORMAT!r}: use a newer version")
        )
    _checked(Content, content, path)
    if content["indices"].keys() != {f"{shard(rank)}.json" for rank in range(content["parts"])}:
        raise Damaged(f"{path} is damaged: it lists other files than the indices of its {content['parts']} parts")
    if content["step"] != step:
        raise Damaged(f"{path} is damaged: it belongs to step {content['step']}")
    return content


def check_shard(folder: Path, step: int, name: str, content: dict[str, Any]) -> None:
    """Raise Damaged, which names the file, unless all of a shard's files exist with the recorded sizes and hashes."""
    root, index = folder / str(step), f"{name}.json"
    _check_file(root / index, content["indices"].get(index))
    listed = _read_json(root / index)
    _checked(Hashes, listed, root / index)
    with _readable(root / name):
        found = _listed(root / name)
    if missing := sorted(listed.keys() - set(found)):  # links count as missing too
        raise Damaged(printable(f"{root / name / missing[0]} is missing"))
    if extra := sorted(set(found) - listed.keys()):
        raise Damaged(f"{root / name / extra[0]} was not written with this checkpoint")
    for file, known in listed.items():
        _check_file(root / name / file, known)


def check(folder: Path, step: int) -> dict[str, Any]:
    """The content of a checkpoint's manifest, as `read` returns it, after all files have been checked."""
    content = read(folder, step)
    for index in content["indices"]:
        check_shard(folder, step, index.removesuffix(".json"), content)
    return content


def verify(folder: str | Path) -> dict[int, str | None]:
    """For each step what is wrong with its checkpoint (None: nothing). Reads every file."""
    found: dict[int, str | None] = {}
    for step in steps(Path(folder)):
        try:
            check(Path(folder), step)
            found[step] = None
        except InputError as error:
            found[step] = str(error)
    return found


def newest_good(folder: Path) -> int | None:
    """The last step with an undamaged checkpoint; None if there is none."""
    for step in reversed(steps(folder)):
        with suppress(InputError):
            check(folder, step)
            return step
    return None


def _check_file(path: Path, known: list | None) -> None:
    with _readable(path):
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        size = path.stat().st_size
        if known is None or size != known[0]:
            raise Damaged(f"{path} is damaged: it has {size} bytes, not {known[0] if known else 'a place'}")
        if list(_hashed(path)) != known:
            raise Damaged(f"{path} is damaged: its checksum differs")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within the block an OSError, such as that of a failing disk, becomes Damaged, which names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except Damaged:
        raise
    except InputError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from error


def _hashed(path: Path) -> tuple[int, str]:
    with reading.opened(path, "a checkpoint's file") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _checked(kind: Any, value: Any, path: Path) -> None:
    try:
        reading.checked(kind, value, path, "what a checkpoint says of itself")
    except InputError as error:
        raise Damaged(str(error)) from error


def _listed(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise Damaged(f"{path} is missing")
    with _readable(path):
        data = reading.contents(path, LARGEST, "what a checkpoint says of itself")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {printable(error)}") from error
    if not isinstance(value, dict) or _text(value) != data:  # such as a changed blank
        raise Damaged(f"{path} is damaged: it is not what was written")
    return value


def _text(value: dict) -> bytes:
    """JSON in a canonical form: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _remove(folder: Path) -> None:
    """Remove a checkpoint after a rename, so that it disappears from the list in one step."""
    try:
        strangers = marks.sort_out(folder, lambda path: is_ours(f"{folder.name}/{path}")).strangers
    except InputError as error:
        strangers = [str(error)]
    if strangers:
        log.warning("note: checkpoint %s is kept, since lumina did not write all of it: %s", folder, strangers[0])
        return
    old = folder.with_name(f".{folder.name}{_OLD}")
    folder.rename(old)
    _discard(old)


def _discard(folder: Path) -> None:
    files.retire(folder, None, lambda path: is_ours(f"{folder.name}/{path}"))
