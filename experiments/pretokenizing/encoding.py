"""Rows to shards: while the device encodes, other threads read and crop pictures, stack them, and write shards."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from experiments.pretokenizing.shard_claims import Shard
from lumina_fn import as_seen, images
from lumina_fn.features.shards import Feature, Rejected
from lumina_fn.rows.row import Item

WINDOW = 16  # batches read ahead, to find pictures of equal size
A, B = TypeVar("A"), TypeVar("B")

Encode = Callable[[Float[Tensor, "B 3 H W"]], Int[np.ndarray, "B h w"]]


class Prepared(NamedTuple):
    """A row whose picture is cropped and not encoded yet."""

    row: int
    text: list[int]
    image: Image.Image
    source: tuple[int, int]
    sha256: bytes
    notes: frozenset[str]  # of `as_seen.NOTES`


class Tally(NamedTuple):
    """The rows and the time of `encode_shards`."""

    rows: int
    busy: float  # seconds in which the device encoded
    wall: float  # seconds from the first row to the last shard


def ahead(pool: Executor, fn: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """fn of each item, in order; the pool computes up to `depth` results ahead."""
    queue: deque[Future[B]] = deque()
    for item in items:
        queue.append(pool.submit(fn, item))
        if len(queue) > depth:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


class Work(NamedTuple):
    """The functions for a row, for a batch of pictures, and for a whole shard."""

    items: Callable[[range], Iterator[Item]]  # the rows of a shard, in order
    prepare: Callable[[int, Item], Prepared | Rejected]  # a row, and its number
    encode: Encode
    write: Callable[[Shard, list[Feature], list[Rejected]], str]  # returns the file's checksum


def encode_shards(
    claimed: Iterator[tuple[Shard, Callable[[str], None]]],
    work: Work,
    *,
    batch: int,
    workers: int,
    progress: Callable[[int], None],
) -> Tally:
    """Make every claimed shard. Calls `progress` with the number of rows done, and a claim's function with the checksum of its shard.

    Pictures of equal size among WINDOW batches of a shard's rows are encoded together, so that batches depend on the shard alone.
    """
    begin, busy, rows, open_shards = time.perf_counter(), 0.0, 0, deque()

    def all_rows() -> Iterator[tuple[int, Item]]:
        for shard, release in claimed:
            open_shards.append((shard, release))
            yield from zip(shard.rows, work.items(shard.rows), strict=True)

    with ExitStack() as stack:
        pool = lambda threads: stack.enter_context(ThreadPoolExecutor(threads))
        readers, stacker, writer = pool(workers), pool(1), pool(1)
        prepared = ahead(readers, lambda numbered: work.prepare(*numbered), all_rows(), WINDOW * batch)
        writing: deque[Future[None]] = deque()
        while first := next(prepared, None):
            shard, release = open_shards.popleft()
            of_shard = chain([first], islice(prepared, len(shard.rows) - 1))
            features: list[Feature] = []
            rejected: list[Rejected] = []
            while window := list(islice(of_shard, WINDOW * batch)):
                good = [p for p in window if isinstance(p, Prepared)]
                rejected += [p for p in window if isinstance(p, Rejected)]
                codes: dict[int, np.ndarray] = {}
                for part, tensor in ahead(stacker, _stack, _groups(good, batch), 1):
                    start = time.perf_counter()
                    codes |= {p.row: c for p, c in zip(part, work.encode(tensor), strict=True)}
                    busy += time.perf_counter() - start
                features += [
                    Feature(p.row, p.text, codes[p.row], p.sha256, p.source, as_seen.bits(p.notes)) for p in good
                ]
                rows += len(window)
                progress(len(window))
            writing.append(writer.submit(_written, work.write, shard, features, rejected, release))
            while len(writing) > 1:  # at most one shard waits to be written
                writing.popleft().result()
        for future in writing:
            future.result()
    return Tally(rows, busy, time.perf_counter() - begin)


def _written(write: Callable, shard: Shard, features: list, rejected: list, release: Callable[[str], None]) -> None:
    release(write(shard, features, rejected))


def _groups(prepared: Sequence[Prepared], batch: int) -> Iterator[list[Prepared]]:
    """Pictures of equal size, at most `batch` at a time."""
    by_size: dict[tuple[int, int], list[Prepared]] = {}
    for p in prepared:
        by_size.setdefault(p.image.size, []).append(p)
    for same in by_size.values():
        yield from (same[i : i + batch] for i in range(0, len(same), batch))


def _stack(part: list[Prepared]) -> tuple[list[Prepared], Float[Tensor, "B 3 H W"]]:
    return part, torch.stack([images.to_tensor(p.image) for p in part])
