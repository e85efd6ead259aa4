"""The batch of a step, a function of (seed, step) alone, divided among ranks, in rows of one item or several."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from lumina_fn.features import rows
from lumina_fn.features.mixing import Mixture, Visits
from lumina_fn.features.packing import first_fit_decreasing, packed
from lumina_fn.features.rows import Document
from lumina_fn.loss import Batch, Packed
from lumina_fn.vocab import IGNORE, PAD, Ids

WINDOW = 64  # batches among which clustered items are sorted by length
_CLUSTER = 3  # purpose of a random generator, beside 1 and 2 in data.py


class Share(NamedTuple):
    """The batch of one rank in a step."""

    batch: Batch | Packed  # [A B T]
    tokens: int  # tokens of its items, without padding


def steps_of(
    mixture: Mixture, *, batch: int, seed: int, last: Literal["partial", "drop"], order: Literal["shuffled", "clustered"]
) -> Callable[[int], Visits]:  # fmt: skip
    """The items of a step (from 0): `batch` of them, fewer in an epoch's partial last step.

    Clustered: the shuffled order is split into windows of 64 batches; each window is sorted by length and cut into batches, which are
    shuffled, so that a batch's items are about equally long. Items that fill no batch come last.
    """
    per_epoch = mixture.steps_per_epoch(batch, last)

    def places(first: int, stop: int) -> range:
        end = stop * batch if per_epoch is None else min(stop, per_epoch) * batch
        return range(first * batch, end if per_epoch is None else min(end, len(mixture)))

    @lru_cache(maxsize=2)
    def window(epoch: int, w: int) -> Visits:
        visits = mixture.visits(epoch, places(w * WINDOW, (w + 1) * WINDOW), seed)
        full = len(visits.indices) // batch
        by_length = np.argsort(mixture.lengths_of(visits)[: full * batch], kind="stable").reshape(full, batch)
        keys = np.random.default_rng((_CLUSTER, seed, epoch, w)).random(full)
        shuffled = by_length[np.argsort(keys, kind="stable")].ravel()
        return visits.at(np.append(shuffled, np.arange(full * batch, len(visits.indices))))

    def items_of(step: int) -> Visits:
        epoch, k = (0, step) if per_epoch is None else divmod(step, per_epoch)
        if order == "shuffled":
            return mixture.visits(epoch, places(k, k + 1), seed)
        w, j = divmod(k, WINDOW)
        return window(epoch, w).at(slice(j * batch, (j + 1) * batch))

    return items_of


def bucket(length: int) -> int:
    """The padded length of an item: at most 1/8 longer, so that few shapes are compiled."""
    multiple = max(32, 2 ** (length.bit_length() - 1) // 8)
    return -(-length // multiple) * multiple


def micro_batches(items: Sequence[Document], size: int, max_positions: int, ids: Ids, count: int) -> Share:
    """The batch [count size T]: a row for each item in micro batches of `size`, filled up with rows that predict nothing."""
    length = min(bucket(max(map(rows.length, items), default=1)), max_positions)
    tokens = np.full((count * size, length), PAD)
    labels = np.full((count * size, length), IGNORE)
    total = sum(rows.write(item, tokens[row], labels[row], ids) for row, item in enumerate(items))
    return Share(Batch(*(torch.from_numpy(x).unflatten(0, (count, size)) for x in (tokens, labels))), total)


class Batching(NamedTuple):
    """How items become batches."""

    batch: int  # items of a step, over all ranks
    micro_batch: int  # items (with `pack`, rows) of a forward and backward of a rank
    max_positions: int  # tokens of a row at the most
    seed: int  # of the order and of the caption drop
    caption_drop: float  # probability that an item loses its caption
    last: Literal["partial", "drop"]  # what becomes of an epoch's last, smaller batch
    order: Literal["shuffled", "clustered"] = "shuffled"
    pack: int | None = None  # tokens of a row that several items share


def training_batches(mixture: Mixture, steps: range, how: Batching, *, rank: int = 0, size: int = 1) -> Iterator[Share]:
    """A rank's shares of these steps' batches, which are the same on any number of ranks, as is A, the number of micro batches.

    pack    length in tokens of rows that several items share, at most max_positions; micro batches consist of such rows. A step with
            a longer item has rows as long as that item, cut to max_positions: the loss stays that of one item a row. Items are
            assigned to rows by their lengths with captions, which are known without reading them.
    """
    ids, items_of = (
        mixture.sets[0].origin.ids,
        steps_of(mixture, batch=how.batch, seed=how.seed, last=how.last, order=how.order),
    )

    def read(visits: Visits) -> list[Document]:
        return [
            rows.document(feature, dropped, ids)
            for feature, dropped in mixture.read(visits, how.seed, how.caption_drop)
        ]

    # Ranks with fewer items get micro batches of filler rows.
    count = lambda n: -(-n // (size * how.micro_batch))
    for step in steps:
        visits = items_of(step)
        if how.pack is None:
            own = read(visits.at(slice(rank, None, size)))
            yield micro_batches(own, how.micro_batch, how.max_positions, ids, count(len(visits.indices)))
        else:
            lengths = np.minimum(mixture.lengths_of(visits), how.max_positions)
            room = max(how.pack, int(lengths.max(initial=0)))
            together = first_fit_decreasing(lengths, room)
            own = [read(visits.at(np.array(row))) for row in together[rank::size]]
            yield Share(*packed(own, how.micro_batch, room, ids, count(len(together))))
