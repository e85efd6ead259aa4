"""Tensors end to end in one vector, as an op."""

import torch
from torch import Tensor

from kernels import reference
from ops.define import define

join_op = define(
    "join(Tensor[] leaves, int size, ScalarType dtype) -> Tensor",
    fake=lambda leaves, size, dtype: leaves[0].new_empty(size, dtype=dtype),
    default=reference.join,
)


def join(leaves: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The leaves end to end in one vector of `size` values of `dtype`, padded with zeros. Not differentiable."""
    return join_op(leaves, size, dtype)
