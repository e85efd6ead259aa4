"""rms_norm and residual-add + rms_norm for Ascend in Triton, forward and backward; kernels/reference.py is the specification.

A program walks over rows and holds one whole row at a time, so the row's mean square and its use cost one read of memory.
"""

# pyright: reportIndexIssue=false
# A function under triton.jit is indexed by its grid; where triton is not installed the type checker cannot know that.

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program for each of the 910B2's 48 vector cores: more would queue, and each leaves a row of dgain to be summed.
PROGRAMS = 48
# A tile is a row. 4096 channels fill at most 0.92 of the unified buffer (1572864 bits a core) with loads doubled to overlap
# arithmetic; 8192 fit without doubling, 16384 do not fit.


@triton.jit
def _fwd(x, residual, gain, total, y, rstd, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    g = tl.load(gain + channel, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * D + channel
        a = tl.load(x + at, mask=inside, other=0.0)
        if ADD:
            a = (a.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(a.dtype)
            tl.store(total + at, a, mask=inside)
        wide = a.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
        normed = (wide * r).to(a.dtype).to(tl.float32)  # rounded where the reference rounds
        tl.store(y + at, (normed * g).to(y.dtype.element_ty), mask=inside)
        tl.store(rstd + row, r)


@triton.jit
def _bwd(dtotal, dy, x, gain, rstd, dx, dgain, rows, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    g = tl.load(gain + channel, mask=inside, other=0.0).to(tl.float32)
    sum_dgain = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * D + channel
        r = tl.load(rstd + row)
        a = tl.load(x + at, mask=inside, other=0.0)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normed = a.to(tl.float32) * r
        sum_dgain += d * normed.to(a.dtype).to(tl.float32)
        d *= g
        d = r * (d - normed * (tl.sum(d * normed, 0) / D))
        if ADD:
            d += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(dgain + tl.program_id(0) * D + channel, sum_dgain, mask=inside)


def rms_norm_fwd(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [.. D] / rms(x) * gain, and 1 / rms [.. 1] for the backward."""
    return _forward(x, None, gain, eps)[1:]


def rms_norm_bwd(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain."""
    return _backward(None, dy, x, gain, rstd)


def add_rms_norm_fwd(x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual, its rms_norm, and that one's 1 / rms."""
    return _forward(x, residual, gain, eps)


def add_rms_norm_bwd(dtotal: Tensor, dy: Tensor, total: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is that of the residual too, and of the gain."""
    return _backward(dtotal, dy, total, gain, rstd)


def _forward(x: Tensor, residual: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, D, add = x.contiguous(), x.shape[-1], residual is not None
    rows = x.numel() // D
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    # Without a residual the total is x itself, and the kernel reads and writes neither.
    residual, total = (x, x) if residual is None else (residual.contiguous(), torch.empty_like(x))
    args = x, residual, gain.contiguous(), total, y, rstd, rows, eps
    _fwd[(min(rows, PROGRAMS),)](*args, D=D, BLOCK=triton.next_power_of_2(D), ADD=add)
    return total, y, rstd


def _backward(dtotal: Tensor | None, dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, D, add = dy.contiguous(), x.contiguous(), x.shape[-1], dtotal is not None
    rows = x.numel() // D
    programs = min(rows, PROGRAMS)
    dx, dgain = torch.empty_like(x), x.new_empty((programs, D), dtype=torch.float32)
    args = dy if dtotal is None else dtotal.contiguous(), dy, x, gain.contiguous(), rstd.contiguous(), dx, dgain, rows
    _bwd[(programs,)](*args, D=D, BLOCK=triton.next_power_of_2(D), ADD=add)
    return dx, dgain.sum(0).to(gain.dtype)
