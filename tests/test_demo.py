"""The embedded default: its pictures, their grader, its splits and its shipped assets."""

import random
from itertools import chain

import numpy as np
import pytest

from experiments.demo import grader, shapes, splits

EVERY = list(chain.from_iterable(shapes.specs(shape) for shape in shapes.SHAPES))
SOME = random.Random(1).sample(EVERY, 120)


def test_captions():
    assert (
        shapes.caption(shapes.Spec("star", "orange", "black", "at the top left"))
        == "an orange star at the top left on a black background"
    )
    assert (
        shapes.caption(shapes.Spec("cross", "red", "mint", "in the middle"))
        == "a red cross in the middle on a mint background"
    )
    assert len({shapes.caption(s) for s in EVERY}) == len(EVERY) == 360 * 6


def test_translations_are_whole_cells():
    for shape in shapes.SHAPES:
        corner = shapes.draw(shapes.Spec(shape, "red", "white", "at the top left"))
        assert np.array_equal(
            corner, np.roll(shapes.draw(shapes.Spec(shape, "red", "white", "at the bottom")), (-32, -16), (0, 1))
        )


@pytest.mark.slow
def test_grader_reads_every_clean_picture():
    assert [grader.read(shapes.draw(s)) for s in EVERY] == EVERY


def test_grader_reads_blurred_and_noisy_pictures():
    """About what the tokenizer does to a picture: 28 dB of noise and a slight blur."""
    noise = np.random.default_rng(0)
    for spec in SOME:
        picture = shapes.draw(spec).astype(float)
        blurred = 0.7 * picture + 0.15 * (np.roll(picture, 1, 0) + np.roll(picture, 1, 1))
        assert grader.grade((blurred + noise.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8), spec)


def altered(spec, rng):
    """The spec with one of its four parts changed."""
    field, values = rng.choice([("shape", shapes.SHAPES), ("colour", shapes.COLOURS), ("background", shapes.BACKGROUNDS), ("position", shapes.POSITIONS)])  # fmt: skip
    return spec._replace(**{field: rng.choice([v for v in values if v != getattr(spec, field)])})


def test_grader_refuses_other_pictures():
    rng = random.Random(2)
    assert not any(grader.grade(shapes.draw(altered(s, rng)), s) for s in SOME)


def spoiled(spec, rng):
    """A picture with one 8 x 8 cell of the object's square replaced by a cell of another picture that differs in 24 pixels or more."""
    picture = shapes.draw(spec)
    while True:
        other = shapes.draw(rng.choice(EVERY))
        x, y = (c - 16 + 8 * rng.randrange(4) for c in shapes.POSITIONS[spec.position])
        u, v = (8 * rng.randrange(8) for _ in range(2))
        cell = other[v : v + 8, u : u + 8]
        if (np.abs(picture[y : y + 8, x : x + 8].astype(int) - cell).max(-1) > 80).sum() >= 24:
            picture[y : y + 8, x : x + 8] = cell
            return picture


def test_grader_accepts_at_most_one_spoiled_picture_in_a_hundred():
    rng = random.Random(3)
    accepted = sum(grader.grade(spoiled(s, rng), s) for s in EVERY[::4])
    assert accepted <= len(EVERY[::4]) / 100


def test_grader_refuses_noise_flat_pictures_and_two_objects():
    rng = np.random.default_rng(0)
    assert grader.read(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) is None
    assert grader.read(np.full((64, 64, 3), 245, np.uint8)) is None
    two = np.minimum(
        *(shapes.draw(shapes.Spec("circle", "red", "white", p)) for p in ("at the top left", "at the bottom right"))
    )
    assert grader.read(two) is None


def test_splits_do_not_overlap():
    parts = [splits.old_reported(), splits.settings(), splits.pretraining(), splits.new_reported(), splits.shuffled(shapes.NEW)[: splits.NEW_TRAINING]]  # fmt: skip
    assert [len(p) for p in parts] == [200, 60, 1540, 200, 160]
    assert sorted(chain.from_iterable(parts)) == sorted(EVERY)
    tuned = set(splits.fine_tuning())
    assert not tuned & {*splits.old_reported(), *splits.settings(), *splits.new_reported()}


def test_pretraining_has_neither_word_nor_picture_of_the_new_shape():
    seen = splits.pretraining()
    assert not any(shapes.NEW in shapes.caption(s) for s in seen)
    assert shapes.NEW not in {grader.read(shapes.draw(s)).shape for s in random.Random(0).sample(seen, 200)}
    new = {shapes.draw(s).tobytes() for s in shapes.specs(shapes.NEW)}
    assert not new & {shapes.draw(s).tobytes() for s in seen}
