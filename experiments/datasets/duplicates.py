"""Similar pictures: a difference hash and the colours of every picture, and groups found without a comparison of all pairs."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int16, UInt64
from PIL import Image

SIDE = 8  # the hash has SIDE x SIDE bits
CELLS = 4  # colours are means of CELLS x CELLS parts of the picture
COLOUR = 16  # of 255: how far these means may lie apart; a re-encoded copy moves them by one or two


class Fingerprint(NamedTuple):
    """A picture's difference hash and coarse colours."""

    hash: int  # 64 bits: is a point brighter than its right neighbour?
    colours: bytes  # CELLS x CELLS x RGB


def fingerprint(image: Image.Image) -> Fingerprint:
    """What stays nearly the same when an RGB picture is scaled or compressed again."""
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX))
    bits = np.packbits(grey[:, :-1] > grey[:, 1:])
    colours = np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX))
    return Fingerprint(int.from_bytes(bits.tobytes()), colours.tobytes())


def same(keys: Iterable[Hashable | None]) -> list[list[int]]:
    """For each key that occurs more than once, the indices at which it occurs; None equals nothing."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if key is not None:
            places[key].append(i)
    return [group for group in places.values() if len(group) > 1]


def near(pictures: Sequence[Fingerprint], distance: int) -> list[list[int]]:
    """Groups of similar pictures, as indices. Pictures are similar if their hashes differ in at most `distance` bits and their colours
    are close; pairs that share a picture are in one group.

    The bits are divided into distance + 2 bands. At least two bands are equal in a similar pair, so only pictures that share two
    bands are compared.
    """
    if not pictures:
        return []
    hashes = np.array([p.hash for p in pictures], np.uint64)
    colours = np.stack([np.frombuffer(p.colours, np.uint8) for p in pictures]).astype(np.int16)
    group = np.arange(len(pictures))  # each picture's group, named by one of its members
    members = {i: [i] for i in range(len(pictures))}
    for key in _keys(hashes, distance):
        for bucket in _buckets(key):
            for alike in _alike(hashes, colours, group, bucket, distance):
                largest, *others = sorted(np.unique(group[alike]).tolist(), key=lambda name: -len(members[name]))
                for name in others:
                    moved = members.pop(name)
                    group[moved] = largest
                    members[largest] += moved
    return same(group.tolist())


def _keys(hashes: UInt64[np.ndarray, " n"], distance: int) -> Iterator[UInt64[np.ndarray, " n"]]:
    """The hashes masked to each pair of bands."""
    edges = np.linspace(0, SIDE * SIDE, distance + 3).round().astype(int).tolist()
    bands = [((1 << b) - 1) ^ ((1 << a) - 1) for a, b in pairwise(edges)]
    for one, other in combinations(bands, 2):
        yield hashes & np.uint64(one | other)


def _buckets(key: UInt64[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " m"]]:
    """The indices of equal keys, two or more each."""
    order = np.argsort(key, kind="stable")
    cuts = np.flatnonzero(np.diff(key[order])) + 1
    edges = np.concatenate([[0], cuts, [len(key)]])
    for i in np.flatnonzero(np.diff(edges) > 1):
        yield order[edges[i] : edges[i + 1]]


def _alike(
    hashes: UInt64[np.ndarray, " n"],
    colours: Int16[np.ndarray, "n c"],
    group: Int[np.ndarray, " n"],
    bucket: Int[np.ndarray, " m"],
    distance: int,
) -> Iterator[Int[np.ndarray, " k"]]:
    """Pictures of a bucket, each with the pictures that are similar and still in another group."""
    bright = colours[bucket].mean(1)  # close colours have close means: only a window of them is compared
    order = np.argsort(bright, kind="stable")
    bucket, ends = bucket[order], np.searchsorted(bright[order], bright[order] + COLOUR, side="right")
    for i, place in enumerate(bucket):
        rest = bucket[i + 1 : ends[i]]
        rest = rest[group[rest] != group[place]]
        rest = rest[np.bitwise_count(hashes[place] ^ hashes[rest]) <= distance]
        if len(rest):
            rest = rest[np.abs(colours[rest] - colours[place]).max(1) <= COLOUR]
        if len(rest):
            yield np.concatenate([[place], rest])
