"""How many bytes are alive while functions run, by purpose, measured on tensors without storage."""

import operator
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """While active, counts the memory of every new tensor under the current label, until it is freed.

    most     for each moment since the first phase, the bytes by label when their sum was largest
    kernels  functions that replace an op, so that their temporaries are counted
    scratch  functions of an op's arguments: bytes of temporaries, for ops whose temporaries cannot be counted
    """

    def __init__(
        self, kernels: Mapping[Any, Callable[..., Any]], scratch: Mapping[Any, Callable[..., int]], label: str
    ):  # fmt: skip
        super().__init__()
        self.kernels, self.scratch = kernels, scratch
        self.label, self.moment = label, None
        self.now: Counter[str] = Counter()
        self.most: dict[str, Counter[str]] = {}
        self._known: dict[
            int, tuple[int, str, weakref.ref]
        ] = {}  # for each storage: bytes, label, a reference that notices its end

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.kernels:
            with self:
                return self.kernels[func](*args)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in self._known:
                self._track(storage)
        if func in self.scratch:
            self.pass_by(self.scratch[func](*args))
        return out

    def hold(self, tree: Any, label: str) -> None:
        """Count the memory of the tree's tensors under this label; memory already counted gets this label."""
        for storage in _storages(tree):
            if id(storage) not in self._known:
                self._track(storage)
            self._relabel(id(storage), label)

    def pass_by(self, size: int) -> None:
        """Count bytes that are allocated and freed at once, under the current label."""
        self._add(self.label, size)
        self.now[self.label] -= size

    @contextmanager
    def phase(self, moment: str, label: str, after: str) -> Iterator[None]:
        """Begin a moment; tensors made in the block have `label`, and `after` once it ends. The moment lasts until the next begins."""
        known, outer = set(self._known), self.label
        self.moment, self.label = moment, label
        self._add(label, 0)
        yield
        self.label = outer
        for key in self._known.keys() - known:
            self._relabel(key, after)

    def _track(self, storage: UntypedStorage) -> None:
        key = id(storage)
        self._known[key] = (storage.nbytes(), self.label, weakref.ref(storage, lambda _: self._free(key)))
        self._add(self.label, storage.nbytes())

    def _free(self, key: int) -> None:
        size, label, _ = self._known.pop(key)
        self.now[label] -= size

    def _relabel(self, key: int, label: str) -> None:
        size, old, end = self._known[key]
        self._known[key] = (size, label, end)
        self.now[old] -= size
        self.now[label] += size

    def _add(self, label: str, size: int) -> None:
        self.now[label] += size
        if self.moment is not None and self.most.get(self.moment, Counter()).total() < self.now.total():
            self.most[self.moment] = Counter(self.now)


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def fused_peak(graph: GraphModule) -> int:
    """The peak bytes of the graph's own tensors, outputs included, when it is compiled.

    A compiler fuses elementwise nodes into the nodes that read them where it can, or writes them over a tensor not read later.
    """
    nodes = _needed(graph)
    memory = _memory(nodes)
    written = _written(nodes, memory)
    reads: dict[Node, set[Node]] = {}  # tensors that a node reads, itself or by nodes fused into it
    last: dict[Node, Node] = {}
    for node in nodes:
        sources = {memory[source] for source in node.all_input_nodes}
        reads[node] = set().union(*({s} if s in written else reads[s] for s in sources))
        if node in written or node.op == "output":
            last |= dict.fromkeys(reads[node], node)
    live: dict[Node, int] = {}
    peak = 0
    for node in nodes:
        if node not in written:
            continue
        size = _bytes(node)
        over = (s for s in reads[node] if _elementwise(node) and last[s] is node and live[s] == size)
        live.pop(next(over, node), None)
        live[node] = size
        peak = max(peak, sum(live.values()))
        for source in reads[node]:
            if last[source] is node:
                live.pop(source, None)
    return peak


def outline(graph: GraphModule) -> Callable[..., Any]:
    """A function of the graph's arguments that computes nothing, and returns tensors without storage of the outputs' shapes."""
    nodes = _needed(graph)
    memory, arguments = _memory(nodes), [node for node in graph.graph.nodes if node.op == "placeholder"]

    def run(*args):
        made = dict(zip(arguments, args, strict=True))

        def output(node: Node) -> Tensor:
            source, like = memory[node], node.meta["val"]
            if source not in made:
                whole = source.meta["val"]
                made[source] = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="meta")
            return made[source].as_strided(like.shape, like.stride(), like.storage_offset())

        return pytree.tree_map_only(Node, output, graph.graph.output_node().args[0])

    return run


def outputs(graph: GraphModule) -> int:
    """Bytes of the graph's outputs, without arguments that are returned."""
    memory = _memory(_needed(graph))
    made = {memory[node] for node in graph.graph.output_node().all_input_nodes}
    return sum(_bytes(node) for node in made if node.op != "placeholder")


def _needed(graph: GraphModule) -> list[Node]:
    """The nodes that the output depends on, in order."""
    needed, found = set(), [graph.graph.output_node()]
    while found:
        node = found.pop()
        if node not in needed:
            needed.add(node)
            found += node.all_input_nodes
    return [node for node in graph.graph.nodes if node in needed]


def _memory(nodes: list[Node]) -> dict[Node, Node]:
    """For each node the node that owns its memory: itself, unless it is a view."""
    memory: dict[Node, Node] = {}
    for node in nodes:
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        view = node.target is torch.ops.aten._unsafe_view.default
        view |= any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if node.target is operator.getitem:
            whole = node.all_input_nodes[0]
            view |= memory[whole] is not whole
        memory[node] = memory[node.all_input_nodes[0]] if view else node
    return memory


def _written(nodes: list[Node], memory: dict[Node, Node]) -> set[Node]:
    """The nodes whose values a compiler must write to memory: those not fused into all their readers."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes:
        if memory[node] is node:
            for source in node.all_input_nodes:
                readers[memory[source]].append(node)
    inside = lambda node: _elementwise(node) and all(_elementwise(n) or _reduces(n) for n in readers[node])
    own = (n for n in nodes if memory[n] is n and n.op == "call_function" and isinstance(n.meta.get("val"), Tensor))
    return {node for node in own if not inside(node)}


_FUSED = {
    "cat",
    "empty_like",
    "fill_",
    "full",
    "zeros",
    "_to_copy",
}  # elementwise to a compiler, though without the tag
_LAYER_NORM = {"native_layer_norm", "native_layer_norm_backward"}


def _elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _name(node) in _FUSED


def _reduces(node: Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ()) or _name(node) in _LAYER_NORM


def _name(node: Node) -> str:
    return node.target._opname if isinstance(node.target, OpOverload) else ""


def _bytes(node: Node) -> int:
    return node.meta["val"].numel() * node.meta["val"].element_size()
