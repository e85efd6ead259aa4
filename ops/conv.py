"""The 3 x 3 convolution as an op, by Winograd's algorithm where that is faster."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kernels import winograd
from ops.define import apply, define, in_front

WIDE = 64  # channels, of inputs and outputs, below which the additions take longer than the products that they spare
FLOATS = (torch.float32, torch.float64)  # narrower ones would be rounded after each addition
LARGE = 1 << 28  # products of a picture's pixels, inputs and outputs, below which a strip's calls take longer


def _batched(info, in_dims, x, weight, bias):
    """vmap rule: pictures that share a filter become one larger batch; with a filter each they are computed one by one."""
    if in_dims[1] is None and in_dims[2] is None:
        y = winograd_op(x.movedim(in_dims[0], 0).flatten(0, 1), weight, bias)
        return y.unflatten(0, (info.batch_size, -1)), 0
    items = zip(*in_front(info, in_dims, x, weight, bias), strict=True)
    return torch.stack([winograd_op(*item) for item in items]), 0


winograd_op = define(
    "winograd(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2),
    batched=_batched,
    default=winograd.conv3x3,
)


class _Winograd(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return winograd_op(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3
        )


def conv3x3(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, "O C 3 3"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "B O H W"]:
    """The convolution with stride 1 and zeros around. On a CPU, with many channels and even sides, 1.4 to 2 times as fast (LOG.md)."""
    if x.device.type != "cpu":
        return F.conv2d(x, weight, bias, padding=1)
    (*_, H, W), (O, C, *_) = x.shape, weight.shape
    if min(C, O) >= WIDE and H * W * C * O >= LARGE and H % 2 == W % 2 == 0 and x.dtype in FLOATS:
        return apply(_Winograd, x, weight, bias)
    return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
