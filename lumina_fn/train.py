"""The loss, and one training step as a function of (state, batch)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from jaxtyping import Int
from torch import Tensor
from torch.func import grad_and_value, vjp
from torch.nn import functional as F

import ops
from lumina_fn import optim, sharding
from lumina_fn.config import ModelConfig
from lumina_fn.model import Head, Params, block, init, over_units, rope, trunk
from lumina_fn.optim import AdamW
from lumina_fn.sharding import Mesh
from lumina_fn.transform import compiled_vjp, inductor, jit, remat
from lumina_fn.vocab import IGNORE
from ops import collectives

__all__ = ["AdamW", "Batch", "TrainState", "init_state", "loss", "make_train_step"]


class Batch(NamedTuple):
    tokens: Int[Tensor, "B T"]  # or [A B T]: A accumulated micro batches
    labels: Int[Tensor, "B T"]  # IGNORE where a token is not predicted


class TrainState(NamedTuple):
    step: Int[Tensor, ""]  # steps taken, skipped ones included
    params: Params  # the masters, float32 or wider
    mu: Params
    nu: Params
    skipped: Int[Tensor, ""]  # steps whose loss or gradient was not finite
    streak: Int[Tensor, ""]  # how many of those came last in a row


def init_state(params: Params, opt: AdamW, mesh: Mesh | None = None) -> TrainState:
    """A state at step 0 over these parameters (not copied), or over this rank's part of each unit of them."""
    if mesh is not None:
        params = over_units(lambda unit: sharding.shard(unit, mesh), params)
    zeros = lambda: pytree.tree_map(torch.zeros_like, params)
    zero = lambda: torch.zeros((), dtype=torch.int64, device=pytree.tree_leaves(params)[0].device)
    return TrainState(zero(), params, zeros(), zeros(), zero(), zero())


def predicted(labels: Tensor, cfg: ModelConfig) -> Int[Tensor, ""]:
    """How many tokens a batch predicts."""
    return (labels[..., 1 : cfg.max_positions] != IGNORE).sum()


def head_loss(p: Head, x: Tensor, labels: Tensor, cfg: ModelConfig, *, z_weight: float, count: Tensor):
    """Loss, ce and z of the trunk's output x [B T D] against labels [B T]; the last position predicts nothing."""
    target = F.pad(labels[:, 1 : x.shape[1]], (0, 1), value=IGNORE)
    normed = ops.rms_norm(x, p.norm, cfg.eps).flatten(0, 1)
    return ops.linear_cross_entropy(
        normed, p.unembed, target.flatten(), count, z_weight=z_weight, masked=cfg.masked_ids
    )


def loss(
    params: Params, batch: Batch, cfg: ModelConfig, *, z_weight: float = 1e-5, count: Tensor | int | None = None,
    gather=lambda unit: unit, remat=lambda f: f,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Next-token cross-entropy + z_weight * z-loss, and both; sums over predicted tokens / count (None: this batch's own)."""
    tokens, labels = batch
    count = predicted(labels, cfg).clamp(min=1) if count is None else torch.as_tensor(count, device=labels.device)
    x = trunk(params, tokens, cfg, gather=gather, remat=remat)
    total, ce, z = head_loss(gather(params.head), x, labels, cfg, z_weight=z_weight, count=count)
    return total, {"ce": ce, "z": z}


class Seams(NamedTuple):
    """How a unit of parameters becomes whole for compute, and how its whole gradients become a unit's again."""

    gather: Callable  # unit -> tree
    scatter: Callable  # (gradients' tree, unit) -> unit
    regathers: bool  # whether a whole unit is dropped between forward and backward


def seams(mesh: Mesh | None, dtype: torch.dtype | None) -> Seams:
    if mesh is not None:
        return Seams(partial(sharding.gather, mesh=mesh), partial(sharding.scatter, mesh=mesh), mesh.regathers)
    to = lambda unit: pytree.tree_map(lambda x: x.to(dtype), unit)
    back = lambda grads, unit: pytree.tree_map(lambda g, x: g.to(x.dtype), grads, unit)
    return Seams((lambda unit: unit) if dtype is None else to, back, False)


# (params, batch, count) -> (gradients, (loss, metrics)): what the ways of making a step differ in.
Gradients = Callable[[Params, Batch, Tensor], tuple[Params, tuple[Tensor, dict[str, Tensor]]]]


def by_func(cfg: ModelConfig, seam: Seams, *, z_weight: float, keep_inputs: bool) -> Gradients:
    """Gradients by torch.func over the whole loss: eager, or the inside of a traced step."""
    again = remat if keep_inputs else lambda f: f
    objective = partial(loss, cfg=cfg, z_weight=z_weight, gather=seam.gather, remat=again)
    return lambda params, batch, count: grad_and_value(lambda p: objective(p, batch, count=count), has_aux=True)(params)


def by_blocks(cfg: ModelConfig, seam: Seams, *, z_weight: float, keep_inputs: bool) -> Gradients:
    """Gradients by walking the blocks with one compiled (forward, backward) pair; compile time does not grow with depth."""
    spec = pytree.tree_structure(init(replace(cfg, layers=1), device="meta").blocks[0])
    layer = lambda x, angles, *leaves: block(pytree.tree_unflatten(leaves, spec), x, angles, cfg)[0]
    forward, backward = compiled_vjp(layer, fixed=(1,), keep_inputs=keep_inputs)
    whole = lambda unit: pytree.tree_leaves(seam.gather(unit))

    def gradients(params: Params, batch: Batch, count: Tensor):
        tokens, labels = batch.tokens[:, : cfg.max_positions], batch.labels
        x, pull_embed = vjp(lambda unit: F.embedding(tokens, seam.gather(unit)), params.embed)
        angles, kept = rope(torch.arange(tokens.shape[1], device=tokens.device), cfg), []
        for unit in params.blocks:
            y, saved = forward(x, angles, *whole(unit))
            kept.append(x if seam.regathers else saved)  # where units are gathered again, only the input is kept
            x = y
        head = lambda unit, x: head_loss(seam.gather(unit), x, labels, cfg, z_weight=z_weight, count=count)
        total, pull_head, ce, z = _vjp_first(head, params.head, x)
        d_head, dx = pull_head(torch.ones_like(total))
        del pull_head, x
        d_blocks = []
        for unit in reversed(params.blocks):
            saved = kept.pop()
            dx, *grads = backward((saved, angles, *whole(unit)) if seam.regathers else saved, dx)
            d_blocks.append(seam.scatter(pytree.tree_unflatten(grads, spec), unit))
        (d_embed,) = pull_embed(dx)
        return Params(d_embed, tuple(reversed(d_blocks)), d_head), (total, {"ce": ce, "z": z})

    return gradients


def make_train_step(
    cfg: ModelConfig, opt: AdamW, mesh: Mesh | None = None, *, z_weight: float = 1e-5, dtype: torch.dtype | None = None,
    compile: str = "off", remat: bool | None = None, donate: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:  # fmt: skip
    """step(state, batch) -> (state, metrics): forward, backward, global-norm clip, AdamW.

    A batch is [B T], or [A B T] for A micro batches whose gradients add up to those of the one big batch. Parameters
    are cast to `dtype` for compute (None: as they are). With a mesh the state is init_state's over that mesh, the batch is
    this rank's share, parameters are gathered in mesh.param_dtype, and metrics are those of all ranks' batches together.
    `compile`: "off" eager, "blocks" a compiled pair walked by hand, "step" the whole step traced and compiled.
    `remat` (None: where units are gathered again) keeps each block's input only. With donate=True the given state is
    written over. A step whose loss or gradient is not finite changes no parameter and is counted. Metrics stay on the device.
    """
    seam = seams(mesh, dtype)
    keep_inputs = seam.regathers if remat is None else remat or (seam.regathers and compile == "blocks")
    way = by_blocks if compile == "blocks" else by_func
    gradients = way(cfg, seam, z_weight=z_weight, keep_inputs=keep_inputs)
    world, shards = (mesh.world, mesh.shards) if mesh is not None else (("", 1), ("", 1))

    def update(state: TrainState, batch: Batch, lr: Tensor):
        micro = [Batch(*b) for b in zip(*batch, strict=True)] if batch.tokens.ndim == 3 else [Batch(*batch)]
        count = collectives.all_reduce(predicted(batch.labels, cfg), world).clamp(min=1)
        grads, (total, parts) = gradients(state.params, micro[0], count)
        for more in micro[1:]:
            g, (t, m) = gradients(state.params, more, count)
            pytree.tree_map(lambda sum_, x: sum_.add_(x), (grads, total, parts), (g, t, m))
        total, *parts = collectives.all_reduce(torch.stack([total, parts["ce"], parts["z"]]), world)
        norm = collectives.all_reduce(optim.global_norm(grads).square(), shards).sqrt()
        lr = lr.to(total.dtype)
        bad = ~(torch.isfinite(norm) & torch.isfinite(total))
        skipped = state.skipped + bad
        params, mu, nu = optim.update(
            opt, state.step + 1 - skipped, lr, norm, bad, state.params, grads, state.mu, state.nu, donate=donate
        )
        streak = (state.streak + 1) * bad
        metrics = {"loss": total, "ce": parts[0], "z": parts[1], "grad_norm": norm, "lr": lr, "tokens": count}
        metrics |= {"skipped": skipped, "streak": streak}
        return TrainState(state.step + 1, params, mu, nu, skipped, streak), metrics

    run = jit(update, inductor) if compile == "step" else update
    # The rate stays outside of the trace: it may be any Python function of the step.
    wide = lambda state: torch.promote_types(pytree.tree_leaves(state.params)[0].dtype, torch.float32)
    return lambda state, batch: run(state, batch, optim.rate(opt, state.step, wide(state)))


def _vjp_first(fn, *primals):
    """vjp through the first of fn's outputs; the others come along: (first, pull, *others)."""
    first, pull, others = vjp(lambda *xs: ((out := fn(*xs))[0], out[1:]), *primals, has_aux=True)
    return first, pull, *others
