"""SwiGLU as an op."""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import ascend, reference
from ops.define import apply, define, in_front

swiglu_fwd = define(
    "swiglu_fwd(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: torch.empty_like(gate),
    batched=lambda info, in_dims, *args: (swiglu_fwd(*in_front(info, in_dims, *args)), 0),
    default=reference.swiglu_fwd,
    PrivateUse1=ascend.swiglu_fwd,
)
swiglu_bwd = define(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=lambda dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    batched=lambda info, in_dims, *args: (swiglu_bwd(*in_front(info, in_dims, *args)), (0, 0)),
    default=reference.swiglu_bwd,
    PrivateUse1=ascend.swiglu_bwd,
)


class _SwiGLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate, up):
        return swiglu_fwd(gate, up)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        return swiglu_bwd(dy, *ctx.saved_tensors)


def swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """silu(gate) * up."""
    return apply(_SwiGLU, gate, up)
