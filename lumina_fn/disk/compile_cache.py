"""Inductor's cache of compiled graphs, which may be damaged: by a full disk, a kill, or whoever else writes to /tmp.

Inductor trusts what is there by its name. Most damage makes it fail, and it is tried once more in an empty folder. But a library that
was cut or overwritten ends the process that loads it, or computes something else: whatever a process has loaded gets a seal
beside it, its SHA-256, and what is not as its seal says, or is cut short, is removed before the next process loads it.
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
from typing import Any

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
    """`torch._inductor.compile`. Where it fails and, without what lies in the cache, does not, the cache is emptied and that is said.

    InputError where compiled code can be written nowhere.
    """
    place, problem = _place()
    if problem is not None:
        _say_once(f"note: the compile cache in {place} cannot be used ({problem}): what is compiled is not kept")
        return _compiled_elsewhere(graph, examples)
    _mend(place)
    kept = GraphModule(graph, deepcopy(graph.graph))  # compiling rewrites the graph
    try:
        with config.patch(cpp_cache_precompile_headers=_problem(Path(default_cache_dir())) is None):  # they lie there
            made = torch._inductor.compile(graph, examples)
    except Exception as error:
        made = _compiled_elsewhere(kept, examples)  # or this is not the cache's fault
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


def discard(folder: Path) -> None:
    """Remove what Inductor wrote into its cache's folder, as far as it can be removed, and nothing else: it may be any folder."""
    with suppress(OSError):
        for inner in _folders(folder):
            with suppress(OSError, InputError):
                locks.remove_own(inner, _FILE)


def _folders(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if _FOLDER.fullmatch(inner.name) and inner.is_dir() and not inner.is_symlink():
            yield inner


def _place() -> tuple[Path, str | None]:
    """The cache's folder, and why it cannot be used; None where it can."""
    try:
        folder = Path(cache_dir())
    except OSError as error:  # it cannot be made there
        return Path(error.filename), error.strerror
    return folder, _problem(folder)


def _problem(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        return error.strerror
    if folder == Path(default_cache_dir()) and owner != os.geteuid():  # a name in /tmp that anybody may take first
        return "it is another user's"
    return None if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


@cache
def _say_once(line: str) -> None:
    log.warning(printable(line))


@cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """This process's own, for as long as it lives."""
    return tempfile.TemporaryDirectory(prefix="lumina-compiled-", ignore_cleanup_errors=True)


def _compiled_elsewhere(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    try:
        with temporary_cache_dir(_own_folder().name), config.patch(cpp_cache_precompile_headers=False):
            return torch._inductor.compile(graph, examples)
    except Exception as error:
        for reason in _NO_ROOM:
            if reason in str(error):
                raise InputError(
                    f"cannot write compiled code ({reason}): set TORCHINDUCTOR_CACHE_DIR or TMPDIR to a folder with room, or --compile off"
                ) from error
        raise error from None


@cache
def _mend(place: Path) -> None:
    """Remove what must not be loaded, and say so."""
    removed = []
    with suppress(OSError):  # another process empties it
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
    """Inductor's own lock of a library is held; False where another process has it, which is writing the library."""
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
    except InputError:  # it is gone, or a folder, which nobody can load
        return False
    return path.suffix == ".so" and _is_cut(data)


def _is_cut(library: bytes) -> bool:
    """Whether an ELF file ends before its table of sections, the last thing in it: its compiler was killed, or the disk full."""
    if not library.startswith(b"\x7fELF"):
        return not library
    if len(library) < 64:
        return True
    (begin,), (size, count) = struct.unpack_from("<Q", library, 40), struct.unpack_from("<HH", library, 58)
    return begin + size * count > len(library)


def _seal(place: Path) -> None:
    """Seal what this process has loaded, since it works."""
    loaded = {module.__file__ for module in PyCodeCache.modules}
    with suppress(InputError):  # a system without it
        loaded |= set(re.findall(r"/.*\.so$", reading.text(Path("/proc/self/maps")), re.MULTILINE))
    for path in map(Path, filter(None, loaded)):
        if path.parent.parent == place and _LOADED.fullmatch(path.name) and not _seal_of(path).exists():
            with suppress(InputError):  # or it is loaded without a seal
                files.write_atomic(_seal_of(path), _hash(reading.contents(path, LARGEST)))


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + SEAL)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
