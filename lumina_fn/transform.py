"""The function transforms that torch.func lacks: remat, jit, and a compiled (forward, backward) pair."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vjp
from torch.fx.experimental.proxy_tensor import make_fx


class _Remat(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(fn, spec, *leaves):
        return fn(*pytree.tree_unflatten(leaves, spec))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn, ctx.spec = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, dy):
        _, pull = vjp(lambda *leaves: ctx.fn(*pytree.tree_unflatten(leaves, ctx.spec)), *ctx.saved_tensors)
        return (None, None, *pull(dy))


def remat(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn, keeping only its arguments for the backward. fn may close over no tensor that needs a gradient.

    torch.utils.checkpoint does not compose with torch.func.
    """

    def wrapped(*args):
        leaves, spec = pytree.tree_flatten(args)
        return _Remat.apply(fn, spec, *leaves)

    return wrapped


def jit(fn: Callable[..., Any], backend: str | None = None) -> Callable[..., Any]:
    """fn, traced once per argument shapes to a flat graph, and compiled by a torch.compile backend if one is named.

    The trace comes first because torch.compile over torch.func.grad drops custom backwards without a word.
    """
    graphs: dict[Any, Callable[..., Any]] = {}

    def wrapped(*args):
        leaves, spec = pytree.tree_flatten(args)
        key = (spec, tuple((x.shape, x.dtype, x.device) for x in leaves))
        if key not in graphs:
            # Fresh examples: a tensor that occurs twice among the arguments would be traced as one input.
            examples = [torch.empty_like(x) for x in leaves]
            out_spec = None

            def flat(*xs):
                nonlocal out_spec
                ys, out_spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(xs, spec)))
                return ys

            graph = make_fx(flat, tracing_mode="fake")(*examples)
            graphs[key] = (torch.compile(graph, backend=backend, fullgraph=True) if backend else graph), out_spec
        graph, out_spec = graphs[key]
        return pytree.tree_unflatten(graph(*leaves), out_spec)

    return wrapped
