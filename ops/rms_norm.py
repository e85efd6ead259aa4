import torch
from jaxtyping import Float
from torch import Tensor

from kernels import reference
from ops.define import define, looped


def _fake_fwd(x, gain, eps):
    return torch.empty_like(x), reference.wide(x.new_empty((*x.shape[:-1], 1)))


rms_norm_fwd = define(
    "rms_norm_fwd(Tensor x, Tensor gain, float eps) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    batched=lambda *a: looped(rms_norm_fwd)(*a),
    default=reference.rms_norm_fwd,
)
rms_norm_bwd = define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor gain, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dy, x, gain, rstd: (torch.empty_like(x), torch.empty_like(gain)),
    batched=lambda *a: looped(rms_norm_bwd)(*a),
    default=reference.rms_norm_bwd,
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


def rms_norm(x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """x / rms(x) * gain over the last axis; the mean square in float32, the result in x's dtype."""
    return _RMSNorm.apply(x, gain, eps)[0]
