"""The function transforms that torch.func lacks: remat, jit, and a (forward, backward) pair that its caller applies.

The compiler is imported at first use: its import takes two seconds, which other commands do not need to spend.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import optree
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vjp
from torch.fx import Graph, GraphModule, Node
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
        leaves = ctx.saved_tensors
        floats = [i for i, x in enumerate(leaves) if x.is_floating_point()]  # ids and positions have no gradient

        def of_floats(*xs):
            given = dict(zip(floats, xs, strict=True))
            return ctx.fn(*pytree.tree_unflatten([given.get(i, x) for i, x in enumerate(leaves)], ctx.spec))

        pull = vjp(of_floats, *(leaves[i] for i in floats))[1]
        grads = dict(zip(floats, pull(dy), strict=True))
        return (None, None, *(grads.get(i) for i in range(len(leaves))))


def remat(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn with only its arguments kept for the backward, which computes fn again. fn may close over no tensor that needs a gradient.

    torch.utils.checkpoint does not compose with torch.func.
    """

    def wrapped(*args):
        leaves, spec = pytree.tree_flatten(args)
        return _Remat.apply(fn, spec, *leaves)

    return wrapped


Backend = Callable[
    [GraphModule, list[Tensor]], Callable[..., Any]
]  # (flat graph, example inputs) -> a function that runs it


def inductor(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """The graph compiled by Inductor, without Dynamo, which would add guards for hundreds of parameters."""
    from lumina_fn.disk import compile_cache

    with torch.no_grad():
        return compile_cache.compiled(graph, examples)


def keep_graph(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """The graph itself, run node by node, as for export."""
    return graph


def jit(
    fn: Callable[..., Any], backend: Backend = keep_graph, decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> Callable[..., Any]:  # fmt: skip
    """fn, traced once per argument shapes to a flat graph that `backend` runs; `decompositions` replace ops in the trace.

    The trace comes first because torch.compile over torch.func.grad ignores custom backwards without an error.
    """
    graphs: dict[Any, tuple[Callable[..., Any], Any]] = {}  # a runner, and the tree structure of its result

    def wrapped(*args):
        tree: Any = args  # optree's annotation names a class, but it takes any tree
        leaves, spec = optree.tree_flatten(tree, namespace="lumina")
        key = (spec, tuple((x.shape, x.dtype, x.device) for x in leaves))
        if key not in graphs:
            # Fresh examples: a tensor that occurs twice among the arguments would be traced as one input.
            examples = [torch.empty_like(x) for x in leaves]
            out_spec: Any = None

            def flat(*xs):
                nonlocal out_spec
                ys, out_spec = optree.tree_flatten(fn(*optree.tree_unflatten(spec, xs)), namespace="lumina")
                return ys

            graph = make_fx(flat, decomposition_table=decompositions, tracing_mode="fake")(*examples)
            graphs[key] = backend(graph, examples), out_spec
        graph, out_spec = graphs[key]
        return optree.tree_unflatten(out_spec, graph(*leaves))

    return wrapped


class Pair(NamedTuple):
    """A function of (x, *others) and its backward, applied by the caller, which decides what stays in memory in between.

    forward(x, *others) -> (y, residuals); backward(residuals, x, *others, dy) -> gradients of the arguments that are not
    fixed, in order. The residuals are what the backward needs besides the arguments, which are passed again: the others may
    have been freed and recomputed in between.
    """

    forward: Callable[..., tuple[Tensor, Any]]
    backward: Callable[..., list[Tensor]]


def eager_pair(fn: Callable[..., Tensor], *, fixed: tuple[int, ...] = (), keep_inputs: bool = False) -> Pair:
    """fn's pair by torch.func, which can be traced. Its residuals hold the arguments too; with keep_inputs they are empty."""
    free = lambda args: [i for i in range(len(args)) if i not in fixed]

    def of_free(*args):
        def call(*xs):
            whole = list(args)
            for i, x in zip(free(args), xs, strict=True):
                whole[i] = x
            return fn(*whole)

        return vjp(call, *(args[i] for i in free(args)))[:2]  # without has_aux there is no third

    if keep_inputs:
        return Pair(lambda *args: (fn(*args), ()), lambda _, *args: of_free(*args[:-1])[1](args[-1]))
    return Pair(of_free, lambda pull, *args: pull(args[-1]))


def compiled_pair(
    fn: Callable[..., Tensor], *, fixed: tuple[int, ...] = (), keep_inputs: bool = False, backend: Backend = inductor
) -> Pair:
    """fn's pair, compiled once per argument shapes. With keep_inputs=True there are no residuals: the backward computes fn again."""
    pairs: dict[Any, Pair] = {}

    def pair(args) -> Pair:
        key = tuple((x.shape, x.dtype, x.device) for x in args)
        if key not in pairs:
            build = _recomputing if keep_inputs else _saving
            pairs[key] = build(fn, [torch.empty_like(x) for x in args], fixed, backend)
        return pairs[key]

    def forward(*args):
        run = pair(args).forward
        with torch.no_grad():
            return run(*args)

    def backward(residuals, *args):
        pull = pair(args[:-1]).backward
        with torch.no_grad():
            return pull(residuals, *args)

    return Pair(forward, backward)


def _recomputing(fn, examples, fixed, backend) -> Pair:
    """The pair of fn and its vjp from the arguments alone, without residuals."""
    backward = eager_pair(fn, fixed=fixed, keep_inputs=True).backward
    dy = torch.empty_like(fn(*(x.to("meta") for x in examples)), device=examples[0].device)
    trace = lambda f: make_fx(f, decomposition_table=ops.REFERENCES, tracing_mode="fake")
    run = backend(trace(fn)(*examples), examples)
    pull = backend(trace(lambda *args: backward((), *args))(*examples, dy), [*examples, dy])
    return Pair(lambda *args: (run(*args), ()), lambda _, *args: pull(*args))


def _saving(fn, examples, fixed, backend) -> Pair:
    """The pair that keeps the fewest bytes: the joint graph of fn and its vjp, cut at a minimum."""
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    flat = tuple(x.requires_grad_(i not in fixed) for i, x in enumerate(examples))
    decompositions = {**select_decomp_table(), **ops.REFERENCES}
    joint = aot_export_joint_simple(lambda *xs: (fn(*xs),), flat, trace_joint=True, decompositions=decompositions)
    assert isinstance(joint, GraphModule)
    graphs = _take_arguments_again(*min_cut_rematerialization_partition(joint, flat, num_fwd_outputs=1))
    run, pull = (backend(graph, inputs_of(graph)) for graph in graphs)

    def forward(*args):
        y, *residuals = run(*args)
        return y, residuals

    def backward(residuals, *args):
        return [g for i, g in enumerate(pull(*args[:-1], *residuals, args[-1])) if i not in fixed]

    return Pair(forward, backward)


def _take_arguments_again(run: GraphModule, pull: GraphModule) -> tuple[GraphModule, GraphModule]:
    """Graphs (args) -> (y, residuals) and (args, residuals, dy) -> gradients, where no residual comes from parameters alone.

    Views and casts of parameters, which the partition saves, would keep a whole unit alive; the backward computes them again.
    """
    args = [node for node in run.graph.nodes if node.op == "placeholder"]
    y, *saved = cast("tuple[Node, ...]", run.graph.output_node().args[0])  # fx allows any value there
    *_, dy = (node for node in pull.graph.nodes if node.op == "placeholder")
    streams = {args[0]}  # nodes that depend on x
    for node in run.graph.nodes:
        if streams & set(node.all_input_nodes):
            streams.add(node)
    residuals = [node for node in saved if node in streams and node is not args[0]]

    graph = Graph()
    known: dict[Node, Node] = {node: graph.node_copy(node) for node in args}
    known |= {node: _placeholder(graph, node) for node in residuals}
    known[dy] = graph.node_copy(dy)

    def derived(node: Node) -> Node:
        if node not in known:
            known[node] = graph.node_copy(node, derived)
        return known[node]

    stands_for = dict(zip((n for n in pull.graph.nodes if n.op == "placeholder" and n is not dy), saved, strict=True))
    known |= {placeholder: derived(node) for placeholder, node in stands_for.items()}
    for node in pull.graph.nodes:
        derived(node)

    run.graph.output_node().args = ((y, *residuals),)
    run.recompile()
    return run, GraphModule(pull, graph)


def _placeholder(graph: Graph, node: Node) -> Node:
    new = graph.placeholder(node.name)
    new.meta = dict(node.meta)
    return new


def inputs_of(graph: GraphModule) -> list[Tensor]:
    """The fake tensors of the graph's placeholders, recorded by its trace."""
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
