"""Results that appear whole or not at all: written beside their place, synced to the disk, moved there by one rename."""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lumina_fn.errors import InputError

_MARK = ".lumina-tmp-"  # in the names of unfinished folders; their writer holds an flock on them while it lives
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of Linux's renameat2


@contextmanager
def new_folder(dst: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `dst` when the block ends, and vanishes when it raises.

    An existing `dst` is an InputError unless `overwrite`; it then stays whole until the new one takes its place in one step.
    What a killed run left behind is removed by the next one with the same `dst`.
    """
    dst = place(dst)
    with writable(dst):
        _check_free(dst, overwrite)
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(dst)
        tmp, lock = _locked_sibling(dst)
    try:
        with _full_disk_said(dst):
            yield tmp
        with writable(dst):
            sync(tmp)
            take_place(tmp, dst, overwrite)
        sync_one(dst.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        os.close(lock)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that at every moment its old or its new content is there, whatever is killed."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}{_MARK}{secrets.token_hex(4)}")
    with writable(path):
        try:
            with tmp.open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)
        sync_one(path.absolute().parent)


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder is what one of these functions was writing when it was killed, or is writing still."""
    return path.name.startswith(".") and _MARK in path.name


def sync(folder: Path) -> None:
    """Force every file under `folder`, and the folders themselves, onto the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_one(Path(root, name))
        sync_one(Path(root))


def sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def place(dst: str | Path, inputs: Iterable[Path] = ()) -> Path:
    """The absolute path of a folder that is to be written; InputError for a link, and for one that holds an input of the run."""
    with writable(dst):
        if Path(dst).is_symlink():
            raise InputError(f"{dst} is a link: name the folder itself, or remove the link")
        place = Path(os.path.realpath(dst))
        for path in inputs:
            if Path(os.path.realpath(path)).is_relative_to(place):
                raise InputError(f"{dst} holds {path}, which this run reads: give another place")
    return place


def _check_free(dst: Path, overwrite: bool) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise InputError(f"{dst} is a file, a new folder is to be written there: give another place")
    if not overwrite:
        raise InputError(f"{dst} exists: give a new place, or --overwrite to replace it")
    if Path.cwd().is_relative_to(dst):
        raise InputError(f"{dst} holds the current folder: it cannot be replaced from inside, give another place")


@contextmanager
def writable(dst: str | Path) -> Iterator[None]:
    """An OSError of the block, such as a full disk, is an InputError that names `dst`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {dst}: {error.strerror or error}; give a place that can be written") from error


@contextmanager
def _full_disk_said(dst: Path) -> Iterator[None]:
    """Only that: any other OSError of a foreign block may come from what it reads."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"cannot write {dst}: {error.strerror}; give a place on a larger disk") from error


def _locked_sibling(dst: Path) -> tuple[Path, int]:
    while True:
        tmp = dst.with_name(f".{dst.name}{_MARK}{secrets.token_hex(4)}")
        tmp.mkdir()
        with suppress(FileNotFoundError):  # another run took the fresh, not yet locked folder for a stale one
            lock = os.open(tmp, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if tmp.exists():
                return tmp, lock
            os.close(lock)


def _remove_stale(dst: Path) -> None:
    prefix = f".{dst.name}{_MARK}"
    for path in [p for p in dst.parent.iterdir() if p.name.startswith(prefix) and p.is_dir() and not p.is_symlink()]:
        with suppress(FileNotFoundError, BlockingIOError):  # gone already, or its writer lives
            fd = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def take_place(tmp: Path, dst: Path, overwrite: bool) -> None:
    """One rename; with `overwrite` an exchange, so that `tmp` then names the old folder."""
    exchange = overwrite and dst.exists()
    if _renameat2(tmp, dst, _EXCHANGE if exchange else _NOREPLACE):
        return
    if exchange:  # this system cannot exchange: there is a moment without `dst`, but never one without both folders
        old = dst.with_name(f".{dst.name}{_MARK}{secrets.token_hex(4)}")
        dst.rename(old)
        tmp.rename(dst)
        shutil.rmtree(old, ignore_errors=True)
    else:
        tmp.rename(dst)


def _renameat2(src: Path, dst: Path, flags: int) -> bool:
    """Linux's rename with flags; False where this system or file system has none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):  # no such call, or the file system does not know the flag
        return False
    if code == errno.EEXIST:
        raise InputError(f"{dst} was written by another run meanwhile: give a new place, or --overwrite to replace it")
    raise OSError(code, os.strerror(code), str(dst))
