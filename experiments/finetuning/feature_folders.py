"""The feature sets that --features names, read as one set."""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from lumina_fn import data
from lumina_fn.errors import InputError
from lumina_fn.features.mixing import Mixture

_WEIGHT = re.compile(r"\d{1,9}(\.\d{1,9})?|\.\d{1,9}|\d{1,9}/\d{1,9}", re.ASCII)


class Named(NamedTuple):
    """One value of --features: a folder and its weight."""

    folder: Path
    weight: Fraction | None  # None: not given


def named(flags: Sequence[Path]) -> list[Named]:
    """The folders and weights of `DIR` and `DIR=0.7`. Raises InputError for weights that cannot be used.

    If a folder with the whole name, such as `DIR=0.7`, exists, it is taken, without a weight.
    """
    found = [_named(flag) for flag in flags]
    bare = [str(one.folder) for one in found if one.weight is None]
    if 0 < len(bare) < len(found):
        raise InputError(f"--features {bare[0]}: other sets have weights; give it one, as in --features {bare[0]}=0.5")
    return found


def _named(flag: Path) -> Named:
    folder, sign, weight = str(flag).rpartition("=")
    if not sign or flag.exists():
        return Named(flag, None)
    if not _WEIGHT.fullmatch(weight) or not re.search("[1-9]", weight.partition("/")[0]):
        raise InputError(f"--features {flag}: weight {weight!r}, expected a positive number, as in --features DIR=0.7")
    if re.fullmatch("0*", weight.partition("/")[2] or "1"):
        raise InputError(f"--features {flag}: weight {weight!r} divides by 0")
    return Named(Path(folder), Fraction(weight))


def opened(flags: Sequence[Path]) -> Mixture:
    """The sets as one mixture. Raises InputError for a folder that is no feature set, and for sets of different models."""
    found = named(flags)
    sets = tuple(data.FeatureSet(one.folder) for one in found)
    first = sets[0].origin
    for features in sets[1:]:
        if (features.origin.ids, features.origin.tokenizer) != (first.ids, first.tokenizer):
            raise InputError(
                f"{features.folder} was made with tokenizer {features.origin.tokenizer[:12]} and {features.origin.ids}, "
                f"{sets[0].folder} with {first.tokenizer[:12]} and {first.ids}: run experiments.pretokenize with one model"
            )
    # The weight of a single set has no effect: the set is visited epoch by epoch.
    weights = tuple(one.weight for one in found if one.weight is not None)
    return Mixture(sets, weights if len(sets) > 1 and weights else None)
