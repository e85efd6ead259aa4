"""Per-head layer norm and rotary embedding as an op."""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import npu, reference
from ops.define import against, apply, define, in_front


def _fake_fwd(x, gain, bias, angles, eps):
    of_heads = lambda: reference.wide(x.new_empty((*x.shape[:-1], 1)))
    return x.new_empty(x.shape), of_heads(), of_heads()


def _fake_bwd(dy, x, gain, angles, mean, rstd):
    return x.new_empty(x.shape), torch.empty_like(gain), torch.empty_like(gain)


def _batched_fwd(info, in_dims, x, gain, bias, angles, eps):
    first, *others, _ = in_front(info, in_dims, x, gain, bias, angles, eps)
    if in_dims[1:] == (None,) * 4 and angles.ndim == 3:  # only x is batched: fold the new axis into the rows
        out = qk_norm_rotary_fwd(first.flatten(0, 1), gain, bias, angles, eps)
        return tuple(y.unflatten(0, first.shape[:2]) for y in out), (0, 0, 0)
    gain, bias, angles = (against(p, first) for p in others)
    return reference.qk_norm_rotary_fwd(first, gain, bias, angles, eps), (0, 0, 0)


def _batched_bwd(info, in_dims, *args):
    dy, x, gain, angles, mean, rstd = in_front(info, in_dims, *args)
    dx, *of_gain = reference.qk_norm_rotary_bwd(dy, x, against(gain, x), against(angles, x), mean, rstd)
    return (dx, *(g.view(gain.shape) for g in of_gain)), (0, 0, 0)


qk_norm_rotary_fwd = define(
    "qk_norm_rotary_fwd(Tensor x, Tensor gain, Tensor bias, Tensor angles, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    batched=_batched_fwd,
    default=reference.qk_norm_rotary_fwd,
    PrivateUse1=npu.qk_norm_rotary_fwd,
)
qk_norm_rotary_bwd = define(
    "qk_norm_rotary_bwd(Tensor dy, Tensor x, Tensor gain, Tensor angles, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    batched=_batched_bwd,
    default=reference.qk_norm_rotary_bwd,
    PrivateUse1=npu.qk_norm_rotary_bwd,
)


class _QKNormRotary(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, gain, bias, angles, eps):
        return qk_norm_rotary_fwd(x, gain, bias, angles, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gain, _, angles, _ = inputs
        ctx.save_for_backward(x, gain, angles, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        return (*qk_norm_rotary_bwd(dy, *ctx.saved_tensors), None, None)


def qk_norm_rotary(
    x: Float[Tensor, "B T H K"],
    gain: Float[Tensor, "#H K"],
    bias: Float[Tensor, "#H K"],
    angles: Float[Tensor, "*rows T 2 half"],
    eps: float,
) -> Float[Tensor, "B T H K"]:
    """Layer norm over each head's K, times gain plus bias (one for all heads, or one for each), then channels j and j + K/2 rotated as a pair.

    angles holds cosines and sines, one set for all rows or one per row; they get no gradient.
    """
    return apply(_QKNormRotary, x, gain, bias, angles, eps)[0]
