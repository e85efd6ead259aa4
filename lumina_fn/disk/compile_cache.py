"""Inductor's cache of compiled graphs, which may be damaged: by a full disk, a kill, or another program in /tmp.

Inductor trusts a file by its name. Most damage makes it fail; compilation is then tried once more in an empty folder. But a truncated
or overwritten library crashes the process that loads it, or computes wrong results. So each file that a process has loaded gets a
seal, a file beside it with its SHA-256; a file that differs from its seal, or is truncated, is removed before the next process loads it.
"""

import errno
import hashlib
import logging
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir, temporary_cache_dir
from torch.fx import GraphModule

from lumina_fn.disk import files, locks, reading
from lumina_fn.errors import InputError, listed, printable

log = logging.getLogger(__name__)

SEAL = ".sha256"
LARGEST = 1 << 30  # bytes of a library or program; ours have less than one million
_FOLDER = re.compile(r"[a-z2-7]{2}|locks|precompiled_headers")
_FILE = re.compile(r"c?[a-z2-7]{40,}\.[a-z0-9.]+")  # a hash and endings: .py, .main.so, .cpp, .h.gch, .lock
_LOADED = re.compile(r"c?[a-z2-7]{40,}(\.main)?\.(so|py)")
_NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)))


def compiled(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """The graph compiled by Inductor. If that fails with the cache and succeeds without it, the cache is emptied, with a warning.

    Raises InputError if compiled code cannot be written anywhere.
    """
    place, problem = _place()
    if problem is not None:
        _say_once(f"note: the compile cache in {place} cannot be used ({problem}): what is compiled is not kept")
        return _compiled_elsewhere(graph, examples)
    _mend(place)
    kept = GraphModule(graph, deepcopy(graph.graph))  # compilation changes the graph
    try:
        # Precompiled headers are kept in the default folder.
        with config.patch(cpp_cache_precompile_headers=_problem(Path(default_cache_dir())) is None):
            made = _inductor(graph, examples)
    except Exception as error:
        made = _compiled_elsewhere(kept, examples)  # raises if the cache is not the cause
        why = str(error).strip().splitlines() or [type(error).__name__]
        discard(place)
        log.warning(
            printable(
                f"note: the compile cache in {place} was damaged or full ({why[-1]:.200}): it is emptied, and compiled anew"
            )
        )
        return made
    _seal(place)
    return made


def _inductor(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    # Its annotation covers graphs that are compiled without their weights too: what it returns for those is not callable.
    return cast("Callable[..., Any]", torch._inductor.compile(graph, [*examples]))


def discard(folder: Path) -> None:
    """Remove the files that Inductor wrote into this folder, as far as possible, and no others: the folder may be anything."""
    with suppress(OSError):
        for inner in _folders(folder):
            with suppress(OSError, InputError):
                locks.remove_own(inner, _FILE)


def _folders(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if _FOLDER.fullmatch(inner.name) and inner.is_dir() and not inner.is_symlink():
            yield inner


def _place() -> tuple[Path, str | None]:
    """The cache's folder, and the reason why it cannot be used (None: it can)."""
    try:
        folder = Path(cache_dir())
    except OSError as error:  # it cannot be created
        return Path(error.filename), error.strerror
    return folder, _problem(folder)


def _problem(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        return error.strerror
    if folder == Path(default_cache_dir()) and owner != os.geteuid():  # another user can create this name in /tmp first
        return "it is another user's"
    return None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


@cache
def _say_once(line: str) -> None:
    log.warning(printable(line))


@cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """A folder of this process, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="lumina-compiled-", ignore_cleanup_errors=True)


def _compiled_elsewhere(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    try:
        with temporary_cache_dir(_own_folder().name), config.patch(cpp_cache_precompile_headers=False):
            return _inductor(graph, examples)
    except Exception as error:
        for reason in _NO_ROOM:
            if reason in str(error):
                raise InputError(
                    f"cannot write compiled code ({reason}): set TORCHINDUCTOR_CACHE_DIR or TMPDIR to a folder with room, or --compile off"
                ) from error
        raise error from None


@cache
def _mend(place: Path) -> None:
    """Remove damaged files, with a warning, before anything is loaded."""
    removed = []
    with suppress(OSError):  # another process is emptying it
        for path in (path for inner in _folders(place) for path in inner.iterdir() if _LOADED.fullmatch(path.name)):
            if _is_damaged(path):
                with _unless_in_work(path, place / "locks") as free:
                    if free and _is_damaged(path):
                        path.unlink()
                        _seal_of(path).unlink(missing_ok=True)
                        removed.append(path.name)
    if removed:
        log.warning(
            "note: damaged in the compile cache %s, removed, and compiled anew: %s", printable(place), listed(removed)
        )


@contextmanager
def _unless_in_work(path: Path, folder: Path) -> Iterator[bool]:
    """Whether Inductor's lock of a library was taken, for the block; False if another process holds it and is writing the library."""
    with locks.folder_of(folder) as where:
        fd = locks.own_file(f"{path.name.split('.')[0]}.lock", where, folder)
        try:
            yield locks.take(fd) is not False
        finally:
            os.close(fd)


def _is_damaged(path: Path) -> bool:
    try:
        data = reading.contents(path, LARGEST)
        if _seal_of(path).exists():
            return reading.contents(_seal_of(path), 1000) != _hash(data)
    except InputError:  # it is gone, or a folder, which cannot be loaded
        return False
    return path.suffix == ".so" and _is_cut(data)


def _is_cut(library: bytes) -> bool:
    """Whether an ELF file ends before the end of its section table, the last part: the compiler was killed, or the disk was full."""
    if not library.startswith(b"\x7fELF"):
        return not library
    if len(library) < 64:
        return True
    (begin,), (size, count) = struct.unpack_from("<Q", library, 40), struct.unpack_from("<HH", library, 58)
    return begin + size * count > len(library)


def _seal(place: Path) -> None:
    """Write a seal for each file that this process has loaded successfully."""
    loaded = {module.__file__ for module in PyCodeCache.modules}
    with suppress(InputError):  # a system without it
        loaded |= set(re.findall(r"/.*\.so$", reading.text(Path("/proc/self/maps")), re.MULTILINE))
    for path in map(Path, filter(None, loaded)):
        if path.parent.parent == place and _LOADED.fullmatch(path.name) and not _seal_of(path).exists():
            with suppress(InputError):  # else it stays without a seal
                files.write_atomic(_seal_of(path), _hash(reading.contents(path, LARGEST)))


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + SEAL)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
