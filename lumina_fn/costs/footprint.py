"""The memory of a device over the course of a training step, measured by running the step on tensors without storage.

The code that runs is that of the real step, so what it keeps and frees is counted. Kernels are the reference's; collectives are
assumed to need no memory besides their arguments and results, unless `Setup.cpu`.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import ops
from kernels import reference
from lumina_fn import model, optim, train
from lumina_fn.config import ModelConfig
from lumina_fn.costs import live_bytes
from lumina_fn.costs.cost import Setup
from lumina_fn.costs.live_bytes import Live
from lumina_fn.gradients import Walk, seams, walk
from lumina_fn.loss import Batch
from lumina_fn.transform import Pair, compiled_pair, eager_pair
from ops import collectives

# Labels of bytes: what they are used for.
PARAMETERS = "parameters"
MOMENTS = "moments"  # AdamW's moments
GRADIENTS = "gradients"
KEPT = "activations"  # kept from a forward for its backward
GATHERED = "gathered"  # gathered or cast units
BLOCK = "block"  # temporaries of a block's forward or backward
WHOLE = "unit_gradients"  # gradients of a whole unit, before they are summed over devices
FLAT = "flat_gradients"  # flat copies of those, for the sum
LOSS = "loss"  # chunks of logits, and gradients of the head
FREED = "freed"  # freed memory that malloc does not return
LABELS = (PARAMETERS, MOMENTS, GRADIENTS, KEPT, GATHERED, BLOCK, WHOLE, FLAT, LOSS, FREED)

# On a CPU glibc keeps the holes that short-lived tensors below 32 MB leave between others. The amount varies, even between ranks:
# this factor times the maximum of BLOCK and FLAT fitted 24 measured steps to within 14 %, 6 % in the mean.
HOLES = 1.3


def memory(cfg: ModelConfig, setup: Setup) -> dict[str, Counter[str]]:
    """Bytes by label at the peak of each moment of a step, in order; of blocks alike the first and the last are there.

    Memory at each moment is linear in the number of blocks that keep their inputs and of those that keep more, so that steps of two and
    three of each determine any number.
    """
    recomputed = setup.recomputed(cfg)
    numbers = recomputed, cfg.layers - recomputed
    few = [min(n, 2) for n in numbers]
    moments = _trace(cfg, setup, recomputed) if cfg.layers <= 3 else _traced(cfg, setup, *few)
    for kind, n in enumerate(numbers):
        if cfg.layers > 3 and n > 2:
            more = _traced(cfg, setup, *(3 if i == kind else m for i, m in enumerate(few)))
            base = _traced(cfg, setup, *few)
            moments = {
                moment: Counter(
                    {
                        label: by[label] + (n - 2) * (more[moment][label] - base[moment][label])
                        for label in by | more[moment]
                    }
                )
                for moment, by in moments.items()
            }
    if not setup.cpu:
        return moments
    holes = HOLES * sum(max(by_label[label] for by_label in moments.values()) for label in (BLOCK, FLAT))
    return {moment: by_label + Counter({FREED: round(holes)}) for moment, by_label in moments.items()}


def _traced(cfg: ModelConfig, setup: Setup, recomputed: int, others: int) -> dict[str, Counter[str]]:
    return _trace(replace(cfg, layers=recomputed + others), replace(setup, remat=False), recomputed)


def fewest_recomputed(cfg: ModelConfig, setup: Setup, room: int) -> int:
    """The fewest blocks that must be computed again for a step to fit into `room` bytes; all if none do."""
    fits = lambda n: peak(cfg, replace(setup, remat=n)) <= room
    return bisect_left(range(cfg.layers), True, key=fits)


def peak(cfg: ModelConfig, setup: Setup) -> int:
    """Bytes at the peak of a step."""
    return max(by_label.total() for by_label in memory(cfg, setup).values())


def kept(cfg: ModelConfig, setup: Setup) -> int:
    """Bytes that a block keeps for the backward: its output, and its residuals, which the backward needs besides the arguments."""
    pair, _ = _block(cfg, setup, setup.recomputed(cfg) > 0)
    watch, arguments = _watch(setup), _arguments(cfg, setup)
    watch.hold(arguments, KEPT)
    before = watch.now.total()
    with watch:
        alive = pair.forward(*arguments)
    after = watch.now.total()
    del alive
    return after - before


@lru_cache(maxsize=64)  # any number of blocks follows from few of these
def _trace(cfg: ModelConfig, setup: Setup, recomputed: int) -> dict[str, Counter[str]]:
    """`memory`, measured in a step of all layers: its last micro batch and the update."""
    watch, mesh = _watch(setup), setup.mesh
    whole = model.init(cfg, device="meta", dtype=setup.masters)
    state = train.init_state(whole, optim.AdamW(), mesh)
    seam, blocks = seams(mesh, setup.dtype), _block_names(cfg.layers, recomputed)
    units = ["embedding", *blocks, "head"]
    before = None
    if setup.micro_batches > 1:
        before = pytree.tree_map(torch.empty_like, state.params if setup.sync else whole)
    for tree, label in ((state.params, PARAMETERS), ((state.mu, state.nu), MOMENTS), (before, GRADIENTS)):
        watch.hold(tree, label)
    del whole
    pairs = [_watched_pair(watch, *_block(cfg, setup, i < recomputed), block) for i, block in enumerate(blocks)]
    seam = seam._replace(
        forward=_watched_gather(
            watch, seam.forward, ["lookup", *(f"gather, {b}" for b in blocks), "loss"], setup.forward_prefetch
        ),
        backward=_watched_gather(
            watch, seam.backward, [f"second gather, {b}" for b in reversed(blocks)], setup.backward_prefetch
        ),
    )
    as_masters = lambda grads, unit: pytree.tree_map(lambda g: g.to(setup.masters), grads)
    scatter = _watched_scatter(watch, seam.scatter if setup.sync else as_masters, units[::-1], "gradients, {}")
    shape = (setup.micro_batches, setup.micro_batch, setup.tokens)
    batch = Batch(*(torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(2)))
    watch.hold(batch, KEPT)
    with watch:
        last_batch, count = Batch(*(x[-1] for x in batch)), torch.empty((), device="meta")
        grads, _ = walk(Walk(cfg, seam, pairs, 0.0, scatter), state.params, last_batch, count, before)
        del before
        if not setup.sync:
            last = _watched_scatter(watch, seam.scatter, units, "sum over devices, {}")
            grads = model.over_units(last, grads, state.params)
        with watch.phase("update", GRADIENTS, GRADIENTS):
            pass
    return watch.most


def _watch(setup: Setup) -> Live:
    scratch: dict[Any, Callable[..., int]] = {ops.linear_cross_entropy_pass: _loss_scratch}
    if setup.cpu:
        scratch[collectives.reduce_scatter_op] = lambda x, _, size: x.numel() * x.element_size() // size
    return Live(ops.REFERENCES, scratch, LOSS)


def _loss_scratch(x: Tensor, weight: Tensor, target: Tensor, *others: Any) -> int:
    """Bytes that the vocabulary loss needs besides its results, found on two chunks, since each overlaps the next."""
    some = 2 * reference.CHUNK
    watch = Live({}, {}, LOSS)
    watch.hold((x, weight, target), LOSS)
    with watch, watch.phase("the pass", LOSS, LOSS):
        out = reference.linear_cross_entropy_pass(x[:some], weight, target[:some], *others)
    most, left = watch.most["the pass"].total(), watch.now.total()
    del out
    return most - left


def _block_names(layers: int, recomputed: int) -> list[str]:
    """A block's name in the moments; where there are two kinds, the last of the first kind and the first of the other have their own."""
    names = (
        {recomputed: "the first kept block", recomputed - 1: "the last recomputed block"}
        if 0 < recomputed < layers
        else {}
    )
    names |= {layers - 1: "the last block", 0: "the first block"} if layers > 1 else {0: "the last block"}
    return [names.get(i, "a block") for i in range(layers)]


def _arguments(cfg: ModelConfig, setup: Setup) -> tuple[Tensor, ...]:
    """The arguments of a block: x, angles and leaves."""
    one = model.init(replace(cfg, layers=1), device="meta", dtype=setup.dtype).blocks[0]
    x = torch.empty(setup.micro_batch, setup.tokens, cfg.width, dtype=setup.dtype, device="meta")
    return x, model.rope(torch.arange(setup.tokens, device="meta"), cfg), *pytree.tree_leaves(one)


def _block(cfg: ModelConfig, setup: Setup, recomputed: bool) -> tuple[Pair, tuple[int, int]]:
    one = replace(cfg, layers=1)
    return _pair(one, setup.micro_batch, setup.tokens, setup.dtype, setup.compiled, recomputed)


@lru_cache(maxsize=64)  # plans of several device counts share the traces
def _pair(
    cfg: ModelConfig, micro_batch: int, tokens: int, dtype: torch.dtype, compiled: bool, keep_inputs: bool
) -> tuple[Pair, tuple[int, int]]:
    """A block's pair, and the bytes of temporaries in its forward and backward; compiled ones are outlines that compute nothing."""
    arguments = _arguments(cfg, Setup(tokens=tokens, micro_batch=micro_batch, dtype=dtype))
    spec = pytree.tree_structure(model.init(cfg, device="meta").blocks[0])
    layer = lambda x, angles, *leaves: model.block(pytree.tree_unflatten(leaves, spec), x, angles, cfg)[0]
    if not compiled:
        return eager_pair(layer, fixed=(1,), keep_inputs=keep_inputs), (0, 0)
    needs = []

    def backend(graph, examples):
        needs.append(live_bytes.fused_peak(graph) - live_bytes.outputs(graph))
        return live_bytes.outline(graph)

    pair = compiled_pair(layer, fixed=(1,), keep_inputs=keep_inputs, backend=backend)
    y, residuals = pair.forward(*arguments)
    pair.backward(residuals, *arguments, torch.empty_like(y))
    return pair, tuple(needs)


def _watched_pair(watch: Live, pair: Pair, needs: tuple[int, int], block: str) -> Pair:
    """A block's pair with memory counted."""

    def run(function: Callable, need: int, *args):
        out = function(*args)
        watch.pass_by(need)
        return out

    def forward(x, angles, *leaves):
        watch.hold((x, angles), KEPT)
        with watch.phase(f"forward, {block}", BLOCK, KEPT):
            return run(pair.forward, needs[0], x, angles, *leaves)

    def backward(*args):
        watch.hold(args[-1], BLOCK)
        with watch.phase(f"backward, {block}", BLOCK, WHOLE):
            return run(pair.backward, needs[1], *args)

    return Pair(forward, backward)


def _watched_gather(watch: Live, gather: Callable, moments: list[str], prefetch: bool) -> Callable:
    """gather(units) -> an iterator of whole units, each of which begins a moment; with prefetch as in `sharding.ahead` with streams."""

    def gathered(units: Iterable) -> Iterator:
        wholes = gather(units)

        def one(moment: str):
            with watch.phase(moment, GATHERED, GATHERED):
                return next(wholes)

        return _ahead(map(one, moments)) if prefetch else map(one, moments)

    return gathered


def _ahead(items: Iterator) -> Iterator:
    """The items, each delivered after the next one has been made."""
    queue = deque(islice(items, 1))
    while queue:
        queue.extend(islice(items, 1))
        yield queue.popleft()


def _watched_scatter(watch: Live, scatter: Callable, names: list[str], moment: str) -> Callable:
    """scatter(gradients of a whole unit, unit) -> unit with memory counted; it is called for these units in order."""
    order = iter(names)

    def scattered(grads, unit):
        watch.hold(grads, WHOLE)
        with watch.phase(moment.format(next(order)), FLAT, GRADIENTS):
            part = scatter(grads, unit)
        watch.hold(part, GRADIENTS)
        return part

    return scattered
