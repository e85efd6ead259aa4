"""Who sees which pictures. Every set is a seeded shuffle of a shape's 360 specs, cut in pieces that do not overlap."""

import random
from itertools import chain

from experiments.demo.shapes import NEW, OLD, Spec, specs

OLD_REPORTED, SETTINGS, REPLAY, NEW_TRAINING = 40, 12, 32, 160  # the first three of each old shape


def shuffled(shape: str) -> list[Spec]:
    return random.Random(f"lumina demo {shape}").sample(specs(shape), 360)


def of_old(first: int, last: int | None) -> list[Spec]:
    return list(chain.from_iterable(shuffled(shape)[first:last] for shape in OLD))


def mixed(specs: list[Spec]) -> list[Spec]:
    return random.Random("lumina demo").sample(specs, len(specs))


def old_reported() -> list[Spec]:
    """200 prompts of old shapes that no training saw: what a fine-tune must not lose."""
    return mixed(of_old(0, OLD_REPORTED))


def settings() -> list[Spec]:
    """60 prompts of old shapes that no training saw and no report counts: sampling settings are chosen on them."""
    return of_old(OLD_REPORTED, OLD_REPORTED + SETTINGS)


def pretraining() -> list[Spec]:
    """1540 pictures of old shapes: all that the shipped language model has seen."""
    return of_old(OLD_REPORTED + SETTINGS, None)


def fine_tuning() -> list[Spec]:
    """160 pictures of the new shape and 160 that the model knows, so that it keeps knowing them."""
    replay = of_old(OLD_REPORTED + SETTINGS, OLD_REPORTED + SETTINGS + REPLAY)
    return shuffled(NEW)[:NEW_TRAINING] + mixed(replay)


def new_reported() -> list[Spec]:
    """200 prompts of the new shape that no training saw."""
    return shuffled(NEW)[NEW_TRAINING:]
