"""What a step sees: every item once an epoch, whatever the micro batches."""

import numpy as np
import pytest
import torch

from lumina_fn import batches, data, loss, model, shards
from lumina_fn.config import ModelConfig
from lumina_fn.vocab import IGNORE, Ids


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


N, BATCH, MICRO = 11, 4, 2  # the last of an epoch's three batches has three items
IDS = Ids(start=1, end=2, newline=3, sep=4, size0=5, code0=40, codes=16)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Items of different lengths whose captions are a single id, 20 + item."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, IDS.codes, (4, 4 + 4 * (i % 3))) for i in range(N)]
    origin = shards.Origin(64, 0, IDS, "tokenizer", "vq")
    shards.write_features(folder, [shards.Feature(i, [20 + i], c) for i, c in enumerate(codes)], origin)
    return data.FeatureSet(folder)


def shares(features, size, steps=range(6), caption_drop=0.0):
    """A list of steps, each a list of every rank's batch."""
    settings = {"batch": BATCH, "micro_batch": MICRO, "max_positions": 1000, "end": 2, "seed": 3, "last": "partial"}
    ranks = [
        batches.training_batches(features, steps, **settings, caption_drop=caption_drop, rank=rank, size=size)
        for rank in range(size)
    ]
    return list(zip(*ranks, strict=True))


def items(batch):
    """The captions of a share's items."""
    first = batch.tokens[:, :, 0].flatten()
    return [
        int(id) - 20 for id, labels in zip(first, batch.labels.flatten(0, 1), strict=True) if (labels != IGNORE).any()
    ]


SIZES = [2, 3, 4, 5, 9]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_share_a_batch_without_loss_or_repetition(features, size):
    for [whole], parts in zip(shares(features, 1), shares(features, size), strict=True):
        assert sorted(i for part in parts for i in items(part)) == sorted(items(whole))
        assert (
            len({part.tokens.shape[:2] for part in parts}) == 1
        )  # as many micro batches, as gradients are summed after each
        assert max(map(len, map(items, parts))) - min(map(len, map(items, parts))) <= 1


@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_the_same_loss_on_any_number_of_ranks(features, size):
    cfg = ModelConfig(vocab=56, width=8, layers=1, heads=1, kv_heads=1, hidden=8)
    params = model.init(cfg, dtype=torch.float64)

    def losses(steps):
        for parts in steps:
            count = sum(loss.predicted(part.labels, cfg) for part in parts)
            micro = [loss.Batch(*b) for part in parts for b in zip(*part, strict=True)]
            yield float(sum(loss.loss(params, b, cfg, count=count)[0] for b in micro))

    alone, shared = (losses(shares(features, n, range(3), caption_drop=0.5)) for n in (1, size))
    assert list(shared) == pytest.approx(list(alone), abs=1e-12)


def test_a_rank_reads_only_its_share(features, monkeypatch):
    read, stored = [], data.FeatureSet.text_and_codes
    monkeypatch.setattr(data.FeatureSet, "text_and_codes", lambda self, i: read.append(i) or stored(self, i))
    stream = batches.training_batches(
        features, range(1), batch=BATCH, micro_batch=MICRO, max_positions=1000, end=2, seed=3, caption_drop=0.0,
        last="partial", rank=1, size=3,
    )  # fmt: skip
    read.clear()  # the type checker of tests looks at an item of its own
    (batch,) = stream
    assert sorted(read) == sorted(items(batch))
    assert len(read) == 1
