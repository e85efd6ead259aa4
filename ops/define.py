"""Give a kernel a name that PyTorch can dispatch by device, fake, batch and trace.

`torch.library.custom_op` is not used: it installs an autograd kernel, which `torch.func.grad` rejects. An op defined
here knows no derivative; the `autograd.Function` next to it pairs a forward op with a backward op.
"""

from collections.abc import Callable
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
        torch.library.impl(f"lumina::{name}", device)(implementation)
    if batched is not None:
        torch.library.register_vmap(f"lumina::{name}")(batched)
    return getattr(torch.ops.lumina, name).default


def folded(op: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of an op that treats the rows of every tensor's first axis alike: fold the new axis into it."""

    def rule(info, in_dims, *args):
        n = info.batch_size
        spread = lambda x, d: x.movedim(d, 0) if d is not None else x.expand(n, *x.shape)
        outputs = op(
            *(spread(x, d).flatten(0, 1) if isinstance(x, Tensor) else x for x, d in zip(args, in_dims, strict=True))
        )
        return tuple(y.unflatten(0, (n, -1)) for y in outputs), (0,) * len(outputs)

    return rule


def looped(op: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of any other op: one item after the other. (vmap of its reference inside a rule is refused by torch.)"""

    def rule(info, in_dims, *args):
        pick = lambda i: (x.select(d, i) if isinstance(d, int) else x for x, d in zip(args, in_dims, strict=True))
        items = [op(*pick(i)) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*items, strict=True))), (0,) * len(items[0])

    return rule
