"""Items that are longer than the model's context: cut to it as in the reference, left out, or an error, as --long says."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from experiments.launching.distributed import World
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.features.mixing import Mixture

NAMED = 3  # rows that a note names
AFTER_CODES = 3  # tokens of an item after its last code: newline, end, separator


class Fitted(NamedTuple):
    """Items that each leave something to train on within the model's context."""

    mixture: Mixture  # without those that are left out
    longest: int  # tokens of its longest item, before it is cut; 0 if there is none
    choice: str  # what was done with long items, which must stay the same when a run continues


def fitted(run: Any, world: World, mixture: Mixture, cfg: ModelConfig) -> Fitted:
    """The items that a run trains on, with a note about those that do not fit. Raises InputError for them under --long error.

    An item whose text alone fills the context has no token to predict once it is cut: it is left out.
    """
    limit, lengths = cfg.max_positions, mixture.lengths
    long = [n > limit for n in lengths]
    if not any(map(np.any, long)):
        return Fitted(mixture, _longest(lengths), run.long)
    what = f"more tokens than the {limit} that {run.model} takes"
    if run.long == "error":
        raise InputError(
            f"--long error: {_some(mixture, long)} with {what}; run experiments.pretokenize with a smaller --size, or give "
            "--long cut or --long skip"
        )
    bare = [features.text_lengths() >= limit for features in mixture.sets]
    left = bare if run.long == "cut" else long
    kept = tuple(np.flatnonzero(~of) for of in left)
    if run.long == "skip":
        world.say(f"note: --long skip leaves out {_some(mixture, long)} with {what}")
    else:
        cut = [a & ~b for a, b in zip(long, bare, strict=True)]
        if any(map(np.any, cut)):
            lose = sum(int(np.sum(of & (n > limit + AFTER_CODES))) for of, n in zip(cut, lengths, strict=True))
            world.say(
                f"note: {_some(mixture, cut)} with {what} are cut to them, {lose} of them lose codes; --long skip leaves such items out"
            )
        if any(map(np.any, bare)):
            world.say(
                f"note: left out {_some(mixture, bare)} whose text alone takes the {limit} tokens of {run.model}: nothing of the picture is left"
            )
    found = Mixture(mixture.sets, mixture.weights, kept)
    if not len(found):
        raise InputError(
            f"{_names(mixture)}: no item fits the {limit} tokens of {run.model}, so --long {run.long} leaves out all {len(mixture)}; "
            "run experiments.pretokenize with a smaller --size"
        )
    count = sum(int(of.sum()) for of in left)
    # Under --long skip the model and the features say which items are left out; of --long cut earlier versions left out none.
    choice = f"cut ({count} left out)" if run.long == "cut" and count else run.long
    return Fitted(found, _longest([n[i] for n, i in zip(lengths, kept, strict=True)]), choice)


def _longest(lengths: Sequence[np.ndarray]) -> int:
    return max((int(n.max(initial=0)) for n in lengths), default=0)


def _names(mixture: Mixture) -> str:
    return ", ".join(str(features.folder) for features in mixture.sets)


def _some(mixture: Mixture, chosen: Sequence[Bool[np.ndarray, " _"]]) -> str:
    """How many of the items are chosen, and the first of them by row and tokens."""
    rows = [
        f"row {features.row(i)} of {features.folder} ({int(n[i])} tokens)"
        for features, of, n in zip(mixture.sets, chosen, mixture.lengths, strict=True)
        for i in np.flatnonzero(of)[:NAMED].tolist()
    ][:NAMED]
    count = sum(int(of.sum()) for of in chosen)
    more = f" and {count - len(rows)} more" * (count > len(rows))
    return f"{count} of {len(mixture)} items ({', '.join(rows)}{more})"
