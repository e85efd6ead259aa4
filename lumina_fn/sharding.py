"""FSDP1's contract as functions: a unit's parameters are one flat vector, of which each rank keeps a part.

`shard` cuts a unit, `gather` joins it for compute (its backward sums and cuts the gradients), `unshard` joins it for saving.
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
    """Which ranks share parameters and how. Every rank of `group` makes it once, at the same time: hybrid strategies form subgroups."""

    group: Any  # a torch.distributed process group, or its name
    rank: int
    size: int
    device: torch.device | str = "cpu"
    strategy: str = "fsdp"  # fsdp: gather per use; sdp: per micro batch; no: whole copies; hybrid(_zero2): shards within shard_size ranks
    param_dtype: torch.dtype = torch.float32  # dtype of gathered parameters
    reduce_dtype: torch.dtype = torch.float32  # dtype in which gradients are summed
    shard_size: int | None = None  # ranks that share a copy, for the hybrids; divides size
    forward_prefetch: bool = False  # gather the next unit during compute, on devices with streams
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
        """The index of this rank's part of a copy."""
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
    shards, replicas = (_subgroup(ranks) for ranks in (rows, columns))
    return (shards.group_name, shard_size), (replicas.group_name, size // shard_size)


def _subgroup(ranks: list[list[int]]) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    assert isinstance(group, dist.ProcessGroup), "this rank is in one of them"
    return group


class Layout(NamedTuple):
    """The structure of a unit's tree, and the shape of each leaf in order."""

    spec: Any
    shapes: tuple[tuple[int, ...], ...]


class Sharded:
    """A rank's part of a unit's flat vector: a pytree node with one leaf."""

    def __init__(self, part: Float[Tensor, " n"], layout: Layout):
        self.part, self.layout = part, layout


def _joined(parts: Iterable[Any], layout: Any) -> Sharded:
    (part,) = parts
    return Sharded(part, layout)


_KEY: Any = pytree.GetAttrKey("part")  # typed Any: an argument's name differs from that in torch's protocol for keys
pytree.register_pytree_node(
    Sharded, lambda s: ([s.part], s.layout), _joined, flatten_with_keys_fn=lambda s: ([(_KEY, s.part)], s.layout)
)
_register: Any = optree.register_pytree_node  # its annotation asks for a collection, but it takes any class
_register(Sharded, lambda s: ((s.part,), s.layout), lambda layout, parts: _joined(parts, layout), namespace="lumina")


def flatten(tree: Any, parts: int, dtype: torch.dtype | None = None) -> tuple[Float[Tensor, " n"], Layout]:
    """The unit's leaves end to end, padded with zeros to a multiple of `parts`, in `dtype` (None: as they are)."""
    leaves, spec = pytree.tree_flatten(tree)
    layout = Layout(spec, tuple(tuple(leaf.shape) for leaf in leaves))
    size = sum(leaf.numel() for leaf in leaves)
    wanted: torch.dtype = leaves[0].dtype if dtype is None else dtype
    if len(leaves) == 1 and size % parts == 0 and leaves[0].dtype == wanted:
        return leaves[0].reshape(-1), layout
    return ops.join(leaves, size + -size % parts, wanted), layout


def unflatten(flat: Float[Tensor, " n"], layout: Layout) -> Any:
    """The unit whose leaves lie end to end in a flat vector; its leaves are views of that vector."""
    sizes = [prod(shape) for shape in layout.shapes]
    leaves = flat[: sum(sizes)].split(sizes)
    return pytree.tree_unflatten([x.view(shape) for x, shape in zip(leaves, layout.shapes, strict=True)], layout.spec)


def whole_shapes(units: Iterable[Sharded]) -> list[tuple[int, ...]]:
    """The shapes of all leaves of the whole units, in order."""
    return [shape for unit in units for shape in unit.layout.shapes]


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
    """Each unit gathered, in order. With prefetch the next unit is gathered on a second stream in the meantime.

    On a CPU, which has no streams, units are gathered one after the other: nothing would overlap.
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
            leaf.record_stream(main)  # its memory is not reused before main is done with it
        yield tree
        del tree


def scatter(grads: Any, unit: Sharded, mesh: Mesh) -> Sharded:
    """This rank's part of the sum of whole gradients over ranks: the backward of `gather`."""
    flat, layout = flatten(grads, mesh.shards[1], mesh.reduce_dtype)
    part = collectives.scatter(flat, mesh.shards, mesh.replicas, unit.part.dtype, mesh.reduce_dtype)
    return Sharded(part, layout)


def unshard(unit: Sharded, mesh: Mesh) -> Any:
    """The whole unit in the parts' own dtype, on every rank."""
    return unflatten(collectives.all_gather(unit.part, mesh.shards), unit.layout)
