"""AdamW over parameter trees, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from jaxtyping import Float
from torch import Tensor

import ops

Schedule = Callable[[Tensor], Tensor | float]  # learning rate of a step, counted from 0


class AdamW(NamedTuple):
    """Hyperparameters of AdamW: decoupled decay of every parameter, after gradients are clipped to a global norm."""

    lr: float | Schedule = 2e-5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    decay: float = 1e-2
    clip: float = 1.0  # global norm; math.inf: never clip


def constant(lr: float, warmup: int = 0) -> Schedule:
    """lr, after rising linearly over `warmup` steps."""
    return lambda step: lr * _rise(step, warmup)


def cosine(lr: float, warmup: int, steps: int) -> Schedule:
    """lr, after rising linearly over `warmup` steps, falling along half a cosine to 0 at `steps`."""
    span = max(steps - warmup, 1)
    fall = lambda step: 0.5 + 0.5 * torch.cos(math.pi * ((step - warmup) / span).clamp(0, 1))
    return lambda step: lr * _rise(step, warmup) * fall(step)


def _rise(step: Tensor, warmup: int) -> Tensor | float:
    return ((step + 1) / warmup).clamp(max=1) if warmup else 1.0


def rate(opt: AdamW, step: Tensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, ""]:
    """The learning rate of a step (counted from 0), on the step's device."""
    lr = opt.lr(step) if callable(opt.lr) else opt.lr
    return torch.as_tensor(lr, dtype=dtype, device=step.device)


def global_norm(grads) -> Float[Tensor, ""]:
    """Euclidean norm over every leaf, in float32 or wider."""
    leaves = pytree.tree_leaves(grads)
    wide = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in leaves]))


class Now(NamedTuple):
    """The scalars of one update."""

    count: Tensor  # of updates so far, this one included
    lr: Tensor
    norm: Tensor  # of the gradients over all ranks
    skip: Tensor  # bool: change nothing


def update(opt: AdamW, now: Now, params, grads, moments: tuple, *, donate: bool):
    """An update of a tree, whose moments are (mu, nu): new (params, mu, nu)."""
    count, lr, norm, skip = now
    mu, nu = moments
    scale = (opt.clip / (norm + 1e-6)).clamp(max=1)
    spec = pytree.tree_structure(params)
    p, g, m, v = (pytree.tree_leaves(tree) for tree in (params, grads, mu, nu))
    new = ops.adamw(
        p, g, m, v, count, lr, scale, skip, b1=opt.b1, b2=opt.b2, eps=opt.eps, decay=opt.decay, donate=donate
    )
    return tuple(pytree.tree_unflatten(x, spec) for x in new)
