import torch
from torch import Tensor

from kernels import reference
from ops.define import define

_ARGS = "Tensor{p}[] params, Tensor{g}[] grads, Tensor{m}[] mu, Tensor{n}[] nu, Tensor count, Tensor lr, Tensor scale, Tensor skip, float b1, float b2, float eps, float decay"


def _copies(params, grads, mu, nu, *rest):
    params, grads, mu, nu = ([torch.clone(x) for x in leaves] for leaves in (params, grads, mu, nu))
    reference.adamw_(params, grads, mu, nu, *rest)
    return params, mu, nu


_adamw = define(
    f"adamw({_ARGS.format(p='', g='', m='', n='')}) -> (Tensor[], Tensor[], Tensor[])",
    fake=lambda params, grads, mu, nu, *rest: tuple(
        [torch.empty_like(x) for x in leaves] for leaves in (params, mu, nu)
    ),
    default=_copies,
)
_adamw_ = define(
    f"adamw_({_ARGS.format(p='(a!)', g='(b!)', m='(c!)', n='(d!)')}) -> ()",
    fake=lambda *args: None,
    default=reference.adamw_,
)

Leaves = list[Tensor]


def adamw(
    params: Leaves, grads: Leaves, mu: Leaves, nu: Leaves, count: Tensor, lr: Tensor, scale: Tensor, skip: Tensor,
    *, b1: float, b2: float, eps: float, decay: float, donate: bool,
) -> tuple[Leaves, Leaves, Leaves]:  # fmt: skip
    """AdamW's `count`-th update of every leaf with gradients scale * grads; new params, mu and nu.

    Decay is decoupled and reaches every leaf. Where `skip` is 1.0 nothing changes. With donate=True all four
    trees are written over: params, mu and nu with the new ones, grads with anything.
    """
    args = (params, grads, mu, nu, count, lr, scale, skip, b1, b2, eps, decay)
    if donate:
        _adamw_(*args)
        return params, mu, nu
    return _adamw(*args)
