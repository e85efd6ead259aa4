"""Cached decoding is the full forward, whatever lies beside a row and however its tokens arrive."""

import pytest
import torch

from lumina_fn import decode, model, transform
from lumina_fn.config import ModelConfig

CFG = ModelConfig(vocab=50, width=24, layers=2, heads=6, kv_heads=2, hidden=32, max_positions=64)


def scaled(cfg, seed=0):
    """Random parameters far enough from zero that every layer matters."""
    return torch.utils._pytree.tree_map(
        lambda t: t * 12 if t.ndim == 2 else t, model.init(cfg, seed=seed, dtype=torch.float64)
    )


def sequence(length, seed):
    return torch.randint(CFG.vocab, (length,), generator=torch.Generator().manual_seed(seed))


def logits(params, x, cfg=CFG):
    return model.unembed(params.head, x, cfg)[:, 0]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("swin_norm", [False, True])
def test_cached_is_full(kv_heads, swin_norm):
    cfg = ModelConfig(**(CFG.__dict__ | {"kv_heads": kv_heads, "swin_norm": swin_norm}))
    params, rows, prompts = scaled(cfg), [sequence(n, n) for n in (17, 13, 20)], (9, 1, 6)
    full = [model.forward(params, row[None], cfg)[0] for row in rows]
    cache = decode.empty_cache(params, cfg, 3, 25)
    x = decode.prefill(params, [row[:n] for row, n in zip(rows, prompts, strict=True)], cache, cfg)
    lengths = list(prompts)
    for step in (1, 2, 1, 3, 1):
        for b, got in enumerate(logits(params, x, cfg)):
            torch.testing.assert_close(got, full[b][lengths[b] - 1], atol=1e-10, rtol=1e-10)
        tokens = torch.stack([row[n : n + step] for row, n in zip(rows, lengths, strict=True)])
        x = decode.extend(params, tokens, lengths, cache, cfg)
        lengths = [n + step for n in lengths]
    for b, got in enumerate(logits(params, x, cfg)):
        torch.testing.assert_close(got, full[b][lengths[b] - 1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kv_heads", "swin_norm"), [(2, False), (6, True)])
def test_compiled_is_eager_with_one_graph_for_all_layers_and_lengths(kv_heads, swin_norm, monkeypatch):
    cfg = ModelConfig(**(CFG.__dict__ | {"kv_heads": kv_heads, "swin_norm": swin_norm}))
    params, caches, compiled = scaled(cfg), [decode.empty_cache(scaled(cfg), cfg, 2, 12) for _ in range(2)], []
    inductor = transform.inductor
    monkeypatch.setattr(transform, "inductor", lambda *graph: compiled.append(graph) or inductor(*graph))
    decode._compiled.cache_clear()
    for cache in caches:
        decode.prefill(params, [sequence(4, 0), sequence(2, 1)], cache, cfg)
    lengths = [4, 2]
    with torch.no_grad():
        for step in (1, 2, 1):
            tokens = torch.stack([sequence(step, 7 + step), sequence(step, 17 + step)])
            eager = decode.extend(params, tokens, lengths, caches[0], cfg)
            fast = decode.extend(params, tokens, lengths, caches[1], cfg, compile=True)
            torch.testing.assert_close(fast, eager, atol=1e-11, rtol=1e-11)
            lengths = [n + step for n in lengths]
    torch.testing.assert_close(*caches, atol=1e-11, rtol=1e-11)
    assert len(compiled) == 1


def test_a_cpu_reads_no_slot_beyond_the_last_that_is_seen():
    params, out = scaled(CFG), []
    for slots in (6, 12):
        cache = decode.empty_cache(params, CFG, 2, slots)
        decode.prefill(params, [sequence(5, 0), sequence(2, 1)], cache, CFG)
        for t in (t for kv in cache for t in kv):
            t[:, 6:] = torch.nan  # a mask alone would carry it into every sum
        out.append(decode.step(params, torch.tensor([1, 2]), torch.tensor([5, 2]), cache, CFG)[0])
    torch.testing.assert_close(*out, atol=0, rtol=0)


def test_a_row_does_not_see_its_neighbours_nor_what_a_slot_held_before():
    params, row = scaled(CFG), sequence(8, 0)
    alone, beside = decode.empty_cache(params, CFG, 1, 12), decode.empty_cache(params, CFG, 2, 12)
    for keys, values in beside:
        keys.fill_(1e3), values.fill_(-1e3)
    a = decode.prefill(params, [row], alone, CFG)
    b = decode.prefill(params, [sequence(3, 1), row], beside, CFG)
    torch.testing.assert_close(a[0], b[1], atol=1e-12, rtol=1e-12)
    a = decode.extend(params, torch.tensor([[7]]), [8], alone, CFG)
    b = decode.extend(params, torch.tensor([[5], [7]]), [3, 8], beside, CFG)
    torch.testing.assert_close(a[0], b[1], atol=1e-12, rtol=1e-12)


def test_the_cache_is_written_in_place_and_only_where_tokens_went():
    params = scaled(CFG)
    cache = decode.empty_cache(params, CFG, 2, 12)
    where = [t.data_ptr() for kv in cache for t in kv]
    decode.prefill(params, [sequence(4, 0), sequence(2, 1)], cache, CFG)
    decode.extend(params, torch.tensor([[1], [2]]), [4, 2], cache, CFG)
    assert [t.data_ptr() for kv in cache for t in kv] == where
    for kv in cache:
        for t in kv:
            assert [int((row != 0).any(-1).any(-1).sum()) for row in t] == [5, 3]


def test_bfloat16_runs_and_stays_near_float32():
    params = model.init(CFG, dtype=torch.float32)
    half = torch.utils._pytree.tree_map(lambda t: t.bfloat16(), params)
    out = []
    for p in (params, half):
        cache = decode.empty_cache(p, CFG, 1, 8)
        decode.prefill(p, [sequence(4, 0)], cache, CFG)
        out.append(logits(p, decode.extend(p, torch.tensor([[3]]), [4], cache, CFG)))
    assert out[1].dtype == torch.float32
    torch.testing.assert_close(*out, atol=0.02, rtol=0.1)
