"""What a step sees: every item once an epoch, whatever the micro batches."""

import numpy as np
import pytest
import torch

from lumina_fn import batches
from lumina_fn.vocab import IGNORE


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (12, 4), (3, 8)])
def test_every_item_once_an_epoch(n, batch):
    per_epoch = batches.steps_per_epoch(n, batch, "partial")
    for epoch in range(3):
        steps = [batches.items_of(epoch * per_epoch + k, n, batch, seed=1, last="partial") for k in range(per_epoch)]
        assert {e for e, _ in steps} == {epoch}
        assert sorted(np.concatenate([items for _, items in steps]).tolist()) == list(range(n))


def test_dropping_the_last_leaves_whole_batches():
    steps = [batches.items_of(k, 10, 4, seed=1, last="drop") for k in range(4)]
    assert [len(items) for _, items in steps] == [4] * 4
    assert [epoch for epoch, _ in steps] == [0, 0, 1, 1]
    assert batches.steps_per_epoch(3, 4, "drop") == 0


def test_epochs_and_seeds_differ():
    order = lambda step, seed: batches.items_of(step, 50, 50, seed=seed, last="partial")[1].tolist()
    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)


def test_micro_batches_hold_the_items_and_nothing_else():
    items = [(list(range(1, n)), [IGNORE, *range(2, n)]) for n in (5, 40, 9)]
    batch = batches.micro_batches(items, 2, max_positions=1000)
    assert batch.tokens.shape == (2, 2, 64)
    flat = batch.tokens.flatten(0, 1), batch.labels.flatten(0, 1)
    for row, (ids, labels) in enumerate(items):
        assert flat[0][row, : len(ids)].tolist() == ids
        assert flat[1][row, : len(ids)].tolist() == labels
    kept = sum(sum(label != IGNORE for label in labels) for _, labels in items)
    assert (batch.labels != IGNORE).sum() == kept


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 1000, 9340, 10240])
def test_buckets_are_wide_enough_and_not_much_wider(length):
    padded = batches.bucket(length)
    assert length <= padded <= max(length * 1.125 + 1, length + 31)


def test_few_shapes_cover_all_lengths():
    assert len({batches.bucket(n) for n in range(1, 10_241)}) <= 50


def test_max_positions_bounds_the_batch():
    long = (list(range(100)), list(range(100)))
    assert batches.micro_batches([long], 1, max_positions=50).tokens.shape[2] == 50
    assert torch.equal(batches.micro_batches([long], 1, max_positions=50).tokens[0, 0], torch.arange(50))
