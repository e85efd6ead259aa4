"""One stream of items from several feature sets; the item at any position is computed without those before it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from lumina_fn.features import shards
from lumina_fn.features.feature_set import FeatureSet, drops_caption, order


class Visits(NamedTuple):
    """Items in the order of a stream."""

    sets: Int[np.ndarray, " S"]
    epochs: Int[np.ndarray, " S"]  # epoch of each item's set
    indices: Int[np.ndarray, " S"]  # index in its set

    def at(self, where: slice | Int[np.ndarray, " _"]) -> "Visits":
        """The visits at these positions."""
        return Visits(*(x[where] for x in self))


@dataclass(frozen=True)
class Mixture:
    """Several feature sets as one. Without weights an epoch visits all items of all sets once; with weights each set has its own epochs.

    With weights the stream has no epochs and no end. A weight is a set's share of the items: after any number of items each set's
    count differs from its share by at most the number of sets.
    """

    sets: tuple[FeatureSet, ...]
    weights: tuple[Fraction, ...] | None = None
    kept: tuple[Int[np.ndarray, " _"], ...] | None = None  # of each set the items that are visited; None: all

    def __len__(self) -> int:
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> list[int]:
        """The number of items of each set that are visited."""
        return [len(items) for items in (self.sets if self.kept is None else self.kept)]

    @cached_property
    def lengths(self) -> tuple[Int[np.ndarray, " _"], ...]:
        """The number of tokens of every item of every set."""
        return tuple(features.lengths() for features in self.sets)

    @cached_property
    def _order(self) -> Callable[[int, int, int], Int[np.ndarray, " _"]]:
        """order of a set's epoch, cached for its current and its previous epoch."""
        return lru_cache(maxsize=2 * len(self.sets))(order)

    def steps_per_epoch(self, batch: int, last: Literal["partial", "drop"]) -> int | None:
        """The number of steps that visit every item once; `drop` leaves out a last partial batch. None with weights."""
        return None if self.weights else len(self) // batch if last == "drop" else -(-len(self) // batch)

    def visits(self, epoch: int, places: range, seed: int) -> Visits:
        """The visits at these positions of an epoch; with weights, of the whole stream, which is epoch 0."""
        sizes = self.sizes
        if self.weights:
            shares = [share(p, self.weights) for p in places]
            turns = [(s, *divmod(own, sizes[s])) for s, own in shares]
            found = [(s, e, self._order(sizes[s], _seed(seed, s), e)[own]) for s, e, own in turns]
            return self._as_stored(Visits(*np.array(found, np.int64).reshape(-1, 3).T))
        indices = self._order(len(self), seed, epoch)[places.start : places.stop]
        starts = np.array([0, *accumulate(sizes)])
        sets = np.searchsorted(starts, indices, side="right") - 1
        return self._as_stored(Visits(sets, np.full(len(indices), epoch), indices - starts[sets]))

    def _as_stored(self, visits: Visits) -> Visits:
        """Visits to places among the kept items as visits to items of the sets."""
        if self.kept is None:
            return visits
        found = [self.kept[s][i] for s, i in zip(visits.sets, visits.indices, strict=True)]
        return visits._replace(indices=np.array(found, np.int64))

    def lengths_of(self, visits: Visits) -> Int[np.ndarray, " S"]:
        """The number of tokens of each item, before caption drop."""
        return np.array([self.lengths[s][i] for s, i in zip(visits.sets, visits.indices, strict=True)], np.int64)

    def read(self, visits: Visits, seed: int, caption_drop: float) -> list[tuple[shards.Feature, bool]]:
        """Each item as stored, and whether it loses its caption in this epoch."""
        drops = lambda s, e, i: drops_caption(caption_drop, _seed(seed, s), e, i)
        found = zip(*(x.tolist() for x in visits), strict=True)
        return [(self.sets[s].feature(i), drops(s, e, i)) for s, e, i in found]


def share(place: int, weights: Sequence[Fraction]) -> tuple[int, int]:
    """The set of the item at this position of a stream, and how many of its items come before."""
    rest = sum(weights)
    for s, weight in enumerate(weights[:-1]):
        # Of the positions left by earlier sets, this set has taken the largest integer that its weight allows.
        part = weight / rest
        had, has = (n * part.numerator // part.denominator for n in (place, place + 1))
        if has > had:
            return s, had
        place -= had
        rest -= weight
    return len(weights) - 1, place


def _seed(seed: int, s: int) -> int:
    """A seed for each set, so that equal sets are shuffled differently; the first set has the order of a set alone."""
    return seed + (s << 64)
