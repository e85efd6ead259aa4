"""Which items a step sees: a function of (seed, step) alone, shared out to ranks."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Int

from lumina_fn import data
from lumina_fn.loss import Batch
from lumina_fn.vocab import IGNORE, PAD


def steps_per_epoch(n: int, batch: int, last: Literal["partial", "drop"]) -> int:
    """How many steps visit n items once; `drop` leaves out the last n % batch of an epoch's order."""
    return n // batch if last == "drop" else -(-n // batch)


def items_of(
    step: int, n: int, batch: int, *, seed: int, last: Literal["partial", "drop"]
) -> tuple[int, Int[np.ndarray, " S"]]:
    """The epoch that a step (from 0) falls into, and its items: `batch` of them, fewer in a partial last step."""
    epoch, k = divmod(step, steps_per_epoch(n, batch, last))
    return epoch, _order(n, seed, epoch)[k * batch : (k + 1) * batch]


_order = lru_cache(maxsize=2)(data.order)


def bucket(length: int) -> int:
    """The padded length of an item: at most 1/8 longer, so that few shapes are compiled."""
    multiple = max(32, 2 ** (length.bit_length() - 1) // 8)
    return -(-length // multiple) * multiple


def micro_batches(items: Sequence[data.Item], size: int, max_positions: int, count: int | None = None) -> Batch:
    """[A size T]: items in A micro batches, filled up with rows that predict nothing; `count` makes A larger than they need."""
    count = -(-len(items) // size) if count is None else count
    rows = [*items, *[([PAD], [IGNORE])] * (count * size - len(items))]
    length = bucket(min(max(len(ids) for ids, _ in rows), max_positions))
    flat = data.batch(rows, max_positions=max_positions, multiple=length)
    return Batch(*(x.unflatten(0, (count, size)) for x in flat))


def training_batches(
    features: data.FeatureSet, steps: range, *, batch: int, micro_batch: int, max_positions: int, end: int,
    seed: int, caption_drop: float, last: Literal["partial", "drop"], rank: int = 0, size: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """A rank's shares [A micro_batch T] of these steps' batches, which are the same on any number of ranks; so is A on each."""
    for step in steps:
        epoch, indices = items_of(step, len(features), batch, seed=seed, last=last)
        items = []
        for i in map(int, indices[rank::size]):
            ids, labels = features[i]
            dropped = data.drops_caption(caption_drop, seed, epoch, i)
            items.append(data.drop_caption(ids, labels, end) if dropped else (ids, labels))
        largest = -(-len(indices) // size)  # of the shares
        yield micro_batches(items, micro_batch, max_positions, count=-(-largest // micro_batch))
