"""The vocabulary's cross-entropy as an op that never holds all logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import npu, reference
from ops.define import apply, define, in_front


def _fake(x, weight, target, count, z_weight, masked):
    total = reference.wide(x.new_empty(()))
    return total, torch.empty_like(total), torch.empty_like(x), weight.new_empty(weight.shape)


def _batched(info, in_dims, *args):
    x, weight, target, count, z_weight, masked = in_front(info, in_dims, *args)
    if in_dims[1] is None:  # one weight for all items: products stay matrix products over all items' rows
        weight = args[1]
    return reference.linear_cross_entropy_pass(x, weight, target, count, z_weight, masked), (0,) * 4


linear_cross_entropy_pass = define(
    "linear_cross_entropy_pass(Tensor x, Tensor weight, Tensor target, Tensor count, float z_weight, int[] masked)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    batched=_batched,
    default=reference.linear_cross_entropy_pass,
    PrivateUse1=npu.linear_cross_entropy_pass,
)


class _LinearCrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, target, count, z_weight, masked):
        ce, z, dx, dweight = linear_cross_entropy_pass(x, weight, target, count, z_weight, masked)
        return ce + z_weight * z, ce, z, dx, dweight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[3:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, dloss, *_):
        dx, dweight = ctx.saved_tensors
        return dloss.to(dx.dtype) * dx, dloss.to(dweight.dtype) * dweight, None, None, None, None


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    target: Int[Tensor, " N"],
    count: Tensor,
    *,
    z_weight: float,
    masked: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy and z of logits x @ weight.T against target, each a sum over predicted rows / count.

    The loss is ce + z_weight * z with z = logsumexp(logits)^2; only it is differentiable. A row whose target is
    negative is not predicted. Value and gradients are made in one pass over chunks of rows: [N, V] never exists.
    """
    return apply(_LinearCrossEntropy, x, weight, target, count, z_weight, list(masked))[:3]
