"""Attention as ops: causal, within packed documents, and over a cache."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels import ascend, reference
from ops.define import apply, define, folded


def _fake_fwd(q, k, v, *first):
    return q.new_empty(q.shape), reference.wide(q.new_empty(q.shape[:3]))


def _fake_bwd(dout, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


attention_fwd = define(
    "attention_fwd(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    batched=lambda *a: folded(attention_fwd)(*a),
    default=reference.attention_fwd,
    PrivateUse1=ascend.attention_fwd,
)
attention_bwd = define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    batched=lambda *a: folded(attention_bwd)(*a),
    default=reference.attention_bwd,
    PrivateUse1=ascend.attention_bwd,
)
packed_attention_fwd = define(
    "packed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor first) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    batched=lambda *a: folded(packed_attention_fwd)(*a),
    default=reference.packed_attention_fwd,
    PrivateUse1=ascend.packed_attention_fwd,
)
packed_attention_bwd = define(
    "packed_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor first, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    batched=lambda *a: folded(packed_attention_bwd)(*a),
    default=reference.packed_attention_bwd,
    PrivateUse1=ascend.packed_attention_bwd,
)
cached_attention_op = define(
    "cached_attention(Tensor q, Tensor keys, Tensor values, Tensor seen) -> Tensor",
    fake=lambda q, keys, values, seen: q.new_empty(q.shape),
    batched=lambda *a: folded(cached_attention_op)(*a),
    default=reference.cached_attention,
    PrivateUse1=ascend.cached_attention,
)


class _Attention(torch.autograd.Function):
    """Causal attention over whole rows, or with `first` over each document."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, *first):
        return (packed_attention_fwd if first else attention_fwd)(q, k, v, *first)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.packed = len(inputs) == 4
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dout, _):
        if ctx.packed:
            return (*packed_attention_bwd(dout, *ctx.saved_tensors), None)
        return attention_bwd(dout, *ctx.saved_tensors)


def attention(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T G K"], v: Float[Tensor, "B T G K"]
) -> Float[Tensor, "B T H K"]:
    """Causal attention with scale K^-0.5; each of the G key and value heads serves H / G query heads."""
    return apply(_Attention, q, k, v)[0]


def packed_attention(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T G K"], v: Float[Tensor, "B T G K"], first: Int[Tensor, "B T"]
) -> Float[Tensor, "B T H K"]:
    """Causal attention within each document of a row; first holds, for each position, the position where its document starts."""
    return apply(_Attention, q, k, v, first)[0]


def cached_attention(
    q: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B S G K"],
    values: Float[Tensor, "B S G K"],
    seen: Bool[Tensor, "B T S"],
) -> Float[Tensor, "B T H K"]:
    """Attention of new tokens over the cache slots that `seen` allows, at least one for each token. Not differentiable."""
    return cached_attention_op(q, keys, values, seen)
