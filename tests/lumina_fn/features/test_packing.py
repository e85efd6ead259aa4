"""Packed rows are the items in other places: same loss, same gradients, and no row longer than was asked for."""

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st

from lumina_fn import data, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.features import batches, shards
from lumina_fn.features.mixing import Mixture
from lumina_fn.features.packing import first_fit_decreasing
from lumina_fn.vocab import IGNORE, Ids

IDS = Ids(start=1, end=2, newline=3, sep=4, size0=5, code0=40, codes=16)
CFG = ModelConfig(vocab=56, width=8, layers=2, heads=2, kv_heads=1, hidden=12, max_positions=400)
LONGEST = 3 + 8 * 13 + 1 + 3 + 1


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, IDS.codes, (4 + 4 * (i % 2), 4 + 4 * (i % 3))) for i in range(11)]
    features = [shards.Feature(i, [20 + i] * (1 + i % 3), c) for i, c in enumerate(codes)]
    shards.write_features(folder, features, shards.Origin(64, 0, IDS, "tokenizer", "vq"))
    return Mixture((data.FeatureSet(folder),))


def stream(mixture, steps, rank=0, size=1, **how):
    settings = {"batch": 7, "micro_batch": 2, "max_positions": CFG.max_positions, "seed": 3, "last": "partial"} | how
    return batches.training_batches(
        mixture, steps, batches.Batching(caption_drop=0.5, **settings), rank=rank, size=size
    )


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(60, 200))
def test_every_document_has_a_place(lengths, room):
    rows = first_fit_decreasing(np.array(lengths, np.int64), room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < n <= room for n in used)
    for row, n in enumerate(used):  # first fit: what begins a later row had no room in an earlier one
        assert all(n + lengths[later[-1]] > room for later in rows[row + 1 :])


def test_the_longest_go_first():
    assert first_fit_decreasing(np.array([3, 7, 5, 3, 2]), 10) == [[1, 0], [2, 3, 4]]


@pytest.mark.parametrize("how", [{"order": "clustered"}, {"pack": LONGEST}, {"pack": 400}, {"pack": 300, "micro_batch": 1}], ids=str)  # fmt: skip
def test_a_step_is_the_same_step(mixture, how):
    """Loss, gradient norm, count and parameters of steps over packed rows; clustered batches are those of items one by one."""
    opt = train.AdamW(lr=1e-2)
    step = train.make_train_step(CFG, opt)
    plain = {"micro_batch": 1} | {name: value for name, value in how.items() if name == "order"}
    runs = []
    for settings in (plain, how):
        state, seen = train.init_state(model.init(CFG, dtype=torch.float64), opt), []
        for share in stream(mixture, range(4), **settings):  # over the end of an epoch
            state, metrics = step(state, share.batch)
            seen.append([metrics[name].item() for name in ("loss", "ce", "z", "grad_norm", "tokens")])
        runs.append((state, torch.tensor(seen, dtype=torch.float64)))
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-12, atol=1e-12)
    for a, b in zip(*(pytree.tree_leaves((s.params, s.mu)) for s, _ in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def gradients(shares):
    """Of the loss of all these shares together."""
    count = sum(train.predicted(share.batch.labels, CFG) for share in shares)
    params = model.init(CFG, dtype=torch.float64)

    def whole(params):
        micro = [type(share.batch)(*b) for share in shares for b in zip(*share.batch, strict=True)]
        return sum(train.loss(params, batch, CFG, count=count)[0] for batch in micro)

    return pytree.tree_leaves(torch.func.grad_and_value(whole)(params))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_ranks_have_the_gradients_of_the_items_one_by_one(mixture, size):
    steps = range(1, 2)
    expected = gradients(list(stream(mixture, steps, micro_batch=1)))
    ranks = [next(stream(mixture, steps, rank, size, pack=LONGEST)) for rank in range(size)]
    assert len({share.batch.tokens.shape for share in ranks}) == 1
    for a, b in zip(gradients(ranks), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_rows_hold_whole_documents(mixture):
    for share in stream(mixture, range(3), pack=300):
        assert share.batch.tokens.shape[1:] == (2, 300)
        starts = share.batch.first == torch.arange(300)
        assert (share.batch.labels[starts] == IGNORE).all()
        assert (share.batch.first <= torch.arange(300)).all()
        assert share.tokens == (share.batch.tokens != 0).sum()  # no item here has the id of padding


def test_what_is_cut_fills_a_row(mixture):
    room = int(mixture.lengths[0].min()) + 5
    (share,) = stream(mixture, range(1), pack=room, max_positions=room)
    (plain,) = stream(mixture, range(1), max_positions=room)
    assert share.tokens == plain.tokens
    rows = [{tuple(row) for row in batch.tokens.flatten(0, 1).tolist()} for batch in (share.batch, plain.batch)]
    assert {row for row in rows[1] if 0 not in row} <= rows[0]
