"""Work shared out to processes that may be killed at any moment: a shard is done once its file is there.

A claim only saves work. Where two processes make the same shard, since a file system has no locks, they write the same bytes.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

CLAIMS = ".claims"


class Shard(NamedTuple):
    number: int
    name: str  # of its file
    rows: range  # of the input


def claimed(
    folder: Path, shards: Sequence[Shard], rank: int, size: int, *, wait: bool = False
) -> Iterator[tuple[Shard, Callable[[], None]]]:
    """Shards that are still to be made, each held by this process until the function beside it is called.

    Each rank begins with its own, then takes what others have not begun; with `wait` also what somebody holds, once it is free.
    """
    for shard in sorted(shards, key=lambda s: (s.number % size != rank, s.number)):
        if (folder / shard.name).exists():
            continue
        lock = os.open(folder / CLAIMS / f"{shard.number:05d}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:  # this file system has no locks
            pass
        if (folder / shard.name).exists():  # made between the look and the lock
            os.close(lock)
            continue
        yield shard, lambda lock=lock: os.close(lock)


def forget(folder: Path) -> None:
    """Remove the claims of a set that is finished."""
    for path in list((folder / CLAIMS).iterdir()):
        path.unlink()
    with suppress(OSError):
        (folder / CLAIMS).rmdir()
