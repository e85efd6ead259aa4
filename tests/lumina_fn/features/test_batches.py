"""What a step sees: every item once an epoch, whatever the micro batches."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumina_fn import data, loss, model
from lumina_fn.config import ModelConfig
from lumina_fn.features import batches, rows, shards
from lumina_fn.features.mixing import Mixture
from lumina_fn.vocab import IGNORE, Ids, image_tokens

N, BATCH, MICRO = 11, 4, 2  # the last of an epoch's three batches has three items
IDS = Ids(start=1, end=2, newline=3, sep=4, size0=5, code0=40, codes=16)


def write(folder, shapes):
    """Items of these shapes whose captions are a single id, 20 + item modulo 20."""
    rng = np.random.default_rng(0)
    found = [shards.Feature(i, [20 + i % 20], rng.integers(0, IDS.codes, shape)) for i, shape in enumerate(shapes)]
    shards.write_features(folder, found, shards.Origin(64, 0, IDS, "tokenizer", "vq"))
    return data.FeatureSet(folder)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Items of different lengths."""
    return write(tmp_path_factory.mktemp("features"), [(4, 4 + 4 * (i % 3)) for i in range(N)])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """So many items of mixed lengths that an epoch has two windows and more of batches of two."""
    shapes = np.random.default_rng(1).integers(1, 4, (270, 2)) * 4
    return write(tmp_path_factory.mktemp("many"), shapes.tolist())


@pytest.mark.parametrize("order", ["shuffled", "clustered"])
@pytest.mark.parametrize(("batch", "last"), [(4, "partial"), (2, "partial"), (300, "partial"), (4, "drop")])
def test_every_item_once_an_epoch(many, batch, last, order):
    mixture = Mixture((many,))
    per_epoch = mixture.steps_per_epoch(batch, last)
    items_of = batches.steps_of(mixture, batch=batch, seed=1, last=last, order=order)
    orders = []
    for epoch in range(3):
        steps = [items_of(epoch * per_epoch + k) for k in range(per_epoch)]
        assert {e for visits in steps for e in visits.epochs.tolist()} == {epoch}
        assert all(len(visits.indices) == batch for visits in steps[:-1])
        orders.append(np.concatenate([visits.indices for visits in steps]).tolist())
        left_out = len(many) % batch if last == "drop" else 0
        assert len(set(orders[-1])) == len(orders[-1]) == len(many) - left_out
    assert orders[0] != orders[1]


def test_a_drop_of_more_than_there_is_leaves_no_step(features):
    assert Mixture((features,)).steps_per_epoch(12, "drop") == 0
    assert Mixture((features,)).steps_per_epoch(12, "partial") == 1


@pytest.mark.parametrize("order", ["shuffled", "clustered"])
@pytest.mark.parametrize("weights", [None, (Fraction(7, 10), Fraction(3, 10))], ids=["epochs", "weights"])
def test_a_step_needs_none_before_it(features, many, weights, order):
    of = lambda seed: batches.steps_of(
        Mixture((features, many), weights), batch=3, seed=seed, last="partial", order=order
    )
    in_turn, alone = [of(1)(k) for k in range(67)], [of(1)(k) for k in (66, 63, 64, 3)]
    for k, visits in zip((66, 63, 64, 3), alone, strict=True):
        assert all((a == b).all() for a, b in zip(in_turn[k], visits, strict=True))
    assert any((in_turn[3].indices != of(2)(3).indices).tolist())


def test_clustering_is_within_windows_of_the_shuffled_order(many):
    of = lambda order: batches.steps_of(Mixture((many,)), batch=2, seed=1, last="partial", order=order)
    shuffled, clustered = of("shuffled"), of("clustered")
    window = lambda items_of: np.concatenate([items_of(k).indices for k in range(64)]).tolist()
    assert sorted(window(clustered)) == sorted(window(shuffled))
    assert window(clustered) != window(shuffled)
    lengths = [len(many[i][0]) for i in window(clustered)]
    assert lengths != sorted(lengths)  # batches come in any order


def padding(stream):
    """The part of the batches that is padding."""
    shares = list(stream)
    return 1 - sum(share.tokens for share in shares) / sum(share.batch.tokens.numel() for share in shares)


def test_clustering_and_packing_leave_less_padding(tmp_path):
    shapes = np.random.default_rng(1).integers(1, 9, (400, 2)) * 4
    settings = {"micro_batch": 8, "max_positions": 2000, "seed": 3, "last": "partial", "caption_drop": 0.0}
    mixture = Mixture((write(tmp_path, shapes.tolist()),))
    plain, clustered, packed = (
        padding(batches.training_batches(mixture, range(50), batches.Batching(batch=8, **settings | how)))
        for how in ({}, {"order": "clustered"}, {"pack": 1100, "micro_batch": 1})
    )
    assert clustered < plain / 4
    assert packed < plain / 2


@given(
    st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 30), max_size=5), st.booleans(), st.integers(1, 200)
)
def test_a_row_is_the_item_as_lists(height, width, text, dropped, room):
    codes = np.random.default_rng(height).integers(0, IDS.codes, (4 * height, 4 * width)).astype(np.uint16)
    feature = shards.Feature(0, text, codes)
    image = [*image_tokens(codes.tolist(), IDS), IDS.sep]
    item = text + image, [IGNORE] * len(text) + image
    ids, labels = data.drop_caption(*item, IDS.end) if dropped else item
    document = rows.document(feature, dropped, IDS)
    assert rows.length(document) == len(ids)
    row = np.full((2, room), 99)
    assert rows.write(document, *row, IDS) == min(room, len(ids))
    rest = [99] * max(0, room - len(ids))
    assert row.tolist() == [ids[:room] + rest, labels[:room] + rest]


def test_micro_batches_hold_the_items_and_nothing_else(features):
    documents = [rows.Document(features.feature(i), True) for i in range(3)]
    batch, tokens = batches.micro_batches(documents, 2, 1000, IDS, count=2)
    assert batch.tokens.shape == (2, 2, 64)
    flat = batch.tokens.flatten(0, 1), batch.labels.flatten(0, 1)
    for row in range(3):
        ids, labels = features[row]
        assert flat[0][row, : len(ids)].tolist() == ids
        assert flat[1][row, : len(ids)].tolist() == labels
    assert tokens == sum(len(features[row][0]) for row in range(3))
    assert (batch.labels != IGNORE).sum() == tokens - 3


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 1000, 9340, 10240])
def test_buckets_are_wide_enough_and_not_much_wider(length):
    padded = batches.bucket(length)
    assert length <= padded <= max(length * 1.125 + 1, length + 31)


def test_few_shapes_cover_all_lengths():
    assert len({batches.bucket(n) for n in range(1, 10_241)}) <= 50


def test_max_positions_bounds_the_batch(features):
    documents = [rows.Document(features.feature(2), True)]
    batch, tokens = batches.micro_batches(documents, 1, 50, IDS, count=1)
    assert (batch.tokens.shape[2], tokens) == (50, 50)
    assert batch.tokens[0, 0].tolist() == features[2][0][:50]


def shares(mixture, size, steps=range(6), caption_drop=0.0, **how):
    """A list of steps, each a list of every rank's batch."""
    settings = {"batch": BATCH, "micro_batch": MICRO, "max_positions": 1000, "seed": 3, "last": "partial"} | how
    ranks = [
        batches.training_batches(
            mixture, steps, batches.Batching(**settings, caption_drop=caption_drop), rank=rank, size=size
        )
        for rank in range(size)
    ]
    return [[share.batch for share in parts] for parts in zip(*ranks, strict=True)]


def items(batch):
    """The captions of a share's items."""
    return [int(token) - 20 for token in batch.tokens.flatten() if 20 <= token < 40]


SIZES = [2, 3, 9]
WAYS = [{}, {"order": "clustered"}, {"pack": 60}, {"pack": 150, "order": "clustered"}]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_share_a_batch_without_loss_or_repetition(features, size, how):
    mixture = Mixture((features,))
    for [whole], parts in zip(shares(mixture, 1, **how), shares(mixture, size, **how), strict=True):
        assert sorted(i for part in parts for i in items(part)) == sorted(items(whole))
        # As many micro batches, as gradients are summed after each.
        assert len({part.tokens.shape[:2] for part in parts}) == 1
        if "pack" not in how:
            assert max(map(len, map(items, parts))) - min(map(len, map(items, parts))) <= 1


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_the_same_loss_on_any_number_of_ranks(features, size, how):
    cfg = ModelConfig(vocab=56, width=8, layers=1, heads=1, kv_heads=1, hidden=8)
    params = model.init(cfg, dtype=torch.float64)
    mixture = Mixture((features, features), (Fraction(2, 3), Fraction(1, 3)))

    def losses(steps):
        for parts in steps:
            count = sum(loss.predicted(part.labels, cfg) for part in parts)
            micro = [type(part)(*b) for part in parts for b in zip(*part, strict=True)]
            yield float(sum(loss.loss(params, b, cfg, count=count)[0] for b in micro))

    alone, shared = (losses(shares(mixture, n, range(3), caption_drop=0.5, **how)) for n in (1, size))
    assert list(shared) == pytest.approx(list(alone), abs=1e-12)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_rank_reads_only_its_share(features, monkeypatch, how):
    read, feature = [], data.FeatureSet.feature
    monkeypatch.setattr(data.FeatureSet, "feature", lambda self, i: read.append(i) or feature(self, i))
    settings = {"batch": BATCH, "micro_batch": MICRO, "max_positions": 1000, "seed": 3, "last": "partial"} | how
    stream = batches.training_batches(
        Mixture((features,)), range(1), batches.Batching(**settings, caption_drop=0.0), rank=1, size=3
    )
    read.clear()
    (share,) = stream
    assert sorted(read) == sorted(items(share.batch))
    assert len(read) < BATCH
