"""The loss and the step: the reference's numbers, and every way of computing them agreeing."""

import dataclasses
import math

import pytest
import torch
import torch._inductor.config
import torch.utils._pytree as pytree
from torch._inductor.exc import InductorError
from torch.func import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import ops
from lumina_fn import model, optim, train
from lumina_fn.config import ModelConfig
from tests.support import transformer_goldens as goldens

TINY = ModelConfig(vocab=97, width=32, layers=2, heads=4, kv_heads=2, hidden=48)
OPT = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)


def batch(*shape: int, seed: int = 0) -> train.Batch:
    tokens = torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[..., :4] = -100
    labels[..., 0, shape[-1] - 3 :] = -100  # micro batches predict different numbers of tokens
    return train.Batch(tokens, labels)


def worst(a, b) -> float:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


def run(steps: int, data: train.Batch, *, cfg=TINY, dtype=torch.float64, opt=OPT, **settings):
    """Parameters and metrics after some steps on one batch."""
    state = train.init_state(model.init(cfg, dtype=dtype), opt)
    step = train.make_train_step(cfg, opt, z_weight=0.01, **settings)
    for _ in range(steps):
        state, metrics = step(state, data)
    return state, metrics


@pytest.mark.parametrize("name", goldens.NAMES)
def test_losses_and_gradients_are_the_references(name, tmp_path):
    params, cfg, facts, want = goldens.load(name, tmp_path)
    data = train.Batch(want["input_ids"], want["labels"])
    for weight, key in ((1e-5, "total_loss"), (facts["z_loss_weight_big"], "total_loss_big")):
        total, parts = train.loss(params, data, cfg, z_weight=weight)
        assert float(total) == pytest.approx(facts[key], abs=1e-5)
        assert float(parts["ce"]) == pytest.approx(facts["c_loss"], abs=1e-5)
        assert float(parts["z"]) == pytest.approx(facts["z_loss"], rel=1e-5)
    grads = goldens.by_reference_name(grad(lambda p: train.loss(p, data, cfg)[0])(params))
    for key, got in grads.items():
        golden = want[f"grad.{key}"]
        assert (got - golden).abs().max() <= 1e-5 * max(float(golden.abs().max()), 1e-3), key


@pytest.mark.parametrize("name", ["t1_mha", "t2_gqa"])
def test_three_steps_are_the_references(name, tmp_path):
    params, cfg, facts, want = goldens.load(name, tmp_path)
    data, recipe = train.Batch(want["input_ids"], want["labels"]), facts["optimizer"]
    opt = train.AdamW(recipe["lr"], *recipe["betas"], recipe["eps"], recipe["weight_decay"], recipe["clip_grad_norm"])
    state, step = train.init_state(params, opt), train.make_train_step(cfg, opt)
    for log in facts["steps"]["step3"]["log"][:3]:
        state, metrics = step(state, data)
        assert float(metrics["loss"]) == pytest.approx(log["total"], abs=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(log["grad_norm_before_clip"], rel=1e-5)
    for key, got in goldens.by_reference_name(state.params).items():
        difference = (got - want[f"step3.{key}"]).abs()
        assert difference.max() < 1e-3, key
        assert difference.mean() < 1e-5, key


def test_truncation_is_the_references(tmp_path):
    """A raw item longer than the context counts as its first max_positions tokens."""
    params, cfg, facts, _ = goldens.load("t5_trunc", tmp_path)
    width = max(facts["raw_lengths"])
    pad = lambda rows, fill: torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    data = train.Batch(pad(facts["raw_input_ids"], 0), pad(facts["raw_labels"], -100))
    assert float(train.loss(params, data, cfg)[0]) == pytest.approx(facts["total_loss"], abs=1e-5)


def full_loss(params, data, cfg, z_weight):
    """The loss the obvious way: all logits at once."""
    logits = model.forward(params, data.tokens, cfg)[:, :-1].flatten(0, 1)
    target = data.labels[:, 1:].flatten()
    z = logits.logsumexp(-1).square()[target != -100].mean()
    return F.cross_entropy(logits, target, ignore_index=-100) + z_weight * z


@pytest.mark.parametrize("rows", [2, 61])  # 61 x 18 tokens are more than one chunk
@pytest.mark.parametrize("masked", [(), (5, 96)])
def test_chunked_loss_is_the_full_one(rows, masked):
    cfg = dataclasses.replace(TINY, masked_ids=masked)
    params, data = model.init(cfg, dtype=torch.float64), batch(rows, 19)
    data.labels[torch.isin(data.labels, torch.tensor(masked))] = -100
    chunked = lambda p: train.loss(p, data, cfg, z_weight=0.1)[0]
    full = lambda p: full_loss(p, data, cfg, 0.1)
    torch.testing.assert_close(chunked(params), full(params), atol=1e-13, rtol=0)
    assert worst(grad(chunked)(params), grad(full)(params)) < 1e-13


def test_nothing_predicted_is_loss_zero():
    data = train.Batch(torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), -100))
    total, _ = train.loss(model.init(TINY), data, TINY)
    assert float(total) == 0


@pytest.mark.parametrize("settings", [{"remat": True}, {"donate": True}], ids=str)
def test_eager_variants_agree(settings):
    want, metrics = run(3, batch(2, 19))
    got, _ = run(3, batch(2, 19), **settings)
    assert worst(got.params, want.params) < 1e-13
    assert float(metrics["grad_norm"]) > OPT.clip  # clipping was active


def wide_rope(positions, cfg):
    """model.rope in float64. Its float32 cosines differ in the last bit between eager and compiled code, which would hide smaller faults."""
    channel = torch.arange(0, cfg.head_width, 2).double()
    angle = positions.double()[..., None] * cfg.rope_theta ** -(channel / cfg.head_width)
    return torch.stack([angle.cos(), angle.sin()], -2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("compile", ["blocks", "step"])
def test_compiled_steps_equal_eager_ones(compile, remat, monkeypatch):
    monkeypatch.setattr(model, "rope", wide_rope)
    data = batch(2, 2, 19)
    want, expected = run(3, data)
    got, metrics = run(3, data, compile=compile, remat=remat)
    assert worst(got, want) < 1e-11
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-12)


@pytest.mark.parametrize("compile", ["off", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_step_is_the_same_whatever_number_of_blocks_is_computed_again(compile, monkeypatch):
    monkeypatch.setattr(model, "rope", wide_rope)
    cfg, data = dataclasses.replace(TINY, layers=4), batch(2, 2, 19)
    want, expected = run(2, data, cfg=cfg)
    for remat in (0, 1, 2, 4, True):
        got, metrics = run(2, data, cfg=cfg, compile=compile, remat=remat)
        assert worst(got, want) < 1e-12
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-12)


def test_as_many_blocks_are_computed_again_as_are_asked_for():
    """Counted in the graph of the step: each of these blocks attends once more."""
    cfg = dataclasses.replace(TINY, layers=4)
    state, data = train.init_state(model.init(cfg), OPT), batch(2, 19)
    for remat, more in ((0, 0), (1, 1), (3, 3), (4, 4), (True, 4)):
        update = train.make_update(cfg, OPT, None, train.Options(remat=remat))
        graph = make_fx(update, tracing_mode="fake")(state, data, torch.tensor(1e-3)).graph
        calls = [node.target for node in graph.nodes]
        assert calls.count(ops.attention_fwd) == 4 + more


@pytest.mark.parametrize("remat", [False, True])
def test_what_remat_computes_again_is_not_merged_by_the_compiler(remat):
    """Counted in the last graph of the whole step before code is made of it."""
    seen = []

    class Enough(Exception):
        pass

    def look(graph):
        seen[:] = [node.target for node in graph.nodes]  # a compile that fails is tried once more
        raise Enough

    with torch._inductor.config.patch(post_grad_custom_post_pass=look), pytest.raises(InductorError, match="Enough"):
        run(1, batch(2, 19), compile="step", remat=remat)
    assert seen.count(ops.attention_bwd) == TINY.layers
    assert seen.count(ops.attention_fwd) == TINY.layers * (2 if remat else 1)


def test_accumulation_equals_one_big_batch():
    data = batch(3, 2, 19)
    big = train.Batch(data.tokens.flatten(0, 1), data.labels.flatten(0, 1))
    (many, m), (one, n) = run(3, data), run(3, big)
    assert worst(many.params, one.params) < 1e-12
    assert float(m["tokens"]) == float(n["tokens"])
    assert float(m["grad_norm"]) == pytest.approx(float(n["grad_norm"]), rel=1e-12)


def test_a_state_is_a_value():
    """Without donate=True a step writes over nothing it was given."""
    state = train.init_state(model.init(TINY), OPT)
    before = pytree.tree_map(torch.clone, state)
    train.make_train_step(TINY, OPT)(state, batch(2, 19))
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(before), strict=True))


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_but_is_counted(donate):
    good = model.init(TINY)
    bad = good._replace(embed=good.embed.clone())
    bad.embed[batch(2, 19).tokens[0, 5]] = math.nan
    step = train.make_train_step(TINY, OPT, donate=donate)
    state = train.init_state(bad, OPT)
    before = [leaf.clone() for leaf in pytree.tree_leaves((state.params, state.mu, state.nu))]
    for n in (1, 2):
        state, metrics = step(state, batch(2, 19))
        assert (int(metrics["skipped"]), int(metrics["streak"])) == (n, n)
    after = pytree.tree_leaves((state.params, state.mu, state.nu))
    assert all(
        torch.equal(
            a,
            b,
        )
        or torch.isnan(a).any()
        for a, b in zip(after, before, strict=True)
    )
    state, metrics = step(state._replace(params=good), batch(2, 19))
    assert (int(metrics["skipped"]), int(metrics["streak"])) == (2, 0)
    once, _ = train.make_train_step(TINY, OPT)(train.init_state(model.init(TINY), OPT), batch(2, 19))
    assert worst(state.params, once.params) == 0  # bias correction counts updates, not steps


def test_bfloat16_compute_keeps_float32_masters():
    state, metrics = run(2, batch(2, 19), dtype=torch.float32)
    got = train.init_state(model.init(TINY), OPT)
    step = train.make_train_step(TINY, OPT, z_weight=0.01, dtype=torch.bfloat16)
    for _ in range(2):
        got, m = step(got, batch(2, 19))
    assert all(leaf.dtype == torch.float32 for leaf in pytree.tree_leaves(got.params))
    assert float(m["loss"]) == pytest.approx(float(metrics["loss"]), abs=0.05)
    assert worst(got.params, state.params) > 0


def test_decay_reaches_every_parameter():
    """With zero gradients AdamW shrinks every leaf by 1 - lr * decay."""
    nothing = train.Batch(torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), -100))
    params = pytree.tree_map(torch.ones_like, model.init(TINY, dtype=torch.float64))
    state, _ = train.make_train_step(TINY, OPT)(train.init_state(params, OPT), nothing)
    assert all((leaf - (1 - 1e-2 * 0.1)).abs().max() < 1e-9 for leaf in pytree.tree_leaves(state.params))


@pytest.mark.parametrize("compile", ["off", pytest.param("step", marks=pytest.mark.slow)])
def test_the_rate_may_be_any_python_function_of_the_step(compile):
    opt = OPT._replace(lr=lambda step: 1e-2 if step < 1 else 1e-3 * min(1.0, (step + 1) / 10))
    for steps, lr in ((1, 1e-2), (2, 2e-4)):
        assert float(run(steps, batch(2, 8), opt=opt, compile=compile)[1]["lr"]) == pytest.approx(lr)


def test_schedules():
    at = lambda schedule, step: float(schedule(torch.tensor(step)))
    warm = optim.constant(2.0, warmup=4)
    assert [at(warm, s) for s in (0, 1, 3, 4, 100)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    fall = optim.cosine(2.0, warmup=2, steps=12)
    assert [round(at(fall, s), 6) for s in (0, 2, 7, 12, 50)] == [1.0, 2.0, 1.0, 0.0, 0.0]
    _, metrics = run(3, batch(2, 19), opt=OPT._replace(lr=lambda step: 0.1 * (step + 1)))
    assert float(metrics["lr"]) == pytest.approx(0.3)
