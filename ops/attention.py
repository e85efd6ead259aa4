import torch
from jaxtyping import Float
from torch import Tensor

from kernels import reference
from ops.define import define, folded


def _fake_fwd(q, k, v):
    return q.new_empty(q.shape), reference.wide(q.new_empty(q.shape[:3]))


def _fake_bwd(dout, q, k, v, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_FWD = "attention_fwd(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"
_BWD = "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)"
attention_fwd = define(
    _FWD, fake=_fake_fwd, batched=lambda *a: folded(attention_fwd)(*a), default=reference.attention_fwd
)
attention_bwd = define(
    _BWD, fake=_fake_bwd, batched=lambda *a: folded(attention_bwd)(*a), default=reference.attention_bwd
)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v):
        return attention_fwd(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dout, _):
        return attention_bwd(dout, *ctx.saved_tensors)


def attention(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T G K"], v: Float[Tensor, "B T G K"]
) -> Float[Tensor, "B T H K"]:
    """Causal attention with scale K^-0.5; each of the G key and value heads serves H / G query heads."""
    return _Attention.apply(q, k, v)[0]
