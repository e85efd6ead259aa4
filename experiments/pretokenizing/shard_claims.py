"""Shards divided among processes that may be killed at any moment: a shard is done once its file exists.

A claim only avoids double work. If a file system has no locks and two processes make the same shard, they write the same bytes.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lumina_fn.disk import locks, reading
from lumina_fn.errors import InputError

CLAIMS = ".claims"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLAIM = re.compile(r"\d{5,}", re.ASCII)


class Shard(NamedTuple):
    """A part of a feature set: some rows of the input, in one file."""

    number: int
    name: str  # of its file
    rows: range  # of the input


def is_ours(path: str) -> bool:
    """Whether this path below a set's folder (a folder's path ends with "/") is a claim, or the folder of claims."""
    return path == f"{CLAIMS}/" or (
        path.startswith(f"{CLAIMS}/") and _CLAIM.fullmatch(path[len(CLAIMS) + 1 :]) is not None
    )


def begin(folder: Path) -> None:
    """Make the folder of claims. Raises InputError if something else is there."""
    with suppress(FileExistsError):
        (folder / CLAIMS).mkdir()
    with locks.folder_of(folder / CLAIMS):
        pass


def claimed(
    folder: Path, shards: Sequence[Shard], rank: int, size: int, *, wait: bool = False
) -> Iterator[tuple[Shard, Callable[[str], None]]]:
    """Shards that are not made yet, each locked by this process until the function beside it is called with the shard's checksum.

    Each rank begins with its own shards, then takes those that others have not begun; with `wait` it also waits for locked ones.
    """
    with locks.folder_of(folder / CLAIMS) as claims:
        for shard in sorted(shards, key=lambda s: (s.number % size != rank, s.number)):
            if (folder / shard.name).exists():
                continue
            lock = locks.own_file(f"{shard.number:05d}", claims, folder / CLAIMS)
            if locks.take(lock, wait) is False:
                os.close(lock)
                continue
            if (folder / shard.name).exists():  # made between the check and the lock
                os.close(lock)
                continue
            yield shard, partial(_release, lock)


def _release(lock: int, sha256: str) -> None:
    """Record the checksum of the shard, computed in memory, and release the lock."""
    os.pwrite(lock, sha256.encode(), 0)
    os.close(lock)


def checksum(folder: Path, shard: Shard) -> str | None:
    """The recorded checksum of a shard; None if there is none."""
    with suppress(InputError):
        said = reading.text(folder / CLAIMS / f"{shard.number:05d}", 64, "a checksum")
        return said if _SHA256.fullmatch(said) else None
    return None


def forget(folder: Path) -> None:
    """Remove the claims of a finished set; other files stay."""
    locks.remove_own(folder / CLAIMS, _CLAIM)
