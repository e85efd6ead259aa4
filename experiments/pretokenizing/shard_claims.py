"""Work shared out to processes that may be killed at any moment: a shard is done once its file is there.

A claim only saves work. Where two processes make the same shard, since a file system has no locks, they write the same bytes.
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
    number: int
    name: str  # of its file
    rows: range  # of the input


def is_ours(path: str) -> bool:
    """Whether a path below a set's folder (a folder's ends with "/") is a claim's, or that of their folder."""
    return path == f"{CLAIMS}/" or (
        path.startswith(f"{CLAIMS}/") and _CLAIM.fullmatch(path[len(CLAIMS) + 1 :]) is not None
    )


def begin(folder: Path) -> None:
    """Make room for claims. Raises InputError where something else is there."""
    with suppress(FileExistsError):
        (folder / CLAIMS).mkdir()
    with locks.folder_of(folder / CLAIMS):
        pass


def claimed(
    folder: Path, shards: Sequence[Shard], rank: int, size: int, *, wait: bool = False
) -> Iterator[tuple[Shard, Callable[[str], None]]]:
    """Shards that are still to be made, each held by this process until the function beside it is called with its checksum.

    Each rank begins with its own, then takes what others have not begun; with `wait` also what somebody holds, once it is free.
    """
    with locks.folder_of(folder / CLAIMS) as claims:
        for shard in sorted(shards, key=lambda s: (s.number % size != rank, s.number)):
            if (folder / shard.name).exists():
                continue
            lock = locks.own_file(f"{shard.number:05d}", claims, folder / CLAIMS)
            if locks.take(lock, wait) is False:
                os.close(lock)
                continue
            if (folder / shard.name).exists():  # made between the look and the lock
                os.close(lock)
                continue
            yield shard, partial(_release, lock)


def _release(lock: int, sha256: str) -> None:
    """Note the checksum of what was written, as it was in memory, and let go."""
    os.pwrite(lock, sha256.encode(), 0)
    os.close(lock)


def checksum(folder: Path, shard: Shard) -> str | None:
    """What was noted of a shard, None where nothing was."""
    with suppress(InputError):
        said = reading.text(folder / CLAIMS / f"{shard.number:05d}", 64, "a checksum")
        return said if _SHA256.fullmatch(said) else None
    return None


def forget(folder: Path) -> None:
    """Remove the claims of a set that is finished; what else lies there stays."""
    locks.remove_own(folder / CLAIMS, _CLAIM)
