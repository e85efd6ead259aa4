"""Allowed ranges of the numbers that a user gives."""

import math
from typing import NamedTuple

from lumina_fn.errors import InputError


class Range(NamedTuple):
    """`Annotated[int, "help", Range(1, 10)]`: from 1 to 10. NaN is in no range."""

    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is excluded

    def problem(self, value: float) -> str | None:
        """What is wrong with a value; None if nothing is."""
        if not (value > self.least if self.above else value >= self.least):
            return f"expected more than {self.least}" if self.above else f"expected at least {self.least}"
        return None if value <= self.most else f"expected at most {self.most}"


SEED = Range(0, (1 << 63) - 1)
STEPS = Range(1, 10**9)  # and anything counted in steps
WEIGHT_DECAY = Range(0, 10**6)
CLIP = Range(0, above=True)  # infinity: no clipping
Z_WEIGHT = Range(0, 1)
MAX_TARGET = 8192  # pixels of a target's side: the list of its sizes must stay short, and no model draws half of that
LONGEST_CAPTION = 100_000  # characters: ten times the released model's context


def blocks(said: str, layers: int) -> int | None:
    """The number of blocks that --remat asks for: of "all", of a number from 0 to `layers`; None for "auto". Raises InputError."""
    if said == "auto":
        return None
    if said == "all":
        return layers
    if said.isascii() and said.isdecimal() and len(said) < 6 and int(said) <= layers:
        return int(said)
    raise InputError(f"--remat {said}: expected auto, all, or a number of blocks from 0 to {layers}")
