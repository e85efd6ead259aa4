"""What an NPU runs op by op where no fused op of torch_npu does the whole: our Triton kernels, if triton-ascend is installed.

Without it, and for what they do not take, kernels.ascend's compositions run; these are also what a graph is made of.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import ascend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = 64  # of which all lie in a core's unified buffer at once; rung 6 plans them


@cache
def _kernels(name: str, there: bool) -> ModuleType:
    return import_module(name) if there else ascend


def _ours(name: str, fits: bool) -> ModuleType:
    """Our module of that name, imported when it is first needed: triton is slow to load, and no CPU has it."""
    return _kernels(name, fits and find_spec("triton") is not None)


def _qk_norm_rotary(x: Tensor) -> ModuleType:
    return _ours("kernels.triton_qk_norm_rotary", x.dtype in DTYPES and x.shape[2] <= HEADS)


def qk_norm_rotary_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _qk_norm_rotary(x).qk_norm_rotary_fwd(x, *rest)


def qk_norm_rotary_bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _qk_norm_rotary(x).qk_norm_rotary_bwd(dy, x, *rest)


def linear_cross_entropy_pass(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _ours("kernels.triton_vocabulary_loss", x.dtype in DTYPES).linear_cross_entropy_pass(x, *rest)
