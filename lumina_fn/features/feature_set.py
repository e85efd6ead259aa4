"""A feature set's items, in input order; and the order and the caption drop of an epoch, as functions of their keys."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.features.parts import Parts, whole
from lumina_fn.features.shards import Feature
from lumina_fn.vocab import IGNORE, Ids, image_length, image_tokens

_PARTS = ("text", "codes")
_ORDER, _DROP = 1, 2  # purposes of a random generator, the first part of its key

Item = tuple[list[int], list[int]]  # ids and labels, equally long


def item(text: list[int], codes: Integer[np.ndarray, "h w"], ids: Ids) -> Item:
    """The ids and labels of a picture after its text: only the picture, and what follows it, is predicted."""
    image = [*image_tokens(codes.tolist(), ids), ids.sep]
    return text + image, [IGNORE] * len(text) + image


def order(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order in which an epoch visits n items, a function of (seed, epoch)."""
    keys = np.random.default_rng((_ORDER, seed, epoch)).random(
        n
    )  # unlike `permutation`, promised to stay the same stream
    return np.argsort(keys, kind="stable")


def drops_caption(probability: float, seed: int, epoch: int, index: int) -> bool:
    """Whether item `index` loses its caption in this epoch; the same in every batch and process."""
    return np.random.default_rng((_DROP, seed, epoch, index)).random() < probability


class FeatureSet(Sequence[Item]):
    """The items of a folder that `experiments.pretokenize` wrote, before caption drop, in input order; only their lengths are in memory.

    Raises InputError for a folder that is no feature set, or an incomplete one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = shards.read_index(self.folder)
        self.origin, self.largest_id = index.origin, index.largest_id  # a model must have more ids than the largest
        self._rows, self._lengths, self._entries = index.rows, index.lengths, index.entries
        self._starts = [0, *accumulate(entry.count for entry in index.entries)]
        sizes = (index.lengths[:, 0].astype(np.int64), index.lengths[:, 1].astype(np.int64) * index.lengths[:, 2])
        self._ends = [
            np.concatenate([[0], np.cumsum(n)]) for n in sizes
        ]  # of texts and of codes, end to end over all shards
        self._open: dict[int, Parts] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Item:
        text, codes = self.text_and_codes(i)
        return item(text.tolist(), codes, self.origin.ids)

    def feature(self, i: int) -> Feature:
        """Item i as its shard stores it."""
        text, codes = self.text_and_codes(i)
        return Feature(int(self._rows[i]), text.tolist(), codes)

    def text_and_codes(self, i: int) -> tuple[Int[np.ndarray, " T"], Integer[np.ndarray, "h w"]]:
        """The ids before item i's picture, and the picture's codes. Raises InputError where its shard is damaged."""
        i = range(len(self))[i]  # negative indices, IndexError
        s = bisect_right(self._starts, i) - 1
        first = self._starts[s]
        spans = (slice(int(ends[i] - ends[first]), int(ends[i + 1] - ends[first])) for ends in self._ends)
        text, codes = self._shard(s).slices(dict(zip(_PARTS, spans, strict=True)))
        if (codes.size and codes.max() >= self.origin.ids.codes) or (
            text.size and not 0 <= text.min() <= text.max() <= self.largest_id
        ):
            raise InputError(
                f"{self.folder / self._entries[s].file}: row {self._rows[i]} holds ids that its set has not: it is damaged; "
                "run experiments.pretokenize again"
            )
        return text, codes.reshape(self._lengths[i, 1:])

    def where(self, limit: int) -> str:
        """The shard and the row of the first item with an id of `limit` or larger."""
        for entry, first in zip(self._entries, self._starts, strict=False):
            for i in range(first, first + entry.count):
                if shards.largest_id(self.feature(i), self.origin.ids) >= limit:
                    return f"row {self._rows[i]} in {entry.file}"
        return "none of its rows"

    def damaged(self) -> Iterator[str]:
        """For each damaged shard, what is wrong with it. Reads every file."""
        for s in range(len(self._entries)):
            try:
                self._shard(s)
            except InputError as error:
                yield str(error)

    def unchecked(self) -> int:
        """Shards without a checksum, written by an earlier version."""
        return sum(entry.sha256 is None for entry in self._entries)

    def _shard(self, s: int) -> Parts:
        if s not in self._open:
            entry = self._entries[s]
            counts = [int(ends[self._starts[s + 1]] - ends[self._starts[s]]) for ends in self._ends]
            shard = Parts(self.folder / entry.file, entry.sha256)
            with whole(shard.path):
                if [shard.count(name) for name in _PARTS] != counts:
                    raise ValueError("its items are not the index's")
            self._open[s] = shard
        return self._open[s]

    def row(self, i: int) -> int:
        """The row of the dataset that item i was made of."""
        return int(self._rows[i])

    def text_lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens before the picture of every item."""
        return self._lengths[:, 0].astype(np.int64)

    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of every item."""
        text, h, w = self._lengths.astype(np.int64).T
        return text + image_length(h, w) + 1
