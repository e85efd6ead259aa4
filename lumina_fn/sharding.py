"""FSDP1's contract as functions: a unit's parameters are one flat vector, of which each rank keeps a part.

`shard` cuts, `gather` makes whole for compute (its backward sums the gradients and cuts them again), `unshard` joins for saving.
Ranks form a grid: `shards` hold the parts of one copy, `replicas` hold the same part of different copies.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import optree
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from jaxtyping import Float
from torch import Tensor

import ops
from ops import collectives
from ops.collectives import Group

STRATEGIES = ("fsdp", "sdp", "no", "hybrid", "hybrid_zero2")


@dataclass(frozen=True)
class Mesh:
    """Who shares what. Made once, by every rank of `group` together: hybrid strategies form subgroups."""

    group: Any  # a torch.distributed process group, or its name
    rank: int
    size: int
    device: torch.device | str = "cpu"
    strategy: str = "fsdp"  # full shard; sdp: gathered once a micro batch; no: whole copies; hybrid(_zero2): shards within shard_size ranks
    param_dtype: torch.dtype = torch.float32  # of gathered parameters
    reduce_dtype: torch.dtype = torch.float32  # of the gradients' sum
    shard_size: int | None = None  # of the hybrids; divides size
    forward_prefetch: bool = False  # gather the next unit while one computes, where the device has streams
    backward_prefetch: bool = False
    world: Group = field(init=False)
    shards: Group = field(init=False)
    replicas: Group = field(init=False)

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if torch.float16 in (self.param_dtype, self.reduce_dtype):
            raise ValueError(
                "float16 gradients underflow without loss scaling, which is not offered: use bfloat16 or float32"
            )
        name = self.group if isinstance(self.group, str) else self.group.group_name
        world, alone = (name, self.size), (name, 1)
        if self.strategy.startswith("hybrid"):
            shards, replicas = _grid(self.rank, self.size, self.shard_size)
        else:
            shards, replicas = (alone, world) if self.strategy == "no" else (world, alone)
        for key, value in (("world", world), ("shards", shards), ("replicas", replicas)):
            object.__setattr__(self, key, value)

    @property
    def part(self) -> int:
        """Which part of a copy this rank keeps."""
        return self.rank % self.shards[1]

    @property
    def regathers(self) -> bool:
        """Whether gathered parameters are dropped after the forward and gathered again in the backward."""
        return self.strategy in ("fsdp", "hybrid")


def _grid(rank: int, size: int, shard_size: int | None) -> tuple[Group, Group]:
    if not shard_size or size % shard_size:
        raise ValueError(f"shard_size {shard_size}: expected a divisor of the {size} ranks")
    rows = [list(range(a, a + shard_size)) for a in range(0, size, shard_size)]
    columns = [list(range(a, size, shard_size)) for a in range(shard_size)]
    shards, replicas = (dist.new_subgroups_by_enumeration(ranks)[0] for ranks in (rows, columns))
    return (shards.group_name, shard_size), (replicas.group_name, size // shard_size)


class Layout(NamedTuple):
    spec: Any
    shapes: tuple[tuple[int, ...], ...]


class Sharded:
    """A rank's part of a unit: a pytree node with one leaf."""

    def __init__(self, part: Float[Tensor, " n"], layout: Layout):
        self.part, self.layout = part, layout


pytree.register_pytree_node(
    Sharded,
    lambda s: ([s.part], s.layout),
    lambda parts, layout: Sharded(*parts, layout),
    flatten_with_keys_fn=lambda s: ([(pytree.GetAttrKey("part"), s.part)], s.layout),
)
optree.register_pytree_node(
    Sharded, lambda s: ((s.part,), s.layout), lambda layout, parts: Sharded(*parts, layout), namespace="lumina"
)


def flatten(tree: Any, parts: int, dtype: torch.dtype | None = None) -> tuple[Float[Tensor, " n"], Layout]:
    """The unit's leaves end to end, padded with zeros to a multiple of `parts`, in `dtype` (None: as they are)."""
    leaves, spec = pytree.tree_flatten(tree)
    layout = Layout(spec, tuple(tuple(leaf.shape) for leaf in leaves))
    size, dtype = sum(leaf.numel() for leaf in leaves), dtype or leaves[0].dtype
    if len(leaves) == 1 and size % parts == 0 and leaves[0].dtype == dtype:
        return leaves[0].reshape(-1), layout
    return ops.join(leaves, size + -size % parts, dtype), layout


def unflatten(flat: Float[Tensor, " n"], layout: Layout) -> Any:
    sizes = [prod(shape) for shape in layout.shapes]
    leaves = flat[: sum(sizes)].split(sizes)
    return pytree.tree_unflatten([x.view(shape) for x, shape in zip(leaves, layout.shapes, strict=True)], layout.spec)


def shard(tree: Any, mesh: Mesh) -> Sharded:
    """This rank's part of a unit, float32 or wider, in memory of its own."""
    flat, layout = flatten(tree, mesh.shards[1])
    part = flat.chunk(mesh.shards[1])[mesh.part]
    return Sharded(part.to(mesh.device, torch.promote_types(part.dtype, torch.float32), copy=True), layout)


def gather(unit: Sharded, mesh: Mesh) -> Any:
    """The whole unit in mesh.param_dtype; differentiating it gives each rank its part of the gradients summed over ranks."""
    flat = collectives.gather(unit.part, mesh.shards, mesh.replicas, mesh.param_dtype, mesh.reduce_dtype)
    return unflatten(flat, unit.layout)


def ahead(
    gather: Callable[[Any], Any], units: Iterable[Any], *, device: torch.device | str, prefetch: bool
) -> Iterator[Any]:
    """Each unit made whole by `gather`, in order. With prefetch the next one is under way on a stream of its own meanwhile.

    A device without streams, such as a CPU, gathers one after the other: nothing would overlap.
    """
    if not prefetch or torch.device(device).type == "cpu":
        yield from map(gather, units)
        return
    main, side = torch.accelerator.current_stream(device), torch.Stream(device)
    side.wait_stream(main)  # the optimizer may still be writing the parts

    def start(unit):
        with side:
            return gather(unit), side.record_event()

    queue = deque(map(start, islice(units := iter(units), 1)))
    while queue:
        tree, ready = queue.popleft()
        queue.extend(map(start, islice(units, 1)))
        main.wait_event(ready)
        for leaf in pytree.tree_leaves(tree):
            leaf.record_stream(main)  # its memory is not given away before main is done with it
        yield tree
        del tree


def scatter(grads: Any, unit: Sharded, mesh: Mesh) -> Sharded:
    """What gather's backward does: whole gradients to this rank's part of their sum."""
    flat, layout = flatten(grads, mesh.shards[1], mesh.reduce_dtype)
    part = collectives.scatter(flat, mesh.shards, mesh.replicas, unit.part.dtype, mesh.reduce_dtype)
    return Sharded(part, layout)


def unshard(unit: Sharded, mesh: Mesh) -> Any:
    """The whole unit in the parts' own dtype, on every rank."""
    return unflatten(collectives.all_gather(unit.part, mesh.shards), unit.layout)
