"""Each Triton kernel, forward and backward, on small awkward inputs, next to kernels/reference.py in the same precision and in float64.

`TRITON_INTERPRET=1 python -m tests.ascend.triton_cases` runs all in Triton's interpreter and prints what came out as JSON;
the variable is read when triton is imported, so the interpreter needs a process of its own.
"""

import json
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels import reference, triton_attention, triton_qk_norm_rotary, triton_rms_norm, triton_vocabulary_loss


class Case(NamedTuple):
    kernels: ModuleType
    run: Callable[..., dict[str, Tensor]]
    floats: tuple[tuple[int, ...], ...]  # the shapes of the inputs in the precision under test
    others: tuple[Tensor, ...] = ()


class Error(NamedTuple):
    output: str
    error: float
    eager: float
    bound: float


def rms_norm(kernels, x, gain, dy):
    y, rstd = kernels.rms_norm_fwd(x, gain, 1e-5)
    dx, dgain = kernels.rms_norm_bwd(dy, x, gain, rstd)
    return {"y": y, "rstd": rstd, "dx": dx, "dgain": dgain}


def add_rms_norm(kernels, x, residual, gain, dtotal, dy):
    total, y, rstd = kernels.add_rms_norm_fwd(x, residual, gain, 1e-5)
    d, dgain = kernels.add_rms_norm_bwd(dtotal, dy, total, gain, rstd)
    return {"total": total, "y": y, "rstd": rstd, "d": d, "dgain": dgain}


def qk_norm_rotary(kernels, x, gain, bias, dy, angles):
    y, mean, rstd = kernels.qk_norm_rotary_fwd(x, gain, bias, angles, 1e-5)
    dx, dgain, dbias = kernels.qk_norm_rotary_bwd(dy, x, gain, angles, mean, rstd)
    return {"y": y, "mean": mean, "rstd": rstd, "dx": dx, "dgain": dgain, "dbias": dbias}


def attention(kernels, q, k, v, dout):
    out, lse = kernels.attention_fwd(q, k, v)
    dq, dk, dv = kernels.attention_bwd(dout, q, k, v, out, lse)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def packed_attention(kernels, q, k, v, dout, first):
    out, lse = kernels.packed_attention_fwd(q, k, v, first)
    dq, dk, dv = kernels.packed_attention_bwd(dout, q, k, v, first, out, lse)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def vocabulary_loss(masked: list[int]) -> Callable[..., dict[str, Tensor]]:
    def run(kernels, x, weight, target):
        count = torch.tensor(int((target >= 0).sum()))
        results = kernels.linear_cross_entropy_pass(x, weight, target, count, 0.01, masked)
        return dict(zip(("ce", "z", "dx", "dweight"), results, strict=True))

    return run


def angles(*shape: int) -> Tensor:
    angle = torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 100
    return torch.stack([angle.cos(), angle.sin()], -2)


def firsts(T: int, *starts: list[int]) -> Tensor:
    """For each row of a batch, given where its documents start: where the one that holds a position does."""
    lengths = [torch.tensor([*row[1:], T]) - torch.tensor(row) for row in starts]
    return torch.stack([torch.tensor(r).repeat_interleave(n) for r, n in zip(starts, lengths, strict=True)])


def targets(N: int, V: int, masked: list[int]) -> Tensor:
    """Targets that the model does not mask; every seventh row is not predicted, the last id is there."""
    target = torch.arange(N) * 37 % V
    target[1] = V - 1
    target[torch.isin(target, torch.tensor(masked))] = 0
    target[::7] = -1
    return target


def _attention(B: int, T: int, H: int, G: int, K: int) -> tuple[tuple[int, ...], ...]:
    return (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)


MASKED = [5, 77, 4097]
CASES = {
    "rms_norm": Case(triton_rms_norm, rms_norm, ((2, 61, 96), (96,), (2, 61, 96))),
    "add_rms_norm": Case(triton_rms_norm, add_rms_norm, (*((3, 17, 130),) * 2, (130,), *((3, 17, 130),) * 2)),
    "qk_norm_rotary": Case(
        triton_qk_norm_rotary, qk_norm_rotary, ((2, 29, 3, 24), (1, 24), (1, 24), (2, 29, 3, 24)), (angles(29, 12),)
    ),
    "qk_norm_rotary, angles for each row": Case(
        triton_qk_norm_rotary, qk_norm_rotary, ((2, 9, 4, 32), (1, 32), (1, 32), (2, 9, 4, 32)), (angles(2, 9, 16),)
    ),
    "attention": Case(triton_attention, attention, _attention(2, 150, 2, 2, 32)),
    "attention, grouped heads": Case(triton_attention, attention, _attention(1, 101, 4, 2, 24)),
    "attention, less than a tile": Case(triton_attention, attention, _attention(3, 3, 2, 1, 16)),
    "packed_attention": Case(
        triton_attention, packed_attention, _attention(2, 150, 4, 2, 32), (firsts(150, [0, 10, 75], [0, 1, 64, 149]),)
    ),
    "vocabulary_loss": Case(triton_vocabulary_loss, vocabulary_loss([]), ((67, 8), (4200, 8)), (targets(67, 4200, []),)),
    "vocabulary_loss, two chunks, masked ids": Case(
        triton_vocabulary_loss, vocabulary_loss(MASKED), ((515, 8), (4200, 8)), (targets(515, 4200, MASKED),)
    ),
}  # fmt: skip


def errors(case: Case, dtype: torch.dtype) -> list[Error]:
    """For each output: the kernel's error and eager's against float64, and what is allowed; shapes and dtypes are the reference's."""
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(shape, generator=generator).to(dtype) for shape in case.floats]
    truth = case.run(reference, *(x.double() for x in floats), *(_double(x) for x in case.others))
    eager = case.run(reference, *floats, *case.others)
    found = []
    for name, got in case.run(case.kernels, *floats, *case.others).items():
        assert (got.shape, got.dtype, got.stride()) == (eager[name].shape, eager[name].dtype, eager[name].stride()), (
            name
        )
        far = lambda y: (y.double() - truth[name]).abs().max().item()  # noqa: B023
        eps = torch.finfo(got.dtype).eps * truth[name].abs().max().item()
        found.append(Error(name, far(got), far(eager[name]), 2 * far(eager[name]) + eps))
    return found


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


if __name__ == "__main__":
    # The interpreter knows a maximum by upstream's name for it; under triton-ascend's it would call Python for each element.
    tl.standard._elementwise_max = tl.max.fn.__globals__["_elementwise_max_default"]
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    print(
        json.dumps({name: {key: errors(case, dtype) for key, dtype in dtypes.items()} for name, case in CASES.items()})
    )
