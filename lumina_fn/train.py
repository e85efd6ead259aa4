"""One training step as a function of (state, batch)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from jaxtyping import Int
from torch import Tensor

from lumina_fn import optim, sharding
from lumina_fn.config import ModelConfig
from lumina_fn.gradient_noise import noise_and_signal, piece, square
from lumina_fn.gradients import Walk, block_pair, seams, walk
from lumina_fn.loss import Batch, Packed, loss, predicted
from lumina_fn.model import Params, over_units
from lumina_fn.optim import AdamW
from lumina_fn.sharding import Mesh, Sharded
from lumina_fn.transform import Pair, inductor, jit
from ops import collectives

__all__ = [
    "AdamW",
    "Batch",
    "Packed",
    "TrainState",
    "init_state",
    "is_finite",
    "loss",
    "make_train_step",
    "make_update",
]


class TrainState(NamedTuple):
    """What a training step changes: parameters, AdamW's moments, counters."""

    step: Int[Tensor, ""]  # steps taken, skipped ones included
    params: Params  # master parameters, float32 or wider
    mu: Params
    nu: Params
    skipped: Int[Tensor, ""]  # steps whose loss or gradient was not finite
    streak: Int[Tensor, ""]  # how many of the latest steps in a row were skipped


def init_state(params: Params, opt: AdamW, mesh: Mesh | None = None) -> TrainState:
    """The state at step 0 of these parameters, which are not copied; with a mesh, of this rank's part of each unit."""
    if mesh is not None:
        part = lambda unit: unit if isinstance(unit, Sharded) else sharding.shard(unit, mesh)
        params = over_units(part, params)
    zeros = lambda: pytree.tree_map(torch.zeros_like, params)
    zero = lambda: torch.zeros((), dtype=torch.int64, device=pytree.tree_leaves(params)[0].device)
    return TrainState(zero(), params, zeros(), zeros(), zero(), zero())


def is_finite(state: TrainState) -> bool:
    """Whether all of this rank's parameters and optimizer state are finite; waits for the device."""
    leaves = pytree.tree_leaves((state.params, state.mu, state.nu))
    ends = [end for leaf in leaves if leaf.numel() for end in torch.aminmax(leaf)]  # one pass; with NaN both are NaN
    return bool(torch.isfinite(torch.stack(ends)).all())


class Options(NamedTuple):
    """How an update is computed; make_train_step says what each field means."""

    z_weight: float = 1e-5
    dtype: torch.dtype | None = None
    compiled: bool = False  # the blocks
    remat: bool | int = False
    donate: bool = False
    sync: bool = True
    noise: bool = False


# The public contract's signature: options are named one by one, so that a call reads as what it trains with.
def make_train_step(
    cfg: ModelConfig, opt: AdamW, mesh: Mesh | None = None, *, z_weight: float = 1e-5, dtype: torch.dtype | None = None,
    compile: str = "off", remat: bool | int = False, donate: bool = False, sync: bool = True, noise: bool = False,
) -> Callable[[TrainState, Batch | Packed], tuple[TrainState, dict[str, Tensor]]]:  # fmt: skip
    """step(state, batch) -> (state, metrics): forward, backward, global-norm clip, AdamW.

    A batch is [B T], or [A B T] for A micro batches whose gradients add up to those of the one big batch. Parameters are
    cast to `dtype` for compute (None: as they are). With a mesh the state is init_state's over that mesh, the batch is this
    rank's share (A the same on every rank), and metrics are those of all ranks' batches together.

    compile  "off" eager, "blocks" one compiled pair for all blocks, "step" the whole step traced and compiled
    remat    of this many blocks, the first ones, keep only the input for the backward, which computes the rest again (True: of all);
             without "blocks" it is all of them where units are gathered again in the backward, since autograd would keep those
    donate   overwrite the given state
    sync     reduce gradients over ranks after each micro batch; False: once per step, which keeps a whole model's gradients
    noise    metrics "noise" and "signal" of the gradients, from micro batches on all ranks: see lumina_fn.gradient_noise

    A step whose loss or gradient is not finite changes no parameter and is counted in `skipped`. Metrics stay on the device.
    """
    update = make_update(cfg, opt, mesh, Options(z_weight, dtype, compile == "blocks", remat, donate, sync, noise))
    run = jit(update, inductor) if compile == "step" else update
    # The learning rate stays outside the trace: it may be any Python function of the step.
    wide = lambda state: torch.promote_types(_leaf(state.params).dtype, torch.float32)
    return lambda state, batch: run(state, batch, optim.rate(opt, state.step, wide(state)))


def make_update(
    cfg: ModelConfig, opt: AdamW, mesh: Mesh | None, options: Options
) -> Callable[[TrainState, Batch | Packed, Tensor], tuple[TrainState, dict[str, Tensor]]]:
    """update(state, batch, lr) -> (state, metrics): the step of make_train_step as a function of tensors alone, which can be exported."""
    z_weight, dtype, compiled, remat, donate, sync, noise = options
    seam = seams(mesh, dtype)
    recomputed = cfg.layers if remat is True or (seam.regathers and not compiled) else int(remat)

    def pairs(packed: bool) -> list[Pair]:
        of = lambda keep_inputs: block_pair(cfg, compiled=compiled, keep_inputs=keep_inputs, packed=packed)
        return [of(i < recomputed) for i in range(cfg.layers)]

    world, shards = (mesh.world, mesh.shards) if mesh is not None else (("", 1), ("", 1))
    whole = lambda grads, unit: pytree.tree_map(lambda g: g.to(_leaf(unit).dtype), grads)

    def gradients(params: Params, micro: list[Batch | Packed], count: Tensor) -> tuple[Params, Tensor]:
        """This rank's part of the gradients summed over all micro batches of all ranks; its own [loss, ce, z] and the terms for `noise`."""
        grads: Params | None = None
        terms: Tensor | float = 0.0
        for batch in micro:
            squares: list[Tensor] = []

            def scatter(whole_grads, unit, squares=squares):
                if noise:
                    squares.append(square(whole_grads))
                return seam.scatter(whole_grads, unit) if sync else whole(whole_grads, unit)

            how = Walk(cfg, seam, pairs(isinstance(batch, Packed)), z_weight, scatter)
            grads, more = walk(how, params, batch, count, grads)
            terms = terms + (torch.cat([more, piece(squares, predicted(batch.labels, cfg) / count)]) if noise else more)
        assert grads is not None, "a batch has micro batches"
        assert isinstance(terms, Tensor)
        return grads if sync else over_units(seam.scatter, grads, params), terms

    def update(state: TrainState, batch: Batch | Packed, lr: Tensor):
        micro = [type(batch)(*b) for b in zip(*batch, strict=True)] if batch.tokens.ndim == 3 else [batch]
        count = collectives.all_reduce(predicted(batch.labels, cfg), world).clamp(min=1)
        grads, terms = gradients(state.params, micro, count)
        total, ce, z, *noisy = collectives.all_reduce(terms, world)
        norm = collectives.all_reduce(optim.global_norm(grads).square(), shards).sqrt()
        lr = lr.to(total.dtype)
        bad = ~(torch.isfinite(norm) & torch.isfinite(total))
        skipped = state.skipped + bad
        now = optim.Now(state.step + 1 - skipped, lr, norm, bad)
        params, mu, nu = optim.update(opt, now, state.params, grads, (state.mu, state.nu), donate=donate)
        streak = (state.streak + 1) * bad
        metrics = {"loss": total, "ce": ce, "z": z, "grad_norm": norm, "lr": lr, "tokens": count}
        metrics |= {"skipped": skipped, "streak": streak}
        if noise:
            squares, pieces = noisy
            metrics["noise"], metrics["signal"] = noise_and_signal(squares, pieces, norm.square())
        return TrainState(state.step + 1, params, mu, nu, skipped, streak), metrics

    return update


def _leaf(tree) -> Tensor:
    return pytree.tree_leaves(tree)[0]
