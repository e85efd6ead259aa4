"""One stream of items out of several feature sets: which item of which set comes at which place, without those before it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from lumina_fn import data
from lumina_fn.features import shards


class Visits(NamedTuple):
    """Items in the order in which they are met."""

    sets: Int[np.ndarray, " S"]
    epochs: Int[np.ndarray, " S"]  # of each one's set
    indices: Int[np.ndarray, " S"]  # in its set

    def at(self, where: slice | Int[np.ndarray, " _"]) -> "Visits":
        return Visits(*(x[where] for x in self))


@dataclass(frozen=True)
class Mixture:
    """Feature sets that are read as one: each set's items once in an epoch that all share, or, with weights, once in its own.

    With weights the stream has no epochs and no end. Weights are exact and say how many of a stream's items are a set's:
    after any number of items each set's share is right to within as many items as there are sets.
    """

    sets: tuple[data.FeatureSet, ...]
    weights: tuple[Fraction, ...] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    @cached_property
    def lengths(self) -> tuple[Int[np.ndarray, " _"], ...]:
        """Tokens of every item of every set."""
        return tuple(features.lengths() for features in self.sets)

    @cached_property
    def _order(self) -> Callable[[int, int, int], Int[np.ndarray, " _"]]:
        """data.order, where each set's present epoch and the one before are remembered."""
        return lru_cache(maxsize=2 * len(self.sets))(data.order)

    def steps_per_epoch(self, batch: int, last: Literal["partial", "drop"]) -> int | None:
        """How many steps visit every item once; `drop` leaves out the last of an order, that fill no batch. With weights None."""
        return None if self.weights else len(self) // batch if last == "drop" else -(-len(self) // batch)

    def visits(self, epoch: int, places: range, seed: int) -> Visits:
        """What stands at these places of an epoch; with weights, of the whole stream, whose epoch is 0."""
        sizes = [len(features) for features in self.sets]
        if self.weights:
            shares = [share(p, self.weights) for p in places]
            turns = [(s, *divmod(own, sizes[s])) for s, own in shares]
            found = [(s, e, self._order(sizes[s], _seed(seed, s), e)[own]) for s, e, own in turns]
            return Visits(*np.array(found, np.int64).reshape(-1, 3).T)
        indices = self._order(len(self), seed, epoch)[places.start : places.stop]
        starts = np.array([0, *accumulate(sizes)])
        sets = np.searchsorted(starts, indices, side="right") - 1
        return Visits(sets, np.full(len(indices), epoch), indices - starts[sets])

    def lengths_of(self, visits: Visits) -> Int[np.ndarray, " S"]:
        """Tokens of each, before any caption drop."""
        return np.array([self.lengths[s][i] for s, i in zip(visits.sets, visits.indices, strict=True)], np.int64)

    def read(self, visits: Visits, seed: int, caption_drop: float) -> list[tuple[shards.Feature, bool]]:
        """What is stored of each, and whether it loses its caption in this epoch."""
        drops = lambda s, e, i: data.drops_caption(caption_drop, _seed(seed, s), e, i)
        found = zip(*(x.tolist() for x in visits), strict=True)
        return [(self.sets[s].feature(i), drops(s, e, i)) for s, e, i in found]


def share(place: int, weights: Sequence[Fraction]) -> tuple[int, int]:
    """Whose turn is at this place of a stream, and how many turns that set had before."""
    rest = sum(weights)
    for s, weight in enumerate(weights[:-1]):
        # Of the places that earlier sets leave, this one has had the largest whole number that its weight allows.
        part = weight / rest
        had, has = (n * part.numerator // part.denominator for n in (place, place + 1))
        if has > had:
            return s, had
        place -= had
        rest -= weight
    return len(weights) - 1, place


def _seed(seed: int, s: int) -> int:
    """Sets that hold the same pictures in the same order are shuffled apart; the first one's order is that of a set alone."""
    return seed + (s << 64)
