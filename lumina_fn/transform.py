"""The function transforms that torch.func lacks: remat, jit, and a compiled (forward, backward) pair."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.func import vjp
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import ops


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


Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]  # a flat graph and example inputs -> what runs it


def inductor(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """The graph as machine code. It is flat already: Dynamo would only guard hundreds of parameters again."""
    with torch.no_grad():
        return torch._inductor.compile(graph, examples)


def keep_graph(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """The graph itself, run node by node: what is exported."""
    return graph


def jit(fn: Callable[..., Any], backend: Backend = keep_graph) -> Callable[..., Any]:
    """fn, traced once per argument shapes to a flat graph that `backend` runs.

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
            graphs[key] = backend(graph, examples), out_spec
        graph, out_spec = graphs[key]
        return pytree.tree_unflatten(graph(*leaves), out_spec)

    return wrapped


def compiled_vjp(
    fn: Callable[..., Tensor], *, fixed: tuple[int, ...] = (), keep_inputs: bool = False, backend: Backend = inductor
):
    """fn's (forward, backward), each compiled once per argument shapes and called by hand.

    forward(*args) -> (y, saved); backward(saved, dy) -> gradients of the arguments not in `fixed`, in order.
    keep_inputs=True saves the arguments alone and computes the rest again (remat); `saved` are then equal arguments, wherever
    they come from.
    """
    pairs: dict[Any, Any] = {}

    def pair(args):
        key = tuple((x.shape, x.dtype, x.device) for x in args)
        if key not in pairs:
            build = _recomputing_pair if keep_inputs else _saving_pair
            pairs[key] = build(fn, [torch.empty_like(x) for x in args], fixed, backend)
        return pairs[key]

    def forward(*args):
        run, pull = pair(args)
        with torch.no_grad():
            y, *saved = run(*args)
        return y, args if keep_inputs else (pull, saved)

    def backward(kept, dy):
        pull, saved = (pair(kept)[1], kept) if keep_inputs else kept
        with torch.no_grad():
            return pull(*saved, dy)

    return forward, backward


def _saving_pair(fn, examples, fixed, backend):
    """The joint graph of fn and its vjp, cut where the fewest bytes are kept."""
    flat = [x.requires_grad_(i not in fixed) for i, x in enumerate(examples)]
    decompositions = {**select_decomp_table(), **ops.REFERENCES}
    joint = aot_export_joint_simple(lambda *xs: (fn(*xs),), flat, trace_joint=True, decompositions=decompositions)
    run, pull = min_cut_rematerialization_partition(joint, flat, num_fwd_outputs=1)
    run, pull = (backend(graph, inputs_of(graph)) for graph in (run, pull))
    return run, lambda *args: [g for i, g in enumerate(pull(*args)) if i not in fixed]


def inputs_of(graph: GraphModule) -> list[Tensor]:
    """Fake tensors for the graph's placeholders, as its trace left them."""
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _recomputing_pair(fn, examples, fixed, backend):
    """fn alone, and its vjp from the arguments."""

    def pull(*args):
        *args, dy = args
        free = [i for i in range(len(args)) if i not in fixed]

        def of_free(*xs):
            whole = list(args)
            for i, x in zip(free, xs, strict=True):
                whole[i] = x
            return fn(*whole)

        return vjp(of_free, *(args[i] for i in free))[1](dy)

    trace = make_fx(fn, decomposition_table=ops.REFERENCES, tracing_mode="fake")
    trace_pull = make_fx(pull, decomposition_table=ops.REFERENCES, tracing_mode="fake")
    dy = torch.empty_like(fn(*(x.to("meta") for x in examples)), device=examples[0].device)
    run, pull_graph = backend(trace(*examples), examples), backend(trace_pull(*examples, dy), [*examples, dy])
    return lambda *args: (run(*args),), pull_graph
