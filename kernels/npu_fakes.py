"""torch_npu's ops, as far as kernels.ascend calls them, for tracing and export on a machine without torch_npu.

Each has the schema that torch_npu registers (kernels/vendored) and a fake: shapes, dtypes and strides of its outputs, and no
numbers. tests/ascend compares the fakes with those of the wheel (rung 2) and with torch_npu itself (rung 3).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

SCHEMAS = Path(__file__).parent / "vendored" / "npu_schemas.txt"


def declare() -> None:
    """Make torch.ops.npu callable with fake tensors; does nothing where torch_npu has already done so."""
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        return
    schemas = dict(line.split("(", 1) for line in SCHEMAS.read_text().splitlines() if not line.startswith("#"))
    for fake in FAKES:
        name = f"npu::{fake.__name__}"
        torch.library.define(name, f"({schemas[name]}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name)(fake)


def declare_device() -> torch.device:
    """The device npu for fake tensors, registered in a torch that lacks it until the process ends.

    Autograd then runs in the calling thread: a thread of the device may still release Python objects while the interpreter
    ends, which aborts the process.
    """
    if torch._C._get_privateuse1_backend_name() != "npu":
        backend_registration._setup_privateuseone_for_python_backend("npu")
        torch.autograd.set_multithreading_enabled(False)
    return torch.device("npu")


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The normed x, and 1 / rms in float32."""
    return torch.empty_like(x), _rstd(x, gamma)


def _rstd(x: Tensor, gamma: Tensor) -> Tensor:
    rows = x.ndim - gamma.ndim
    return x.new_empty((*x.shape[:rows], *[1] * gamma.ndim), dtype=torch.float32)


def npu_rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and that of gamma in float32."""
    return torch.empty_like(x), torch.empty_like(gamma, dtype=torch.float32)


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The normed sum, 1 / rms in float32, and the sum x1 + x2."""
    return torch.empty_like(x1), _rstd(x1, gamma), torch.empty_like(x1)


def npu_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """The rotated x."""
    return x.new_empty(x.shape)


def npu_rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, r1 and r2."""
    return torch.empty_like(x), torch.empty_like(r1, dtype=x.dtype), torch.empty_like(r2, dtype=x.dtype)


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu of the first half of x along `dim`, times the second half."""
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


def npu_swiglu_backward(grad_output: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """The gradient of x."""
    return torch.empty_like(x)


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """The output; each row's largest score and sum of exponentials [B H T 8] in float32; an empty tensor; and three numbers."""
    rows = _rows(query, head_num, input_layout)
    largest, total = (query.new_empty((*rows, 8), dtype=torch.float32) for _ in range(2))
    return query.new_empty(query.shape), largest, total, query.new_empty(0), 0, 0, 0


def _rows(query: Tensor, heads: int, layout: str) -> tuple[int, int, int]:
    """Batch, heads and time of a query in one of the two layouts that GE graphs know."""
    if layout == "BSH":
        return query.shape[0], heads, query.shape[1]
    if layout == "BNSD":
        return query.shape[0], query.shape[1], query.shape[2]
    raise ValueError(f"layout {layout}: expected BSH or BNSD")


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *_: Any,
    sink: Tensor | None = None, **__: Any,
) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:  # fmt: skip
    """The gradients of query, key and value, None, and the gradient of `sink` (empty where there is none)."""
    _rows(query, head_num, input_layout)
    dsink = query.new_empty(0, dtype=torch.float32) if sink is None else torch.empty_like(sink)
    dq, dk, dv = (x.new_empty(x.shape, dtype=query.dtype) for x in (query, key, value))
    return dq, dk, dv, None, dsink


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int = 1, input_layout: str = "BSH",
    softmax_lse_flag: bool = False, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the log-sum-exp in float32 (empty unless softmax_lse_flag)."""
    rows = _rows(query, num_heads, input_layout)
    return query.new_empty(query.shape), query.new_empty((*rows, 1) if softmax_lse_flag else 0, dtype=torch.float32)


def npu_scatter_nd_update(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy of x with the updates at the indices."""
    return torch.empty_like(x)


def npu_scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """x itself, with the updates at the indices."""
    return x


FAKES: tuple[Callable[..., Any], ...] = (
    npu_rms_norm, npu_rms_norm_backward, npu_add_rms_norm, npu_rotary_mul, npu_rotary_mul_backward, npu_swiglu,
    npu_swiglu_backward, npu_fusion_attention, npu_fusion_attention_grad, npu_fused_infer_attention_score,
    npu_scatter_nd_update, npu_scatter_nd_update_,
)  # fmt: skip
