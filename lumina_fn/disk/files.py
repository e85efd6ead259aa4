"""Results that appear complete or not at all: written beside their destination, synced to the disk, moved by one rename.

Only a result with this project's mark (see marks) is replaced, and it stays until the new one is complete: if a process is killed
between two renames, the next process with the same destination restores the old result.
"""

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lumina_fn.disk import locks, marks
from lumina_fn.disk.places import place, writable
from lumina_fn.errors import InputError

log = logging.getLogger(__name__)

_TMP = ".lumina-tmp-"  # in names of unfinished results; the writer of a folder holds a lock on it
_OLD = ".lumina-old-"  # in the name of a folder that was moved aside for a new one
_UNFINISHED = re.compile(r"\..+\.lumina-(tmp|old)-[0-9a-f]+", re.DOTALL)
DAY = 24 * 3600  # seconds, after which an unfinished folder counts as abandoned if the file system has no locks
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of Linux's renameat2


@contextmanager
def new_folder(dst: str | Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, which becomes `dst` when the block ends and is removed if it raises.

    Raises InputError for an existing `dst`, unless `overwrite` is set and it is a result of the same kind that holds no other files;
    it then stays complete until the new folder replaces it in one step. Remains of a killed run are removed by the next run with
    the same `dst`.
    """
    dst = place(dst)
    with writable(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        recover(dst)
        _check_free(dst, kind, overwrite)
    with _filled(dst, kind, overwrite) as tmp:
        yield tmp


@contextmanager
def renewed_folder(dst: str | Path, kind: str) -> Iterator[Path]:
    """`new_folder` for a subfolder of a run: replaces the files that an earlier part of the run wrote, and keeps all other files in it."""
    dst = place(dst)
    with writable(dst):
        recover(dst)
    with _filled(dst, kind, True) as tmp:
        yield tmp


@contextmanager
def _filled(dst: Path, kind: str, overwrite: bool) -> Iterator[Path]:
    with writable(dst):
        tmp, lock = _locked_sibling(dst)
    placed = False
    try:
        with _full_disk_said(dst):
            yield tmp
        with writable(dst):
            write_atomic(tmp / marks.NAME, marks.text(kind, marks.listed(tmp)))
            sync(tmp)
            replaced = overwrite and dst.exists()
            if replaced and marks.read(dst) is None:  # of a version without marks: names in both are ours
                again = set(marks.listed(dst)) & set(marks.listed(tmp))
                write_atomic(dst / marks.NAME, marks.text(kind, sorted(again)))
            take_place(tmp, dst, overwrite)
            placed = True
            sync_one(dst.parent)
            if replaced:
                retire(tmp, dst)
    finally:
        if not placed:
            shutil.rmtree(tmp, ignore_errors=True)
        os.close(lock)


def retire(old: Path, new: Path | None, ours: marks.Ours = lambda path: False) -> None:
    """Remove a replaced folder: our files are deleted, other files move into `new` if their names are free there."""
    found = marks.sort_out(old, ours)
    for path in found.strangers:
        target = None if new is None else new / path
        if target is None or os.path.lexists(target):
            log.warning("note: %s was not written by lumina and stays in %s", path, old)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        (old / path).rename(target)
    if marks.sort_out(old, ours).strangers:
        found = found._replace(ours=[path for path in found.ours if path != marks.NAME])
    _remove(old, found.ours)
    _remove(old.parent, [f"{old.name}/"])


def write_atomic(path: str | Path, data: bytes | str | Iterable[str]) -> None:
    """Write a file atomically: at every moment it has its complete old or new content, even if the process is killed.

    A text may come in parts, of which one at a time is in memory.
    """
    path = Path(path)
    parts = [data] if isinstance(data, bytes | str) else data
    tmp = path.with_name(f".{path.name}{_TMP}{secrets.token_hex(4)}")
    with writable(path):
        try:
            with tmp.open("xb") as file:
                for part in parts:
                    file.write(part.encode() if isinstance(part, str) else part)
                file.flush()
                os.fsync(file.fileno())
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)
        sync_one(path.absolute().parent)


def append(path: Path, text: str) -> None:
    """Append text to a file of ours, which is created if missing. Raises InputError for a link and for a file that is shared (hard links)."""
    with writable(path), locks.folder_of(path.parent) as folder:
        fd = locks.own_file(path.name, folder, path.parent)
        with os.fdopen(fd, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(text.encode())


def is_unfinished(path: Path) -> bool:
    """Whether a name is that of an unfinished result of these functions, abandoned or still being written."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(folder: Path) -> None:
    """Clean a folder that no other process writes: unfinished files of killed runs are removed, a folder that was moved aside is restored."""
    for path in [path for path in folder.iterdir() if is_unfinished(path)]:
        if path.is_dir() and not path.is_symlink():
            recover(folder / re.split(r"\.lumina-(?:tmp|old)-", path.name[1:])[0])
        elif path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def empty(folder: Path, ours: marks.Ours) -> None:
    """Remove our files from a folder; the folder and other files stay."""
    _remove(folder, marks.sort_out(folder, ours).ours)


def _remove(folder: Path, paths: list[str]) -> None:
    """Remove these files, and these folders if empty; names that no longer exist are ignored."""
    for path in paths:
        try:
            (folder / path).rmdir() if path.endswith("/") else (folder / path).unlink()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def sync(folder: Path) -> None:
    """Force every file under `folder`, and the folders themselves, onto the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_one(Path(root, name))
        sync_one(Path(root))


def sync_one(path: Path) -> None:
    """Force one file, or one folder without its content, onto the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_free(dst: Path, kind: str, overwrite: bool) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise InputError(f"{dst} is a file, a new folder is to be written there: give another place")
    if not overwrite:
        raise InputError(f"{dst} exists: give a new place, or --overwrite to replace it")
    if Path.cwd().is_relative_to(dst):
        raise InputError(f"{dst} holds the current folder: it cannot be replaced from inside, give another place")
    marks.check(dst, kind)


@contextmanager
def _full_disk_said(dst: Path) -> Iterator[None]:
    """Within the block a full disk is an InputError; other OSErrors may come from what the block reads, and pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"cannot write {dst}: {error.strerror}; give a place on a larger disk") from error


def _locked_sibling(dst: Path) -> tuple[Path, int]:
    while True:
        tmp = dst.with_name(f".{dst.name}{_TMP}{secrets.token_hex(4)}")
        tmp.mkdir()
        with suppress(FileNotFoundError):  # another run removed the new, not yet locked folder as abandoned
            fd = os.open(tmp, os.O_RDONLY | os.O_CLOEXEC)
            if locks.take(fd) is not False and tmp.exists():
                return tmp, fd
            os.close(fd)


def recover(dst: Path) -> None:
    """Clean up after killed runs beside `dst`: an old result that was moved aside is restored if `dst` is missing, the rest is removed."""
    moved, unfinished = f".{dst.name}{_OLD}", f".{dst.name}{_TMP}"
    found = [path for path in dst.parent.iterdir() if is_unfinished(path) and path.name.startswith((moved, unfinished))]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    for path in sorted(found, key=lambda path: not path.name.startswith(moved)):  # restore the old result first
        with suppress(FileNotFoundError), locks.folder_of(path) as fd:
            free = locks.take(fd)
            if free is False:
                continue
            if path.name.startswith(moved) and not os.path.lexists(dst):
                take_place(path, dst, overwrite=False)
                sync_one(dst.parent)
            elif free or time.time() - os.fstat(fd).st_mtime > DAY:
                if marks.read(path) is None:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    retire(path, dst if dst.is_dir() else None)


def take_place(tmp: Path, dst: Path, overwrite: bool) -> None:
    """Move `tmp` to `dst` by one rename; with `overwrite` exchange them, so that `tmp` then names the old folder."""
    exchange = overwrite and dst.exists()
    if _renameat2(tmp, dst, _EXCHANGE if exchange else _NOREPLACE):
        return
    if not exchange:
        tmp.rename(dst)
        return
    # This system cannot exchange: `dst` is missing for a moment; if the process is killed then, `recover` restores the old folder.
    old = dst.with_name(f".{dst.name}{_OLD}{secrets.token_hex(4)}")
    fd = os.open(dst, os.O_RDONLY | os.O_CLOEXEC)
    try:
        locks.take(fd)
        dst.rename(old)
        tmp.rename(dst)
        sync_one(dst.parent)
        old.rename(tmp)
    finally:
        os.close(fd)


def _renameat2(src: Path, dst: Path, flags: int) -> bool:
    """Linux's rename with flags; False if the system or the file system does not support it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):  # no such system call, or no support by the file system
        return False
    if code == errno.EEXIST:
        raise InputError(f"{dst} was written by another run meanwhile: give a new place, or --overwrite to replace it")
    raise OSError(code, os.strerror(code), str(dst))
