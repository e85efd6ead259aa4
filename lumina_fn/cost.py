"""What a training step takes on one device: bytes by walking it on tensors without storage, FLOPs and traffic by arithmetic."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import ops
from kernels import reference
from lumina_fn import live, model, optim, train
from lumina_fn.config import ModelConfig
from lumina_fn.live import Live
from lumina_fn.loss import Batch
from lumina_fn.sharding import Mesh
from lumina_fn.transform import Pair, compiled_pair, eager_pair
from lumina_fn.walk import seams, walk
from ops import collectives

# What bytes are for.
PARAMETERS = "parameters"
MOMENTS = "AdamW's moments"
GRADIENTS = "gradients"
KEPT = "activations kept"
GATHERED = "gathered units"
BLOCK = "inside a block"  # what its forward or backward needs on the way
WHOLE = "a unit's gradients"  # before they are summed over ranks
REDUCED = "flat copies of them"
LOSS = "loss chunks"
LABELS = (PARAMETERS, MOMENTS, GRADIENTS, KEPT, GATHERED, BLOCK, WHOLE, REDUCED, LOSS)


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as `make_train_step` and its mesh are told; the step writes over its state."""

    devices: int = 1  # one has no mesh
    strategy: str = "fsdp"
    shard_size: int | None = None  # of the hybrids
    tokens: int = 1024  # T
    micro_batch: int = 1  # B
    micro_batches: int = 1  # A
    dtype: torch.dtype = torch.float32  # of compute
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    remat: bool = False
    compiled: bool = False  # the blocks
    sync: bool = True
    forward_prefetch: bool = False
    backward_prefetch: bool = False
    staged: bool = False  # collectives copy what they gather and scatter, as gloo's do

    @property
    def mesh(self) -> Mesh | None:
        """Rank 0's, with groups that nobody formed: of tensors without storage no byte is sent."""
        if self.devices == 1:
            return None
        if not self.strategy.startswith("hybrid"):
            return Mesh("none", 0, self.devices, "meta", self.strategy, self.param_dtype, self.reduce_dtype)
        within = "fsdp" if self.strategy == "hybrid" else "sdp"
        mesh = Mesh("none", 0, self.shard_size, "meta", within, self.param_dtype, self.reduce_dtype)
        object.__setattr__(mesh, "replicas", ("none", self.devices // self.shard_size))
        return mesh

    @property
    def keeps_inputs(self) -> bool:
        """Whether a block keeps only its input."""
        return self.remat or (not self.compiled and self.mesh is not None and self.mesh.regathers)


def memory(cfg: ModelConfig, setup: Setup) -> dict[str, Counter[str]]:
    """Bytes by label at the fullest point of each moment of a step, in order; blocks between the first and the last are left out.

    Every moment grows with the layers by as much from each to the next, so that three tell of any number.
    """
    if cfg.layers <= 3:
        return _trace(cfg, setup)
    two, three = (_trace(replace(cfg, layers=n), setup) for n in (2, 3))
    more = lambda a, b: Counter({label: b[label] + (cfg.layers - 3) * (b[label] - a[label]) for label in a | b})
    return {moment: more(two[moment], three[moment]) for moment in two}


def peak(cfg: ModelConfig, setup: Setup) -> tuple[str, Counter[str]]:
    """The moment that takes most, and its bytes by label."""
    return max(memory(cfg, setup).items(), key=lambda item: item[1].total())


def kept(cfg: ModelConfig, setup: Setup) -> int:
    """Bytes that a block adds to what is kept for the backward: its output, and what its backward needs beyond its arguments."""
    pair, _ = _block(replace(cfg, layers=1), setup)
    watch, arguments = _watch(setup), _arguments(cfg, setup)
    watch.hold(arguments, KEPT)
    before = watch.now.total()
    with watch:
        alive = pair.forward(*arguments)
    after = watch.now.total()
    del alive
    return after - before


def _trace(cfg: ModelConfig, setup: Setup) -> dict[str, Counter[str]]:
    """`memory`, seen in a step of all layers: the last of its micro batches, and the update."""
    watch, mesh = _watch(setup), setup.mesh
    masters = torch.promote_types(setup.dtype, torch.float32)
    whole = model.init(cfg, device="meta", dtype=masters)
    state = train.init_state(whole, optim.AdamW(), mesh)
    seam, blocks = seams(mesh, setup.dtype), _block_names(cfg)
    units = ["the embedding", *blocks, "the head"]
    before = None
    if setup.micro_batches > 1:
        before = pytree.tree_map(torch.empty_like, state.params if setup.sync else whole)
    for tree, label in ((state.params, PARAMETERS), ((state.mu, state.nu), MOMENTS), (before, GRADIENTS)):
        watch.hold(tree, label)
    del whole
    pair = _watched_pair(watch, *_block(replace(cfg, layers=1), setup), blocks)
    seam = seam._replace(
        forward=_watched_gather(watch, seam.forward, units, setup.forward_prefetch),
        backward=_watched_gather(watch, seam.backward, blocks[::-1], setup.backward_prefetch),
    )
    as_masters = lambda grads, unit: pytree.tree_map(lambda g: g.to(masters), grads)
    scatter = _watched_scatter(watch, seam.scatter if setup.sync else as_masters, units[::-1], "the gradients of {}")
    tokens = torch.empty(setup.micro_batch, setup.tokens, dtype=torch.int64, device="meta")
    with watch:
        grads, _ = walk(
            cfg, seam, pair, state.params, Batch(tokens, tokens), torch.empty((), device="meta"), z_weight=0.0,
            scatter=scatter, before=before,
        )  # fmt: skip
        del before
        if not setup.sync:
            last = _watched_scatter(watch, seam.scatter, units, "the sum over ranks of {}")
            grads = model.over_units(last, grads, state.params)
        with watch.phase("the update", GRADIENTS, GRADIENTS):
            pass
    return watch.most


def _watch(setup: Setup) -> Live:
    size = lambda x: x.numel() * x.element_size()
    scratch = {ops.linear_cross_entropy_pass: _loss_scratch}
    if setup.staged:
        scratch |= {
            collectives.all_gather_op: lambda x, _, n: n * size(x),
            collectives.reduce_scatter_op: lambda x, *_: size(x),
        }
    return Live(ops.REFERENCES, scratch, LOSS)


def _loss_scratch(x: Tensor, weight: Tensor, target: Tensor, *others: Any) -> int:
    """What the pass over chunks of rows needs beyond what it returns: that of two, each of which overlaps the next."""
    some = 2 * reference.CHUNK
    watch = Live({}, {}, LOSS)
    watch.hold((x, weight, target), LOSS)
    with watch, watch.phase("the pass", LOSS, LOSS):
        out = reference.linear_cross_entropy_pass(x[:some], weight, target[:some], *others)
    most, left = watch.most["the pass"].total(), watch.now.total()
    del out
    return most - left


def _block_names(cfg: ModelConfig) -> list[str]:
    return [
        "the last block" if i == cfg.layers - 1 else "a block" if i else "the first block" for i in range(cfg.layers)
    ]


def _arguments(cfg: ModelConfig, setup: Setup) -> tuple[Tensor, ...]:
    """A block's x, angles and leaves."""
    one = model.init(replace(cfg, layers=1), device="meta", dtype=setup.dtype).blocks[0]
    x = torch.empty(setup.micro_batch, setup.tokens, cfg.width, dtype=setup.dtype, device="meta")
    return x, model.rope(torch.arange(setup.tokens, device="meta"), cfg), *pytree.tree_leaves(one)


def _block(cfg: ModelConfig, setup: Setup) -> tuple[Pair, tuple[int, int] | None]:
    return _pair(cfg, setup.micro_batch, setup.tokens, setup.dtype, setup.compiled, setup.keeps_inputs)


@lru_cache(maxsize=64)  # plans of several device counts share what is traced
def _pair(
    cfg: ModelConfig, micro_batch: int, tokens: int, dtype: torch.dtype, compiled: bool, keep_inputs: bool
) -> tuple[Pair, tuple[int, int] | None]:
    """A block's pair; compiled, also the bytes that its forward and its backward need on the way, beyond what they return."""
    arguments = _arguments(cfg, Setup(tokens=tokens, micro_batch=micro_batch, dtype=dtype))
    spec = pytree.tree_structure(model.init(cfg, device="meta").blocks[0])
    layer = lambda x, angles, *leaves: model.block(pytree.tree_unflatten(leaves, spec), x, angles, cfg)[0]
    if not compiled:
        return eager_pair(layer, fixed=(1,), keep_inputs=keep_inputs), None
    needs = []

    def as_graph(graph, examples):
        needs.append(live.fused_peak(graph) - live.outputs(graph))
        return graph

    pair = compiled_pair(layer, fixed=(1,), keep_inputs=keep_inputs, backend=as_graph)
    y, residuals = pair.forward(*arguments)
    pair.backward(residuals, *arguments, torch.empty_like(y))
    return pair, tuple(needs)


def _watched_pair(watch: Live, pair: Pair, needs: tuple[int, int] | None, blocks: list[str]) -> Pair:
    """The pair, called for these blocks in order and back."""
    ways, names = iter(blocks), reversed(blocks)

    def run(function: Callable, need: int | None, *args):
        if need is None:
            return function(*args)
        with watch.hidden():
            out = function(*args)
        watch.hold(out, BLOCK)
        watch.pass_by(need)
        return out

    def forward(x, angles, *leaves):
        watch.hold((x, angles), KEPT)
        with watch.phase(f"the forward of {next(ways)}", BLOCK, KEPT):
            return run(pair.forward, needs and needs[0], x, angles, *leaves)

    def backward(*args):
        watch.hold(args[-1], BLOCK)
        with watch.phase(f"the backward of {next(names)}", BLOCK, WHOLE):
            return run(pair.backward, needs and needs[1], *args)

    return Pair(forward, backward)


def _watched_gather(watch: Live, gather: Callable, names: list[str], prefetch: bool) -> Callable:
    """gather(units) -> an iterator of whole ones, which are these; with prefetch, as `sharding.ahead` does with streams."""

    def gathered(units: Iterable) -> Iterator:
        wholes = gather(units)

        def one(name: str):
            with watch.phase(f"the use of {name}", GATHERED, GATHERED):
                return next(wholes)

        return _ahead(map(one, names)) if prefetch else map(one, names)

    return gathered


def _ahead(items: Iterator) -> Iterator:
    """The items, each once the next one is there too."""
    queue = deque(islice(items, 1))
    while queue:
        queue.extend(islice(items, 1))
        yield queue.popleft()


def _watched_scatter(watch: Live, scatter: Callable, names: list[str], moment: str) -> Callable:
    """scatter(gradients of a whole unit, unit) -> unit, called for these units in order."""
    names = iter(names)

    def scattered(grads, unit):
        watch.hold(grads, WHOLE)
        with watch.phase(moment.format(next(names)), REDUCED, GRADIENTS):
            part = scatter(grads, unit)
        watch.hold(part, GRADIENTS)
        return part

    return scattered


def parameters(cfg: ModelConfig) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(model.init(cfg, device="meta")))


def flops(cfg: ModelConfig, tokens: int) -> int:
    """The model's FLOPs per token of a training step over sequences of this many: 6 for each parameter that multiplies a
    matrix and token (the embedding is looked up), and 6 L D T of causal attention.
    """
    return 3 * (cfg.layers * _block_flops(cfg, tokens) + 2 * cfg.vocab * cfg.width)


def recomputed_flops(cfg: ModelConfig, tokens: int) -> int:
    """What keeping only the blocks' inputs adds to them, per token: their forward once more."""
    return cfg.layers * _block_flops(cfg, tokens)


def _block_flops(cfg: ModelConfig, tokens: int) -> int:
    """Of a block's forward, per token: 2 for each parameter of its matrices, 2 D T for half of the scores and of what they weigh."""
    K, D = cfg.head_width, cfg.width
    matrices = 2 * cfg.heads * K * D + 2 * cfg.kv_heads * K * D + 3 * cfg.hidden * D
    return 2 * matrices + 2 * cfg.heads * K * tokens


class Traffic(NamedTuple):
    """What a step's collectives of one kind move."""

    kind: Literal["gathers forward", "gathers backward", "reduce-scatters", "all-reduces"]
    size: int  # bytes of the whole vectors
    ranks: int  # that share them
    stride: int  # from one of those to the next


def traffic(cfg: ModelConfig, setup: Setup) -> list[Traffic]:
    """A step's collectives over parameters and gradients."""
    mesh = setup.mesh
    if mesh is None:
        return []
    units = model.init(cfg, device="meta")
    count = lambda tree: sum(leaf.numel() for leaf in pytree.tree_leaves(tree))
    (_, shards), (_, replicas) = mesh.shards, mesh.replicas
    reductions = setup.micro_batches if setup.sync else 1
    whole, reduced = setup.micro_batches * setup.param_dtype.itemsize, reductions * setup.reduce_dtype.itemsize
    moved = [
        Traffic("gathers forward", count(units) * whole, shards, 1),
        Traffic("gathers backward", count(units.blocks) * whole * mesh.regathers, shards, 1),
        Traffic("reduce-scatters", count(units) * reduced, shards, 1),
        Traffic("all-reduces", count(units) * reduced // shards, replicas, shards),
    ]
    return [one for one in moved if one.size and one.ranks > 1]
