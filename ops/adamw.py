"""AdamW as an op, in place or not."""

import torch
from torch import Tensor

from kernels import ascend, reference
from ops.define import define, in_front

_ARGS = "Tensor{p}[] params, Tensor{g}[] grads, Tensor{m}[] mu, Tensor{n}[] nu, Tensor count, Tensor lr, Tensor scale, Tensor skip, float b1, float b2, float eps, float decay"


def _copies(params, grads, mu, nu, *rest):
    params, grads, mu, nu = ([torch.clone(x) for x in leaves] for leaves in (params, grads, mu, nu))
    reference.adamw_(params, grads, mu, nu, *rest)
    return params, mu, nu


def _batched(info, in_dims, *args):
    """vmap rule: one call over leaves with a new first axis; where scalars are batched too, elementwise ops leaf by leaf."""
    lists, scalars, hyper = args[:4], args[4:8], args[8:]
    lists = [in_front(info, dims, *xs) for xs, dims in zip(lists, in_dims[:4], strict=True)]
    if in_dims[4:8] == (None,) * 4:
        return adamw_op(*lists, *scalars, *hyper), ([0] * len(args[0]),) * 3
    scalars = [x[:, None] for x in in_front(info, in_dims[4:8], *scalars)]
    new = [
        [y.view(leaf[0].shape) for y in reference.adamw_of_leaf(*(x.flatten(1) for x in leaf), *scalars, *hyper)]
        for leaf in zip(*lists, strict=True)
    ]
    return tuple(map(list, zip(*new, strict=True))), ([0] * len(args[0]),) * 3


adamw_op = define(
    f"adamw({_ARGS.format(p='', g='', m='', n='')}) -> (Tensor[], Tensor[], Tensor[])",
    fake=lambda params, grads, mu, nu, *rest: tuple(
        [torch.empty_like(x) for x in leaves] for leaves in (params, mu, nu)
    ),
    batched=_batched,
    default=_copies,
    PrivateUse1=ascend.adamw,
)
_adamw_ = define(
    f"adamw_({_ARGS.format(p='(a!)', g='(b!)', m='(c!)', n='(d!)')}) -> ()",
    fake=lambda *args: None,
    default=reference.adamw_,
    PrivateUse1=ascend.adamw_,
)

Leaves = list[Tensor]


def adamw(
    params: Leaves, grads: Leaves, mu: Leaves, nu: Leaves, count: Tensor, lr: Tensor, scale: Tensor, skip: Tensor,
    *, b1: float, b2: float, eps: float, decay: float, donate: bool,
) -> tuple[Leaves, Leaves, Leaves]:  # fmt: skip
    """New params, mu and nu after AdamW's `count`-th update with gradients scale * grads.

    Decay is decoupled and applies to every leaf. If `skip` is 1.0 nothing changes. With donate=True all four lists are
    overwritten: params, mu and nu with their new values, grads with undefined values.
    """
    args = (params, grads, mu, nu, count, lr, scale, skip, b1, b2, eps, decay)
    if donate:
        _adamw_(*args)
        return params, mu, nu
    return adamw_op(*args)
