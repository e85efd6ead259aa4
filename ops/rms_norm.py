"""RMS norm, and residual add with RMS norm, as ops."""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import ascend, reference
from ops.define import against, apply, define, in_front


def _fake_fwd(x, gain, eps):
    return torch.empty_like(x), reference.wide(x.new_empty((*x.shape[:-1], 1)))


def _fake_add_fwd(x, residual, gain, eps):
    return (torch.empty_like(x), *_fake_fwd(x, gain, eps))


# vmap rules: where only x is batched the kernel takes one more leading axis; with a gain per item the reference broadcasts.
def _batched_fwd(info, in_dims, x, gain, eps):
    if in_dims[1] is None:
        return rms_norm_fwd(x.movedim(in_dims[0], 0), gain, eps), (0, 0)
    x, gain, _ = in_front(info, in_dims, x, gain, eps)
    return reference.rms_norm_fwd(x, against(gain, x), eps), (0, 0)


def _batched_bwd(info, in_dims, *args):
    dy, x, gain, rstd = in_front(info, in_dims, *args)
    dx, dgain = reference.rms_norm_bwd(dy, x, against(gain, x), rstd)
    return (dx, dgain.view(gain.shape)), (0, 0)


def _batched_add_fwd(info, in_dims, x, residual, gain, eps):
    first, second, whole, _ = in_front(info, in_dims, x, residual, gain, eps)
    if in_dims[2] is None:
        return add_rms_norm_fwd(first, second, gain, eps), (0, 0, 0)
    return reference.add_rms_norm_fwd(first, second, against(whole, first), eps), (0, 0, 0)


def _batched_add_bwd(info, in_dims, *args):
    dtotal, dy, total, gain, rstd = in_front(info, in_dims, *args)
    d, dgain = reference.add_rms_norm_bwd(dtotal, dy, total, against(gain, total), rstd)
    return (d, dgain.view(gain.shape)), (0, 0)


rms_norm_fwd = define(
    "rms_norm_fwd(Tensor x, Tensor gain, float eps) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    batched=_batched_fwd,
    default=reference.rms_norm_fwd,
    PrivateUse1=ascend.rms_norm_fwd,
)
rms_norm_bwd = define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor gain, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dy, x, gain, rstd: (torch.empty_like(x), torch.empty_like(gain)),
    batched=_batched_bwd,
    default=reference.rms_norm_bwd,
    PrivateUse1=ascend.rms_norm_bwd,
)
add_rms_norm_fwd = define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor gain, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_add_fwd,
    batched=_batched_add_fwd,
    default=reference.add_rms_norm_fwd,
    PrivateUse1=ascend.add_rms_norm_fwd,
)
add_rms_norm_bwd = define(
    "add_rms_norm_bwd(Tensor dtotal, Tensor dy, Tensor total, Tensor gain, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dtotal, dy, total, gain, rstd: (torch.empty_like(total), torch.empty_like(gain)),
    batched=_batched_add_bwd,
    default=reference.add_rms_norm_bwd,
    PrivateUse1=ascend.add_rms_norm_bwd,
)


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, gain, eps):
        return rms_norm_fwd(x, gain, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        return (*rms_norm_bwd(dy, *ctx.saved_tensors), None)


class _AddRMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, gain, eps):
        return add_rms_norm_fwd(x, residual, gain, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        total, _, rstd = output
        ctx.save_for_backward(total, inputs[2], rstd)
        ctx.mark_non_differentiable(rstd)

    @staticmethod
    def backward(ctx, dtotal, dy, _):
        d, dgain = add_rms_norm_bwd(dtotal, dy, *ctx.saved_tensors)
        return d, d, dgain, None


def rms_norm(x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """x / rms(x) * gain over the last axis; the mean square in float32, the result in x's dtype."""
    return apply(_RMSNorm, x, gain, eps)[0]


def add_rms_norm(
    x: Float[Tensor, "... D"], residual: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "... D"], Float[Tensor, "... D"]]:
    """x + residual, and its rms_norm."""
    return apply(_AddRMSNorm, x, residual, gain, eps)[:2]
