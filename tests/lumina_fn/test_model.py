"""The decoder against the reference's numbers, and the laws it must obey."""

import dataclasses

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad, vmap

from lumina_fn import model, train
from lumina_fn.config import ModelConfig
from tests.support import transformer_goldens as goldens

TINY = ModelConfig(vocab=97, width=32, layers=2, heads=4, kv_heads=2, hidden=48)


def tokens(*shape: int, seed: int = 0, vocab: int = 97) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", goldens.NAMES)
def test_logits_are_the_references(name, tmp_path):
    params, cfg, _, want = goldens.load(name, tmp_path)
    logits = model.forward(params, want["input_ids"], cfg)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, want["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", goldens.NAMES)
def test_every_layer_is_the_references(name, tmp_path):
    params, cfg, _, want = goldens.load(name, tmp_path)
    for n in range(cfg.layers + 1):
        x = model.trunk(params._replace(blocks=params.blocks[:n]), want["input_ids"], cfg)
        golden = want[f"hidden.layer{n - 1}" if n else "hidden.embed"]
        torch.testing.assert_close(x, golden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t1_mha", "t3_swin"])
def test_queries_and_keys_are_the_references(name, tmp_path):
    params, cfg, _, want = goldens.load(name, tmp_path)
    seen = {}

    def attend(q, k, v, cache):
        seen.update(q=q, k=k)
        return model.causal(q, k, v, cache)

    x = want["hidden.embed"]
    angles = model.rope(torch.arange(x.shape[1]), cfg)
    model.block(params.blocks[0], x, angles, cfg, attend)
    for key, got in seen.items():
        torch.testing.assert_close(got.transpose(1, 2), want[f"l0.{key}_after_rope"], atol=1e-5, rtol=1e-5)
    half = cfg.head_width // 2
    torch.testing.assert_close(angles[:, 0], want["rope.cos"][:, :half], atol=1e-6, rtol=0)
    torch.testing.assert_close(angles[:, 1], want["rope.sin"][:, :half], atol=1e-6, rtol=0)


def test_bfloat16_is_near_the_references(tmp_path):
    params, cfg, facts, want = goldens.load("t1_mha", tmp_path, dtype=torch.bfloat16)
    got = model.forward(params, want["input_ids"], cfg)
    assert got.dtype == torch.float32
    assert (got - want["logits"]).abs().max() < 2 * facts["bf16"]["max_abs_diff_to_fp32_logits"]


@pytest.mark.parametrize("swin", [False, True])
def test_no_position_sees_a_later_one(swin):
    """The gradient of position t's logits reaches the embeddings of positions <= t, and all of those."""
    cfg = dataclasses.replace(TINY, swin_norm=swin)
    params, ids = model.init(cfg), tokens(1, 9)

    def logit(x, t):
        angles = model.rope(torch.arange(9), cfg)
        for p in params.blocks:
            x, _ = model.block(p, x, angles, cfg)
        return model.unembed(params.head, x, cfg)[0, t].sum()

    for t in range(9):
        reach = grad(logit)(params.embed[ids], t).abs().sum(-1)[0]
        assert (reach[: t + 1] > 0).all()
        assert (reach[t + 1 :] == 0).all()


def test_grouped_heads_equal_repeated_ones():
    params, ids = model.init(TINY), tokens(2, 9)
    repeat = lambda w: w.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    whole = params._replace(blocks=tuple(p._replace(k=repeat(p.k), v=repeat(p.v)) for p in params.blocks))
    cfg = dataclasses.replace(TINY, kv_heads=4)
    torch.testing.assert_close(model.forward(params, ids, TINY), model.forward(whole, ids, cfg), atol=1e-6, rtol=0)


def test_masked_ids_are_never_likely():
    cfg = dataclasses.replace(TINY, masked_ids=(3, 50))
    params, ids = model.init(TINY), tokens(2, 9)
    free, masked = model.forward(params, ids, TINY), model.forward(params, ids, cfg)
    assert (masked[..., [3, 50]] == torch.finfo(torch.float32).min).all()
    rest = [i for i in range(97) if i not in (3, 50)]
    assert torch.equal(masked[..., rest], free[..., rest])


def test_per_sample_gradients_by_vmap_average_to_the_batchs():
    params, ids = model.init(TINY, dtype=torch.float64), tokens(3, 9)
    batch = train.Batch(ids, ids)
    mean = grad(lambda p: train.loss(p, batch, TINY)[0])(params)
    one = lambda p, row: train.loss(p, train.Batch(row[None], row[None]), TINY)[0]
    each = vmap(grad(one), in_dims=(None, 0))(params, ids)
    for a, b in zip(pytree.tree_leaves(each), pytree.tree_leaves(mean), strict=True):
        torch.testing.assert_close(a.mean(0), b, atol=1e-14, rtol=1e-10)


def test_init_on_meta_has_the_trees_shapes():
    real, meta = model.init(TINY), model.init(TINY, device="meta")
    assert pytree.tree_structure(real) == pytree.tree_structure(meta)
    for a, b in zip(pytree.tree_leaves(real), pytree.tree_leaves(meta), strict=True):
        assert a.shape == b.shape
