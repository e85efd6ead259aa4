"""Where a format's cases are played: a folder that may be read, and one beside it that no file may lead to."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lumina_fn.errors import InputError
from tests.fuzz.law import CANARY
from tests.fuzz.mutate import mutated

Mutate = Callable[[random.Random], bytes]


class Format(NamedTuple):
    seeds: Sequence[bytes]  # valid, or an attack
    mutate: Mutate
    place: Callable[[bytes], object]  # puts a case into the folder
    read: Callable[[], object]  # returns what must not hold the canary
    refusal: type[Exception] = InputError
    writes: bool = False  # in the folder, as part of reading


class Ground(NamedTuple):
    """Where a format's cases are played: what is in `folder` may be read, nothing in `outside`."""

    folder: Path
    outside: Path


def ground(root: Path) -> Ground:
    """An empty folder, and one beside it that no file may lead to."""
    folder, outside = root / "folder", root / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(outside / "secret.png")
    (outside / "secret.json").write_text(json.dumps({CANARY: CANARY}))
    return Ground(folder, outside)


def json_cases(seeds: Sequence[object], words: Sequence[str] = ()) -> tuple[list[bytes], Mutate]:
    data = [s if isinstance(s, bytes) else json.dumps(s).encode() for s in seeds]
    return data, lambda pick: mutated(data, pick, words, 0.8)


def roads(at: Ground, name: str) -> list[str]:
    """Words that lead to a file outside of the folder."""
    return [
        f"../outside/{name}",
        str(at.outside / name),
        f"linked/{name}",
        name,
        f"./{name}",
        f"images/../../outside/{name}",
    ]
