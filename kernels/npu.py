"""Ops that no single op of torch_npu covers, run eagerly on an NPU: our Triton kernels, if triton-ascend is installed.

Without it, and for arguments that a kernel does not take, the compositions of kernels.ascend run; exported graphs use those too.
"""

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import ascend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 64 * 128  # heads by their channels that lie in a core's unified buffer at once; rung 6 plans them


@cache
def triton_ascend() -> bool:
    """Whether the installed triton is Ascend's (upstream's has no compiler for an NPU), found without importing it."""
    found = find_spec("triton")
    folders = found.submodule_search_locations if found else None
    return any((Path(folder) / "backends" / "ascend").is_dir() for folder in folders or ())


@cache
def _kernels(name: str, there: bool) -> ModuleType:
    return import_module(name) if there else ascend


def _ours(name: str, fits: bool) -> ModuleType:
    """Our module of that name, imported at first use, since triton is slow to load and absent on a CPU; else kernels.ascend."""
    return _kernels(name, fits and triton_ascend())


def _qk_norm_rotary(x: Tensor, gain: Tensor) -> ModuleType:
    """Our kernel holds one gain: a second tile of them would not fit beside the others."""
    return _ours("kernels.triton_qk_norm_rotary", x.dtype in DTYPES and _tile(x) <= TILE and gain.shape[0] == 1)


def _tile(x: Tensor) -> int:
    """How many numbers the kernel's tile of a token has; the sides of a tile are powers of two."""
    return math.prod(1 << (n - 1).bit_length() for n in x.shape[2:])


def qk_norm_rotary_fwd(x: Tensor, gain: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """kernels.reference.qk_norm_rotary_fwd, by our Triton kernel where it takes x and gain, else by kernels.ascend."""
    return _qk_norm_rotary(x, gain).qk_norm_rotary_fwd(x, gain, *rest)


def qk_norm_rotary_bwd(dy: Tensor, x: Tensor, gain: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """kernels.reference.qk_norm_rotary_bwd, by our Triton kernel where it takes x and gain, else by kernels.ascend."""
    return _qk_norm_rotary(x, gain).qk_norm_rotary_bwd(dy, x, gain, *rest)


def linear_cross_entropy_pass(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels.reference.linear_cross_entropy_pass, by our Triton kernel where it takes x, else by kernels.ascend."""
    return _ours("kernels.triton_vocabulary_loss", x.dtype in DTYPES).linear_cross_entropy_pass(x, *rest)
