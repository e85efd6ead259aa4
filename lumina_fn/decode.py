"""Cached decoding: the trunk of model.py under a different `attend`, one row per sequence, sequences of different lengths.

Slot p of a row's cache holds the keys and values of that row's position p, so no row is padded. Tokens of all rows go through the
blocks as one long row; only `attend` knows which token belongs to which row. Caches are written in place: copying one for each
token would cost more than the attention that reads it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

import ops
from lumina_fn.config import ModelConfig
from lumina_fn.model import KV, Attend, Block, Params, block, rope, unembed

Cache = tuple[KV, ...]  # for each layer keys and values, each [B S G K]
Layer = Callable[[Block, Tensor, Tensor, KV], tuple[Tensor, KV]]  # a block over a row of tokens x with their angles


def empty_cache(params: Params, cfg: ModelConfig, rows: int, slots: int) -> Cache:
    """Room for `rows` sequences of at most `slots` tokens, in the parameters' dtype and on their device."""
    # Heads first in memory: a query then reads contiguous keys, 1.7x faster at 400 short rows or 2 long ones.
    new = lambda: params.embed.new_zeros(rows, cfg.kv_heads, slots, cfg.head_width).transpose(1, 2)
    return tuple((new(), new()) for _ in range(cfg.layers))


def prefill(
    params: Params, prompts: Sequence[Int[Tensor, " _"]], cache: Cache, cfg: ModelConfig
) -> Float[Tensor, "B 1 D"]:
    """Fill an empty cache with one prompt per row, in place; the residual stream at each prompt's last token, before the final norm."""
    lengths = [len(prompt) for prompt in prompts]
    ends = list(accumulate(lengths))
    positions = torch.cat([torch.arange(n, device=params.embed.device) for n in lengths])
    x, _ = _blocks(params, torch.cat(list(prompts)), positions, cfg, _layer(cfg, _apart(lengths)), cache)
    return x[torch.tensor(ends, device=x.device) - 1, None]


def extend(
    params: Params, tokens: Int[Tensor, "B T"], lengths: Sequence[int], cache: Cache, cfg: ModelConfig, *, compile: bool = False
) -> Float[Tensor, "B 1 D"]:  # fmt: skip
    """Append T tokens to each row, which already holds lengths[b], in place; the residual stream at the last token.

    compile: tokens pass one by one through a compiled block, which serves all layers and lengths.
    """
    B, T = tokens.shape
    if compile and T > 1:
        for t, token in enumerate(tokens.split(1, 1)):
            x = extend(params, token, [n + t for n in lengths], cache, cfg, compile=True)
        return x
    positions = torch.tensor(lengths, device=tokens.device)[:, None] + torch.arange(T, device=tokens.device)
    if compile:
        run, seen = _compiled(cfg), _seen(positions, cache[0][0].shape[1])
        layer = lambda p, x, angles, kv: (run(p, x, angles, positions, seen, *kv), kv)
    else:
        layer = _layer(cfg, _over_cache(positions, _seen(positions, max(lengths) + T), donate=True))
    x, _ = _blocks(params, tokens.flatten(), positions.flatten(), cfg, layer, cache)
    return x.view(B, T, -1)[:, -1:]


def step(
    params: Params, tokens: Int[Tensor, " B"], lengths: Int[Tensor, " B"], cache: Cache, cfg: ModelConfig
) -> tuple[Float[Tensor, "B V"], Cache]:
    """Logits after one more token in each row, which already holds `lengths`, and the new cache: a function of tensors, for export.

    A CPU reads the cache up to the last slot that is seen; other devices read all slots, so that a shorter cache is faster.
    """
    positions = lengths[:, None]
    layer = _layer(cfg, _over_cache(positions, _seen(positions, cache[0][0].shape[1]), donate=False))
    x, cache = _blocks(params, tokens, lengths, cfg, layer, cache)
    return unembed(params.head, x[:, None], cfg)[:, 0], cache


def _blocks(
    params: Params, tokens: Tensor, positions: Tensor, cfg: ModelConfig, layer: Layer, cache: Cache
) -> tuple[Float[Tensor, "N D"], Cache]:
    x, angles, new = F.embedding(tokens, params.embed)[None], rope(positions, cfg), []
    for p, kv in zip(params.blocks, cache, strict=True):
        x, kv = layer(p, x, angles, kv)
        new.append(kv)
    return x[0], tuple(new)


def _layer(cfg: ModelConfig, attend: Attend) -> Layer:
    def layer(p: Block, x: Tensor, angles: Tensor, kv: KV) -> tuple[Tensor, KV]:
        x, new = block(p, x, angles, cfg, attend, kv)
        assert new is not None, "an attend that is given a cache returns one"
        return x, new

    return layer


@lru_cache(maxsize=4)  # pictures of one model share the compiled block
def _compiled(cfg: ModelConfig) -> Callable[..., Float[Tensor, "1 B D"]]:
    """A compiled block over one more token in each row; it takes the whole cache, so that its shapes stay the same as rows grow."""
    from lumina_fn.transform import inductor, jit  # slow to import, and needed only here

    def one_more(p, x, angles, positions, seen, *kv):
        return block(p, x, angles, cfg, _over_cache(positions, seen, donate=True), kv)[0]

    return jit(one_more, inductor, ops.REFERENCES)


def _apart(lengths: list[int]) -> Attend:
    """Causal attention within each of the consecutive sequences of these lengths, whose keys and values go to slots 0, 1, ... of its row."""

    def attend(q, k, v, cache):
        out, (keys, values) = [], cache
        for row, (q_, k_, v_) in enumerate(zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)):
            keys[row, : lengths[row]], values[row, : lengths[row]] = k_[0], v_[0]
            out.append(ops.attention(q_, k_, v_))
        return torch.cat(out, 1), cache

    return attend


def _seen(positions: Int[Tensor, "B T"], slots: int) -> Bool[Tensor, "B T S"]:
    """Which slots each of a row's T tokens sees: those up to its own."""
    return torch.arange(slots, device=positions.device) <= positions[..., None]


def _over_cache(positions: Int[Tensor, "B T"], seen: Bool[Tensor, "B T S"], *, donate: bool) -> Attend:
    """Attention of each row's T tokens, whose keys and values go to the slots `positions`, over the first S slots where `seen` allows it."""
    rows = lambda x: x.view(*positions.shape, *x.shape[2:])

    def attend(q, k, v, cache):
        kept_k, kept_v = (
            ops.write_cache(kept, positions, rows(new), donate=donate) for kept, new in zip(cache, (k, v), strict=True)
        )
        keys, values = (kept[:, : seen.shape[-1]] for kept in (kept_k, kept_v))
        return ops.cached_attention(rows(q), keys, values, seen).view(q.shape), (kept_k, kept_v)

    return attend
