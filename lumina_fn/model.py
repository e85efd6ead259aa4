"""The decoder: pure functions over a tree of tensors.

Axes, here and in every signature of this package:
  B batch   T query time   S key time   D width   H heads   G key and value heads   K head width   F hidden   V vocabulary

Three callables are the whole extension mechanism:
  attend  how queries meet keys (causal over this call, over a cache, over packed documents)
  gather  how a unit of parameters becomes whole (already whole, or gathered from its shards)
  remat   what a block keeps for its backward (everything, or its inputs)
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

import ops
from kernels.reference import among
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError

LOG = logging.getLogger(__name__)

HEAD_NORM_EPS = 1e-5  # fixed in the reference, independent of rms_norm_eps


class Norm(NamedTuple):
    """Gain and bias of a layer norm over the channels of a head: one for all heads, or one for each (n is 1, H or G)."""

    gain: Float[Tensor, "n K"]
    bias: Float[Tensor, "n K"]


class Block(NamedTuple):
    """The parameters of a transformer block: attention and a gated MLP."""

    attn_norm: Float[Tensor, " D"]
    q: Float[Tensor, "H*K D"]
    k: Float[Tensor, "G*K D"]
    v: Float[Tensor, "G*K D"]
    q_norm: Norm  # over each head's K
    k_norm: Norm
    out: Float[Tensor, "D H*K"]
    mlp_norm: Float[Tensor, " D"]
    gate: Float[Tensor, "F D"]
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "D F"]


class Head(NamedTuple):
    """The parameters that turn the last block's output into logits."""

    norm: Float[Tensor, " D"]
    unembed: Float[Tensor, "V D"]


class Params(NamedTuple):
    """The parameters of the transformer."""

    embed: Float[Tensor, "V D"]
    blocks: tuple[Block, ...]
    head: Head


KV = tuple[Tensor, Tensor]  # one layer's keys and values, each [B S G K]
Attend = Callable[[Tensor, Tensor, Tensor, KV | None], tuple[Tensor, KV | None]]


def causal(q: Tensor, k: Tensor, v: Tensor, cache: KV | None) -> tuple[Tensor, KV | None]:
    """Causal attention over the tokens of this call; the cache is returned as given."""
    return ops.attention(q, k, v), cache


def packed(first: Int[Tensor, "B T"]) -> Attend:
    """Attention within the documents of each row, which start at the positions `first`."""
    return lambda q, k, v, cache: (ops.packed_attention(q, k, v, first), cache)


def rope(positions: Int[Tensor, "*B T"], cfg: ModelConfig) -> Float[Tensor, "*B T 2 half"]:
    """Cosines and sines of the rotary angles at these positions, float32."""
    channel = torch.arange(0, cfg.head_width, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[..., None] * (1.0 / cfg.rope_theta ** (channel / cfg.head_width))
    return torch.stack([angle.cos(), angle.sin()], -2)


def attention(
    p: Block, x: Float[Tensor, "B T D"], angles: Tensor, cfg: ModelConfig, attend: Attend, cache: KV | None
) -> tuple[Float[Tensor, "B T D"], KV | None]:
    """The attention layer of a block, and the cache that `attend` returns."""
    heads = lambda w: rearrange(ops.linear(x, w), "B T (H K) -> B T H K", K=cfg.head_width)
    normed = lambda x, norm: ops.qk_norm_rotary(x, norm.gain, norm.bias, angles, HEAD_NORM_EPS)
    q, k = normed(heads(p.q), p.q_norm), normed(heads(p.k), p.k_norm)
    out, cache = attend(q, k, heads(p.v), cache)
    return ops.linear(rearrange(out, "B T H K -> B T (H K)"), p.out), cache


def mlp(p: Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The gated MLP of a block: down @ (silu(gate @ x) * (up @ x))."""
    return ops.linear(ops.swiglu(ops.linear(x, p.gate), ops.linear(x, p.up)), p.down)


def block(
    p: Block,
    x: Float[Tensor, "B T D"],
    angles: Tensor,
    cfg: ModelConfig,
    attend: Attend = causal,
    cache: KV | None = None,
) -> tuple[Float[Tensor, "B T D"], KV | None]:
    """The output of a transformer block, and the cache that `attend` returns."""
    norm = lambda gain, y: ops.rms_norm(y, gain, cfg.eps)
    if cfg.swin_norm:
        a, cache = attention(p, x, angles, cfg, attend, cache)
        x = x + norm(p.attn_norm, a)
        return x + norm(p.mlp_norm, mlp(p, x)), cache
    a, cache = attention(p, norm(p.attn_norm, x), angles, cfg, attend, cache)
    x, y = ops.add_rms_norm(a, x, p.mlp_norm, cfg.eps)
    return x + mlp(p, y), cache


def trunk(
    params: Params, tokens: Int[Tensor, "B T"], cfg: ModelConfig, *first: Int[Tensor, "B T"],
    gather=lambda unit: unit, remat=lambda f: f,
) -> Float[Tensor, "B _ D"]:  # fmt: skip
    """The residual stream after the last block, before the final norm; tokens beyond cfg.max_positions are cut.

    `first`, for rows that hold several documents: for each position, the position where its document starts.
    """
    tokens, *starts = (x[:, : cfg.max_positions] for x in (tokens, *first))
    x = F.embedding(tokens, gather(params.embed))
    layer = remat(lambda p, x, *where: along(gather(p), x, cfg, *where))
    where = (angles_of(tokens, cfg, *starts), *starts)
    for p in params.blocks:
        x = layer(p, x, *where)
    return x


def angles_of(tokens: Int[Tensor, "B T"], cfg: ModelConfig, *first: Int[Tensor, "B T"]) -> Float[Tensor, "*B T 2 half"]:
    """rope of each token's position in its row, or in its document."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return rope(at - first[0] if first else at, cfg)


def along(
    p: Block, x: Float[Tensor, "B T D"], cfg: ModelConfig, angles: Tensor, *first: Tensor
) -> Float[Tensor, "B T D"]:
    """A block over whole rows, each of one document or (with `first`) several."""
    return block(p, x, angles, cfg, packed(*first) if first else causal)[0]


def unembed(p: Head, x: Float[Tensor, "B T D"], cfg: ModelConfig) -> Float[Tensor, "B T V"]:
    """Logits in float32 (float64 for float64 parameters)."""
    logits = ops.linear(ops.rms_norm(x, p.norm, cfg.eps), p.unembed)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if cfg.masked_ids:
        hidden = among(cfg.masked_ids, cfg.vocab, x.device)
        logits = torch.where(hidden, torch.finfo(torch.float32).min, logits)
    return logits


def forward(
    params: Params, tokens: Int[Tensor, "B T"], cfg: ModelConfig, *, gather=lambda unit: unit, remat=lambda f: f
) -> Float[Tensor, "B _ V"]:
    """Next-token logits at the first cfg.max_positions positions, float32 (float64 for float64 parameters).

    Longer rows are cut there, as the reference does, and a warning is logged. InputError for tokens that are no rows.
    """
    if tokens.ndim != 2:
        raise InputError(f"tokens of shape {list(tokens.shape)}: expected rows [B T]; one sequence is tokens[None]")
    if tokens.shape[1] > cfg.max_positions:
        LOG.warning("%s tokens a row: the model's context is %s, the rest is cut", tokens.shape[1], cfg.max_positions)
    return unembed(gather(params.head), trunk(params, tokens, cfg, gather=gather, remat=remat), cfg)


def units(params: Params) -> tuple[Any, ...]:
    """The embedding, each block, and the head: the parts gathered one at a time. In a sharded tree each is a `sharding.Sharded`."""
    return (params.embed, *params.blocks, params.head)


def over_units(fn: Callable, *trees: Params) -> Params:
    """fn of each unit (the embedding, each block, the head) of one or several trees."""
    embed, blocks, head = zip(*trees, strict=True)
    return Params(fn(*embed), tuple(fn(*units) for units in zip(*blocks, strict=True)), fn(*head))


def init(
    cfg: ModelConfig, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Params:
    """Random parameters: weights normal with standard deviation 0.02, gains 1, biases 0; with device="meta", shapes and dtypes only."""
    if torch.device(device).type == "meta":
        draw = torch.empty  # torch.randn imports PyTorch's compiler there, which takes two seconds
    else:
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(seed))
    normal = lambda *shape: draw(shape, device=device, dtype=dtype).mul_(0.02)
    ones = lambda *shape: torch.ones(shape, device=device, dtype=dtype)
    zeros = lambda *shape: torch.zeros(shape, device=device, dtype=dtype)
    D, F_, K, V = cfg.width, cfg.hidden, cfg.head_width, cfg.vocab
    HK, GK = cfg.heads * K, cfg.kv_heads * K

    H, G = (cfg.heads, cfg.kv_heads) if cfg.head_norms else (1, 1)

    def layer() -> Block:
        return Block(
            attn_norm=ones(D), q=normal(HK, D), k=normal(GK, D), v=normal(GK, D),
            q_norm=Norm(ones(H, K), zeros(H, K)), k_norm=Norm(ones(G, K), zeros(G, K)), out=normal(D, HK),
            mlp_norm=ones(D), gate=normal(F_, D), up=normal(F_, D), down=normal(D, F_),
        )  # fmt: skip

    return Params(normal(V, D), tuple(layer() for _ in range(cfg.layers)), Head(ones(D), normal(V, D)))
