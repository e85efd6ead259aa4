"""Gradients of the loss, unit by unit: forward through the blocks and back, freeing each tensor after its last use.

torch.func.grad of `loss` gives the same numbers, but keeps every activation and every gathered unit until its end. Here the
blocks share one (forward, backward) pair, so that compile time does not grow with depth, and what lives between a block's
forward and its backward is decided in one place.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional as F

from lumina_fn import sharding
from lumina_fn.config import ModelConfig
from lumina_fn.loss import Batch, Packed, head_gradients
from lumina_fn.model import Block, Norm, Params, along, angles_of
from lumina_fn.sharding import Mesh
from lumina_fn.transform import Pair, compiled_pair, eager_pair

_NORM = Norm._make([0, 0])  # zeros in place of tensors
BLOCK = pytree.tree_structure(Block._make([0] * 4 + [_NORM] * 2 + [0] * 5))


class Seams(NamedTuple):
    """How sharded units are gathered for compute, and how the gradients of a whole unit are scattered again."""

    forward: Callable  # units in order -> an iterator of whole units
    backward: Callable  # the same for the backward
    scatter: Callable  # (gradients of a whole unit, unit) -> unit
    regathers: bool  # whether a whole unit is dropped between forward and backward


def seams(mesh: Mesh | None, dtype: torch.dtype | None) -> Seams:
    """The seams of a mesh, or (None) of whole parameters; compute is in `dtype` (None: the parameters' own)."""
    cast = lambda unit: unit if dtype is None else pytree.tree_map(lambda x: x.to(dtype), unit)
    if mesh is None:
        masters = lambda grads, unit: pytree.tree_map(lambda g, x: g.to(x.dtype), grads, unit)
        return Seams(partial(map, cast), partial(map, cast), masters, False)
    whole = lambda unit: cast(sharding.gather(unit, mesh))
    ahead = lambda prefetch: partial(sharding.ahead, whole, device=mesh.device, prefetch=prefetch)
    scatter = partial(sharding.scatter, mesh=mesh)
    return Seams(ahead(mesh.forward_prefetch), ahead(mesh.backward_prefetch), scatter, mesh.regathers)


@lru_cache(maxsize=8)  # steps of one model, and blocks that keep the same, share the compiled pair
def block_pair(cfg: ModelConfig, *, compiled: bool, keep_inputs: bool, packed: bool = False) -> Pair:
    """One block as a function of (x, angles, *leaves), or (x, angles, first, *leaves) for packed rows, and its backward."""
    fixed = (1, 2) if packed else (1,)
    n = len(fixed)
    layer = lambda x, *rest: along(pytree.tree_unflatten(rest[n:], BLOCK), x, cfg, *rest[:n])
    return (compiled_pair if compiled else eager_pair)(layer, fixed=fixed, keep_inputs=keep_inputs)


class Walk(NamedTuple):
    """What a walk through the model computes with."""

    cfg: ModelConfig
    seam: Seams
    pairs: Sequence[Pair]  # of each block
    z_weight: float
    scatter: Callable  # (gradients of a whole unit, the unit's parameters) -> what is kept of them


def walk(
    how: Walk, params: Params, batch: Batch | Packed, count: Tensor, before: Params | None = None
) -> tuple[Params, Tensor]:
    """The gradients of the loss of a batch [B T], a sum divided by `count`, in units made by `scatter`; and [loss, ce, z].

    They are added in place to `before`, the gradients of earlier batches (None: there are none).
    """
    cfg, seam, pairs, z_weight, scatter = how
    tokens, *first = (x[:, : cfg.max_positions] for x in (batch.tokens, *batch[2:]))
    where = (angles_of(tokens, cfg, *first), *first)
    labels, blocks = batch.labels, params.blocks
    wholes = seam.forward([params.embed, *blocks, params.head])

    x = F.embedding(tokens, next(wholes))
    kept: list[Any] = []
    for pair in pairs:
        leaves = pytree.tree_leaves(next(wholes))
        y, residuals = pair.forward(x, *where, *leaves)
        kept.append((x, residuals, None if seam.regathers else leaves))
        x = y
        del leaves  # before the next unit is gathered
    d_head, dx, terms = head_gradients(next(wholes), x, labels, cfg, z_weight=z_weight, count=count)
    del x, y, residuals
    done = lambda grads, unit, old: _plus(scatter(grads, unit), old)
    d_head = done(d_head, params.head, before and before.head)

    again = seam.backward(blocks[::-1]) if seam.regathers else None
    d_blocks: list[Any] = []
    for i in reversed(range(len(blocks))):
        x, residuals, leaves = kept.pop()
        leaves = pytree.tree_leaves(next(again)) if again else leaves
        dx, *grads = pairs[i].backward(residuals, x, *where, *leaves, dx)
        del x, residuals, leaves
        d_blocks.append(done(pytree.tree_unflatten(grads, BLOCK), blocks[i], before and before.blocks[i]))
        del grads
    # The gradient of an embedding lookup does not need the table, so the embedding is not gathered again.
    d_table = torch.ops.aten.embedding_dense_backward(dx, tokens, cfg.vocab, -1, False)
    d_embed = done(d_table, params.embed, before and before.embed)
    return Params(d_embed, tuple(reversed(d_blocks)), d_head), terms


def _plus(grads: Any, before: Any | None) -> Any:
    return grads if before is None else pytree.tree_map(lambda old, new: old.add_(new), before, grads)
