"""One writer at a time, by locks that the kernel releases when their holder ends; and our own small files in shared folders.

A file system without such locks (some NFS, some FUSE) is used without them, with one warning per path.
"""

import errno
import fcntl
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lumina_fn.errors import InputError

log = logging.getLogger(__name__)

LONGEST_PID = 20  # characters
# EBADF: NFS locks only files open for writing, and a folder cannot be opened so.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


def take(fd: int, wait: bool = False) -> bool | None:
    """Lock an open file or folder for this process, until the descriptor is closed.

    True if it was taken; False if another process holds it (with `wait` it waits instead); None if the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return None
    return True


def own_file(name: str, folder: int, where: Path) -> int:
    """A descriptor of a small file of ours, created if missing. Raises InputError for a link, or a file that is not ours alone.

    `folder` is the descriptor of the folder `where`: the file is created in it even if its path changes meanwhile.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, 0o644, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise InputError(
            f"{where / name} is a link, a folder or a pipe, where a file of our own is kept: remove it"
        ) from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise InputError(f"{where / name} is another file too (a hard link), or none: remove it")
    return fd


@contextmanager
def folder_of(path: Path) -> Iterator[int]:
    """A descriptor of a folder, for the block. Raises InputError for a link or anything but a folder."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise InputError(f"{path} is a link or a file, where a folder of our own is kept: remove it") from error
    try:
        yield fd
    finally:
        os.close(fd)


def remove_own(folder: Path, name: re.Pattern[str]) -> None:
    """Remove regular files and empty folders whose names match from a folder of ours, and the folder itself if it is then empty."""
    with folder_of(folder) as fd, os.scandir(fd) as entries:
        for entry in list(entries):
            if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=fd)
            elif name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # it is not empty
                    os.rmdir(entry.name, dir_fd=fd)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def one_writer(out: Path) -> Iterator[None]:
    """Within the block only this process writes OUT. Raises InputError, which names the other process that does.

    The lock is a file beside OUT, `.NAME.lock`, since OUT may not exist yet; `held_folder` locks OUT too, in case somebody
    deletes such files.
    """
    name = f".{out.name}.lock"  # the root folder has no name, and is never writable as a result
    with folder_of(out.parent) as parent:
        while True:
            fd = own_file(name, parent, out.parent)
            try:
                free = take(fd)
                if free is False:
                    raise InputError(f"{out} is being written by process {_pid(fd)}: wait for it or stop it")
                if free is None:
                    log.warning("note: %s has no locks: see that no second run writes %s", out.parent, out)
                if not _is_there(fd, name, parent):  # removed between opening and locking
                    continue
                said = os.pread(fd, LONGEST_PID + 1, 0)
                if said and (len(said) > LONGEST_PID or not said.strip().isdigit()):
                    raise InputError(f"{out.parent / name} is no lock of ours, which would have that name: remove it")
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                yield
                return
            finally:
                os.close(fd)


@contextmanager
def held_folder(out: Path) -> Iterator[None]:
    """Within the block the folder OUT itself is locked. Raises InputError if another process holds the lock."""
    with folder_of(out) as fd:
        if take(fd) is False:
            raise InputError(f"{out} is being written by another process: wait for it or stop it")
        yield


def _pid(fd: int) -> str:
    said = os.pread(fd, 20, 0).strip()
    return said.decode() if said.isdigit() else "(unknown)"


def _is_there(fd: int, name: str, folder: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    return False
