"""The vocabulary loss's middle for Ascend in Triton: a chunk's logits become its losses and, in place, its gradient.

kernels/reference.py is the specification. The products before and after stay the vendor's; between them each row of logits is
read twice and written once, where separate softmax, gather and scatter would pass over it five times.
"""

# pyright: reportIndexIssue=false
# A function under triton.jit is indexed by its grid; where triton is not installed the type checker cannot know that.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import CHUNK

# One program for each of the 910B2's 48 vector cores; each walks over rows.
PROGRAMS = 48
TILE = 4096  # logits: 0.96 of the unified buffer (1572864 bits a core) with loads doubled to overlap arithmetic; 8192 overflow it

LEAST = tl.constexpr(torch.finfo(torch.float32).min)  # a masked id's logit


@triton.jit
def _logits(logits, masked, row, column, V, MASKED: tl.constexpr):
    """A tile of a row in float32; LEAST where an id is masked or beyond the vocabulary."""
    inside = column < V
    tile = tl.load(logits + row * V + column, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        inside = inside & (tl.load(masked + column, mask=inside, other=1) == 0)
    return tl.where(inside, tile, LEAST)


@triton.jit
def _loss(logits, target, masked, lse, hit, z_weight, rows, V, TILE: tl.constexpr, MASKED: tl.constexpr):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        wanted = tl.load(target + row)
        top, total, found = LEAST, 0.0, 0.0
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            tile = _logits(logits, masked, row, column, V, MASKED)
            new_top = tl.maximum(top, tl.max(tile, 0))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(tile - new_top), 0)
            found += tl.sum(tl.where(column == wanted, tile, 0.0), 0)
            top = new_top
        row_lse = top + tl.log(total)
        step = 1.0 / (1.0 + 2.0 * z_weight * row_lse)
        tl.store(lse + row, row_lse)
        tl.store(hit + row, found)
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            # Not exp(tile - row_lse): the log-sum-exp's own rounding would be an error of every p.
            p = tl.exp(_logits(logits, masked, row, column, V, MASKED) - top) / total
            p = tl.where(column == wanted, p - step, p)
            tl.store(logits + row * V + column, p.to(logits.dtype.element_ty), mask=column < V)


def linear_cross_entropy_pass(
    x: Tensor, weight: Tensor, target: Tensor, count: Tensor, z_weight: float, masked: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ce, z, dx [N D] and dweight [V D] of rows x [N D] against target [N] under weight [V D], over chunks of rows.

    ce and z are sums over rows with a target >= 0, divided by count; the gradients are those of ce + z_weight * z.
    """
    N, V = x.shape[0], weight.shape[0]
    lse, hit = x.new_empty((2, N), dtype=torch.float32)
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    buffer = x.new_empty(min(CHUNK, N), V)
    column, hidden = target.clamp(min=0).to(torch.int32), torch.zeros(V, dtype=torch.int8, device=x.device)
    hidden[masked] = 1
    for start in range(0, N, CHUNK):
        rows = slice(start, min(start + CHUNK, N))
        xs, size = x[rows], rows.stop - start
        p = torch.mm(xs, weight.t(), out=buffer[:size])
        args = p, column[rows], hidden, lse[rows], hit[rows], z_weight, size, V
        _loss[(min(size, PROGRAMS),)](*args, TILE=TILE, MASKED=bool(masked))
        # The gradient of a row's logits is r (p - onehot / r): r and 1 / count go into rows of dx and x, never into [chunk, V].
        r = (torch.where(target[rows] >= 0, 1 + 2 * z_weight * lse[rows], 0) / count)[:, None]
        dx[rows] = (r * (p @ weight)).to(x.dtype)
        dweight += p.t() @ (r * xs).to(x.dtype)
    ce, z = (torch.where(target >= 0, loss, 0).sum() / count for loss in (lse - hit, lse * lse))
    return ce, z, dx, dweight.to(weight.dtype)
