"""torch_npu's ops, as far as kernels.ascend calls them, for tracing and export on a machine without torch_npu.

Each has the schema that torch_npu registers (kernels/vendored) and a fake: shapes, dtypes and strides of its outputs, and no
numbers. tests/ascend holds the fakes against those of the wheel (rung 2) and against torch_npu at work (rung 3).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

SCHEMAS = Path(__file__).parent / "vendored" / "npu_schemas.txt"


def declare() -> None:
    """Make torch.ops.npu callable with fake tensors; nothing where torch_npu already did."""
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        return
    schemas = dict(line.split("(", 1) for line in SCHEMAS.read_text().splitlines() if not line.startswith("#"))
    for fake in FAKES:
        name = f"npu::{fake.__name__}"
        torch.library.define(name, f"({schemas[name]}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name)(fake)


def declare_device() -> torch.device:
    """Device npu for fake tensors, in a torch that has none. It stays for the life of the process.

    Autograd then works in the thread that calls it: a thread of the device's own may still be letting go of Python objects when
    the interpreter ends, and that aborts the process after its work is done.
    """
    if torch._C._get_privateuse1_backend_name() != "npu":
        backend_registration._setup_privateuseone_for_python_backend("npu")
        torch.autograd.set_multithreading_enabled(False)
    return torch.device("npu")


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _rstd(x, gamma)


def _rstd(x: Tensor, gamma: Tensor) -> Tensor:
    rows = x.ndim - gamma.ndim
    return x.new_empty((*x.shape[:rows], *[1] * gamma.ndim), dtype=torch.float32)


def npu_rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gamma, dtype=torch.float32)


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x1), _rstd(x1, gamma), torch.empty_like(x1)


def npu_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape)


def npu_rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *(torch.empty_like(r, dtype=x.dtype) for r in (r1, r2))


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


def npu_swiglu_backward(grad_output: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    return torch.empty_like(x)


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    rows = _rows(query, head_num, input_layout)
    largest, total = (query.new_empty((*rows, 8), dtype=torch.float32) for _ in range(2))
    return query.new_empty(query.shape), largest, total, query.new_empty(0), 0, 0, 0


def _rows(query: Tensor, heads: int, layout: str) -> tuple[int, int, int]:
    """Batch, heads and time of a query in one of the two layouts that GE graphs know."""
    if layout == "BSH":
        return query.shape[0], heads, query.shape[1]
    if layout == "BNSD":
        return query.shape[:3]
    raise ValueError(f"layout {layout}: expected BSH or BNSD")


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *_: Any,
    sink: Tensor | None = None, **__: Any,
) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:  # fmt: skip
    _rows(query, head_num, input_layout)
    dsink = query.new_empty(0, dtype=torch.float32) if sink is None else torch.empty_like(sink)
    return *(x.new_empty(x.shape, dtype=query.dtype) for x in (query, key, value)), None, dsink


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, num_heads: int = 1, input_layout: str = "BSH",
    softmax_lse_flag: bool = False, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = _rows(query, num_heads, input_layout)
    return query.new_empty(query.shape), query.new_empty((*rows, 1) if softmax_lse_flag else 0, dtype=torch.float32)


def npu_scatter_nd_update(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return torch.empty_like(x)


def npu_scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return x


FAKES: tuple[Callable[..., Any], ...] = (
    npu_rms_norm, npu_rms_norm_backward, npu_add_rms_norm, npu_rotary_mul, npu_rotary_mul_backward, npu_swiglu,
    npu_swiglu_backward, npu_fusion_attention, npu_fusion_attention_grad, npu_fused_infer_attention_score,
    npu_scatter_nd_update, npu_scatter_nd_update_,
)  # fmt: skip
