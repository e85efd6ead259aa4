"""Causal flash attention for Ascend in Triton, forward and backward, also over packed documents; kernels/reference.py is the specification.

Nothing of size T x T is ever in memory: a program holds one tile of queries (of keys, for the gradients of k and v) and
walks over the tiles of the other side, with a running softmax in the forward and its saved log-sum-exp in the backward.
G key heads serve H query heads: head h reads key head h // (H / G).
"""

# pyright: reportIndexIssue=false
# A function under triton.jit is indexed by its grid; where triton is not installed the type checker cannot know that.

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program for each of the 910B2's 24 pairs of a matrix core and two vector cores; each walks over tiles.
PROGRAMS = 24
# Of the 910B2's memories, with loads doubled and each vector core on half of the rows (triton-ascend's defaults), 64 x 64 tiles
# of 128 channels fill at most 0.80 of a unified buffer (1572864 bits), 0.69 of L1 (4194304) and 0.75 of L0C (1048576).
# 128 x 64 cost _bwd_kv its doubling, 128 x 128 do not fit.
QUERIES = 64
KEYS = 64

LEAST = tl.constexpr(-1.0e30)  # not -inf: inf - inf would be a nan in a row that has seen no key yet


@triton.jit
def _fwd(
    q, k, v, first, out, lse, scale, T, tasks, tiles,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    wanted = (channel < K)[None, :]
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        b, h, start = task // tiles // H, task // tiles % H, task % tiles * QUERIES
        query = start + tl.arange(0, QUERIES)
        at_q = ((b * T + query) * H + h)[:, None] * K + channel[None, :]
        inside_q = (query < T)[:, None] & wanted
        q_tile = tl.load(q + at_q, mask=inside_q, other=0.0)
        begin = tl.load(first + b * T + query, mask=query < T, other=0) if PACKED else query
        top = tl.full([QUERIES], LEAST, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        sum_out = tl.zeros([QUERIES, CHANNELS], tl.float32)
        for key_start in range(0, tl.minimum(start + QUERIES, T), KEYS):
            key = key_start + tl.arange(0, KEYS)
            at_k = ((b * T + key) * G + h // (H // G))[:, None] * K + channel[None, :]
            inside_k = (key < T)[:, None] & wanted
            k_tile = tl.load(k + at_k, mask=inside_k, other=0.0)
            v_tile = tl.load(v + at_k, mask=inside_k, other=0.0)
            seen = (query[:, None] >= key[None, :]) & (key < T)[None, :]
            if PACKED:
                seen = seen & (begin[:, None] <= key[None, :])
            s = tl.where(seen, tl.dot(q_tile, tl.trans(k_tile)) * scale, LEAST)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            sum_out = sum_out * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile)
            top = new_top
        tl.store(out + at_q, (sum_out / total[:, None]).to(out.dtype.element_ty), mask=inside_q)
        tl.store(lse + (b * T + query) * H + h, top + tl.log(total), mask=query < T)


@triton.jit
def _bwd_q(
    dout, q, k, v, first, out, lse, dq, delta, scale, T, tasks, tiles,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    wanted = (channel < K)[None, :]
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        b, h, start = task // tiles // H, task // tiles % H, task % tiles * QUERIES
        query = start + tl.arange(0, QUERIES)
        at_q = ((b * T + query) * H + h)[:, None] * K + channel[None, :]
        inside_q = (query < T)[:, None] & wanted
        q_tile = tl.load(q + at_q, mask=inside_q, other=0.0)
        d_tile = tl.load(dout + at_q, mask=inside_q, other=0.0)
        o_tile = tl.load(out + at_q, mask=inside_q, other=0.0)
        row = (b * T + query) * H + h
        l_row = tl.load(lse + row, mask=query < T, other=0.0)
        # A row's sum of p * dp, which the softmax's gradient needs, is that of out * dout.
        d_row = tl.sum(o_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
        tl.store(delta + row, d_row, mask=query < T)
        begin = tl.load(first + b * T + query, mask=query < T, other=0) if PACKED else query
        sum_dq = tl.zeros([QUERIES, CHANNELS], tl.float32)
        for key_start in range(0, tl.minimum(start + QUERIES, T), KEYS):
            key = key_start + tl.arange(0, KEYS)
            at_k = ((b * T + key) * G + h // (H // G))[:, None] * K + channel[None, :]
            inside_k = (key < T)[:, None] & wanted
            k_tile = tl.load(k + at_k, mask=inside_k, other=0.0)
            v_tile = tl.load(v + at_k, mask=inside_k, other=0.0)
            seen = (query[:, None] >= key[None, :]) & (key < T)[None, :]
            if PACKED:
                seen = seen & (begin[:, None] <= key[None, :])
            s = tl.where(seen, tl.dot(q_tile, tl.trans(k_tile)) * scale, LEAST)
            p = tl.exp(s - l_row[:, None])
            ds = p * (tl.dot(d_tile, tl.trans(v_tile)) - d_row[:, None])
            sum_dq += tl.dot(ds.to(k_tile.dtype), k_tile)
        tl.store(dq + at_q, (sum_dq * scale).to(dq.dtype.element_ty), mask=inside_q)


@triton.jit
def _bwd_kv(
    dout, q, k, v, first, lse, delta, dk, dv, scale, T, tasks, tiles,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Keys down, queries across: every product has its operands as they lie in memory."""
    channel = tl.arange(0, CHANNELS)
    wanted = (channel < K)[None, :]
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        b, g, start = task // tiles // G, task // tiles % G, task % tiles * KEYS
        key = start + tl.arange(0, KEYS)
        at_k = ((b * T + key) * G + g)[:, None] * K + channel[None, :]
        inside_k = (key < T)[:, None] & wanted
        k_tile = tl.load(k + at_k, mask=inside_k, other=0.0)
        v_tile = tl.load(v + at_k, mask=inside_k, other=0.0)
        sum_dk = tl.zeros([KEYS, CHANNELS], tl.float32)
        sum_dv = tl.zeros([KEYS, CHANNELS], tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for query_start in range(start // QUERIES * QUERIES, T, QUERIES):
                query = query_start + tl.arange(0, QUERIES)
                at_q = ((b * T + query) * H + h)[:, None] * K + channel[None, :]
                inside_q = (query < T)[:, None] & wanted
                q_tile = tl.load(q + at_q, mask=inside_q, other=0.0)
                d_tile = tl.load(dout + at_q, mask=inside_q, other=0.0)
                row = (b * T + query) * H + h
                l_row = tl.load(lse + row, mask=query < T, other=0.0)
                d_row = tl.load(delta + row, mask=query < T, other=0.0)
                seen = (query[None, :] >= key[:, None]) & (query < T)[None, :]
                if PACKED:
                    begin = tl.load(first + b * T + query, mask=query < T, other=0)
                    seen = seen & (begin[None, :] <= key[:, None])
                s = tl.where(seen, tl.dot(k_tile, tl.trans(q_tile)) * scale, LEAST)
                p = tl.exp(s - l_row[None, :])
                sum_dv += tl.dot(p.to(d_tile.dtype), d_tile)
                ds = p * (tl.dot(v_tile, tl.trans(d_tile)) - d_row[None, :])
                sum_dk += tl.dot(ds.to(q_tile.dtype), q_tile)
        tl.store(dk + at_k, (sum_dk * scale).to(dk.dtype.element_ty), mask=inside_k)
        tl.store(dv + at_k, sum_dv.to(dv.dtype.element_ty), mask=inside_k)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B T H K] over k, v [B T G K]; the output [B T H K] and the log-sum-exp [B T H]."""
    return _forward(q, k, v, None)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    return _backward(dout, q, k, v, None, out, lse)


def packed_attention_fwd(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """attention_fwd where a query sees no key before first [B T], the position at which its document starts."""
    return _forward(q, k, v, first)


def packed_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    return _backward(dout, q, k, v, first, out, lse)


def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = (t.contiguous() for t in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    starts, scale, T, sizes = _shared(q, k, first)
    grid, *walk = _walk(q, QUERIES)
    _fwd[grid](q, k, v, starts, out, lse, scale, T, *walk, **sizes)
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out, lse = (t.contiguous() for t in (dout, q, k, v, out, lse))
    dq, dk, dv, delta = (torch.empty_like(t) for t in (q, k, v, lse))
    starts, scale, T, sizes = _shared(q, k, first)
    grid, *walk = _walk(q, QUERIES)
    _bwd_q[grid](dout, q, k, v, starts, out, lse, dq, delta, scale, T, *walk, **sizes)
    grid, *walk = _walk(k, KEYS)
    _bwd_kv[grid](dout, q, k, v, starts, lse, delta, dk, dv, scale, T, *walk, **sizes)
    return dq, dk, dv


def _shared(q: Tensor, k: Tensor, first: Tensor | None) -> tuple[Tensor, float, int, dict[str, int | bool]]:
    """What every launch is given: where documents start (anything, if there are none), scale, T and the tiles."""
    _, T, H, K = q.shape
    starts = q if first is None else first.to(torch.int32).contiguous()  # the vector cores compare no int64
    sizes = {"H": H, "G": k.shape[2], "K": K, "CHANNELS": triton.next_power_of_2(K)}
    return starts, K**-0.5, T, {**sizes, "QUERIES": QUERIES, "KEYS": KEYS, "PACKED": first is not None}


def _walk(x: Tensor, tile: int) -> tuple[tuple[int], int, int]:
    """The grid, the number of tiles of all heads of x [B T heads K], and those of one head."""
    B, T, heads, _ = x.shape
    tiles = triton.cdiv(T, tile)
    return (min(B * heads * tiles, PROGRAMS),), B * heads * tiles, tiles
