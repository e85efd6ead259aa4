"""Give a kernel a name that PyTorch can dispatch by device, fake, batch and trace.

`torch.library.custom_op` is not used: it installs an autograd kernel, which `torch.func.grad` rejects. An op defined
here has no derivative; the `autograd.Function` next to it pairs a forward op with a backward op.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def define(
    schema: str, *, fake: Callable[..., Any], batched: Callable[..., Any] | None = None, **devices: Callable[..., Any]
):
    """Define `lumina::<schema>` and return it.

    `devices` maps a dispatch key to its implementation: `default` (any device), `PrivateUse1` (Ascend), ...
    `fake` returns outputs of the right shapes and dtypes; `batched(info, in_dims, *args)` is its vmap rule.
    """
    name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
    torch.library.define(f"lumina::{name}", signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lumina::{name}")(fake)
    for device, implementation in devices.items():
        torch.library.impl(f"lumina::{name}", device, implementation)
    if batched is not None:
        torch.library.register_vmap(f"lumina::{name}", batched)
    return getattr(torch.ops.lumina, name).default


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args); where gradients are disabled its forward alone, which saves 20 to 50 us per call."""
    return (function.apply if torch.is_grad_enabled() else function.forward)(*args)


def in_front(info: Any, in_dims: Sequence[Any], *args: Any) -> list[Any]:
    """The arguments of a vmap rule with the batched axis first in every tensor; a tensor without that axis is expanded."""
    n = info.batch_size
    place = lambda x, d: x.movedim(d, 0) if d is not None else x.expand(n, *x.shape)
    return [place(x, d) if isinstance(x, Tensor) else x for x, d in zip(args, in_dims, strict=True)]


def against(p: Tensor, x: Tensor) -> Tensor:
    """A parameter with a new first axis, [S ..], shaped to broadcast with x [S .. ..]."""
    return p.reshape(p.shape[0], *[1] * (x.ndim - p.ndim), *p.shape[1:])


def folded(op: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of an op that treats all rows of the first axis alike: it folds the batched axis into that axis."""

    def rule(info, in_dims, *args):
        flat = (x.flatten(0, 1) if isinstance(x, Tensor) else x for x in in_front(info, in_dims, *args))
        apart = lambda y: y.unflatten(0, (info.batch_size, -1))
        out = op(*flat)
        return (apart(out), 0) if isinstance(out, Tensor) else (tuple(map(apart, out)), (0,) * len(out))

    return rule
