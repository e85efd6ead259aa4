"""The run of `experiments.finetune`, once its settings are known: load, train, save the model."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree

from experiments import devices
from experiments.finetuning import checks, feature_folders, profiling, resuming, run_folder
from experiments.finetuning.metrics import Log
from experiments.finetuning.resuming import Checkpoints
from experiments.finetuning.settings import Settings
from experiments.launching import distributed
from experiments.launching.distributed import Sharing, World
from experiments.planning import memory
from experiments.planning.memory import Room
from lumina_fn import checkpoint, errors, model, optim, train
from lumina_fn.config import ModelConfig
from lumina_fn.disk import places
from lumina_fn.features import batches, prefetch
from lumina_fn.features.batches import Batching
from lumina_fn.features.mixing import Mixture
from lumina_fn.process.out_of_memory import OutOfMemory
from lumina_fn.sharding import Mesh
from lumina_fn.state.manifest import CHECKPOINTS, ORIGIN
from lumina_fn.train import TrainState


class Job(NamedTuple):
    """What one rank computes with, fixed for a whole run."""

    run: Settings
    world: World
    mesh: Mesh | None
    cfg: ModelConfig
    device: torch.device
    compute: torch.dtype


STREAK = 5  # steps in a row without a finite loss and gradient after which a run is ended


@memory.lowered_by(f"{memory.SHARED}, or lower --micro-batch")
def main(run: Settings, argv: Sequence[str], world: World) -> int:
    """Run a fine-tune with these settings; returns the exit code. A run that is stopped prints `argv` as the command that resumes it."""
    checks.flags(run)
    checks.pairs(run, world)
    device = devices.checked_device(run, world.device, world.say)
    run = replace(run, compile=devices.compiling(run.compile, device))
    compute = _dtype(run.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    mesh = _mesh(run, world, device, compute)
    checks.shares(run, world, device, _micro_batch(run, world))
    out = places.place(run.out, [run.model, *(one.folder for one in feature_folders.named(run.features))])
    # If an earlier attempt of this launch made OUT, its run is continued, whatever the flags say.
    resume, overwrite = ("auto", False) if world.remembers(f"made {out}") else (run.resume, run.overwrite)
    if world.rank == 0:
        run_folder.check(out, resume, overwrite)  # fail before a large model is loaded, which takes minutes
    world.barrier()
    features = feature_folders.opened(run.features)
    # Fine-tuning predicts pictures, so it does not mask their logits. A model without a tokenizer has no ids: the features' are used.
    cfg = checkpoint.read_config(run.model)
    cfg = replace(cfg, masked_ids=(), ids=cfg.ids or features.sets[0].origin.ids)
    features, longest, long = checks.features(run, world, features, cfg)
    job = Job(run, world, mesh, cfg, device, compute)
    stored = checkpoint.stored_dtype(run.model)
    about = resuming.identity(run, cfg, long, stored, compute, _exchanged(run, compute))
    with run_folder.held(out, resume, overwrite) if world.rank == 0 else nullcontext(False) as afresh:
        if afresh:
            world.remember(f"made {out}")
        start = world.total(resuming.starting_step(out / CHECKPOINTS, resume) if world.rank == 0 else 0)
        if start >= run.steps and run_folder.is_finished(out, start):
            print(f"{start} steps are done: {errors.printable(out / run_folder.MODEL)}; a larger --steps goes on")
            return 0
        room = memory.room(run, world, cfg, longest, device, compute)
        if note := room.note():
            world.say(note)
        with room.during(f"while {run.model} was loaded", memory.SHARED):
            state, totals = _state(job, out, start, about)
        if world.rank == 0:
            world.remember(f"made {out}")  # only now: before, a restarted attempt must still follow --resume STEP
        kept = Checkpoints(out / CHECKPOINTS, run, range(start, run.steps), mesh, world, about)
        kept.totals = totals
        try:
            state, stopped = finetune(job, state, kept, features, room)
        except OutOfMemory:
            kept.wait()  # the checkpoint that is being written is good: complete it
            raise
        good = resuming.is_good(state, world)
        if stopped is not None:
            if not good:
                world.say(f"note: {_since(state)}: nothing after step {kept.last} is saved")
            world.say(resuming.farewell(argv, stopped, kept.last, saved=run.save_every > 0, alone=world.ending is None))
            return 128 + stopped
        if not good:
            return _broken(run, world, state, cfg, stored, out)
        folder = run.out / run_folder.MODEL
        with room.during(f"while {folder} was written", memory.SHARED):
            checkpoint.renew_model(folder, state.params, cfg, source=run.model, dtype=stored, mesh=mesh)
        if world.rank == 0:
            run_folder.finish(out, int(state.step))
    print(f"{int(state.step)} steps, {int(state.skipped)} skipped: {errors.printable(folder)}")
    return 0


def _broken(run: Settings, world: World, state: TrainState, cfg: ModelConfig, stored: torch.dtype, out: Path) -> int:
    """End a run whose parameters are not finite: write the last good ones as the model last_good/. Returns the exit code."""
    step = resuming.last_good(out / CHECKPOINTS, state) if world.rank == 0 else None
    where = f"no checkpoint is older: what it began with, {run.model}, is the last that is known to be good"
    if step is not None:
        folder = out / run_folder.LAST_GOOD
        checkpoint.renew_from_checkpoint(folder, out / CHECKPOINTS, step, cfg, source=run.model, dtype=stored)
        where = f"those of step {step}, the last that are known to be good, are in {folder}"
    world.say(f"error: {_since(state)}; {where}; try a smaller --lr, or --dtype float32")
    return 1


def _since(state: TrainState) -> str:
    """The reason why a state is not good, with the step since which it is not."""
    if streak := int(state.streak):
        return f"there was no finite loss and gradient since step {int(state.step) - streak + 1}"
    return f"step {int(state.step)} left parameters or moments that are not finite"


def _state(job: Job, out: Path, start: int, about: dict) -> tuple[TrainState, dict[str, float]]:
    """The state that the run starts from, and the totals of its metrics so far; what OUT holds of later steps is set aside or removed."""
    run, world, mesh, cfg, device, compute = job
    if start:
        like = model.init(cfg, device="meta")
        check = lambda meta: resuming.check(meta, about, out, run.features)
        state, meta = checkpoint.restore(out / CHECKPOINTS, start, mesh, device=device, like=like, check=check)
        world.say(f"going on after step {start}")
    else:
        masters = torch.promote_types(compute, torch.float32)
        if mesh is None:
            params, _ = checkpoint.load_model(run.model, device, masters)
        else:
            params, _ = checkpoint.load_parts(run.model, mesh, masters)
        state, meta = train.init_state(params, _optimizer(run), mesh), {"totals": {}}
    world.barrier()
    if world.rank == 0:
        resuming.cut_back(out, start, world)
        if not start:
            checkpoint.save_heritage(out / ORIGIN, run.model)
    world.barrier()
    return state, meta["totals"]


def finetune(
    job: Job, state: TrainState, kept: Checkpoints, features: Mixture, room: Room
) -> tuple[TrainState, int | None]:
    """Train; returns the last state and the signal that stopped the run, None if none did.

    A run also ends early if, when metrics are logged, STREAK steps in a row had no finite loss and gradient.
    """
    run, world, mesh, cfg, device, compute = job
    make_step = lambda noise: train.make_train_step(
        cfg, _optimizer(run), mesh, z_weight=run.z_weight, dtype=compute, compile=run.compile,
        remat=int(room.setup.remat), donate=True, sync=run.sync, noise=noise,
    )  # fmt: skip
    step, noisy_step = make_step(False), make_step(True)  # each is compiled only when it is first used
    steps = range(int(state.step), run.steps)
    how = Batching(
        run.batch,
        _micro_batch(run, world),
        cfg.max_positions,
        run.seed,
        run.caption_drop,
        run.last,
        run.order,
        run.pack,
    )
    stream = batches.training_batches(features, steps, how, rank=world.rank, size=world.size)
    to_device = lambda x: x.to(device, non_blocking=True)
    tokens, stopped = 0, None
    log = Log(run.out / run_folder.METRICS, steps, run.batch, kept.totals) if world.rank == 0 else nullcontext()
    ready = prefetch.ahead(prefetch.pinned(share, device) for share in stream)
    profile = profiling.Profile(run.out / run_folder.PROFILE, steps, run.profile if world.rank == 0 else 0, world.say)
    with log, world.stopping() as stop, ready as shares, profile, room.during("before the first step") as place:
        for n, share in enumerate(shares, steps.start + 1):
            if stop.before(n):
                stopped = stop.number
                kept.save(n - 1, state)
                break
            noisy = run.noise_scale_every and n % run.noise_scale_every == 0
            profile.before(n)
            place.now = f"in step {n}"
            state, metrics = (noisy_step if noisy else step)(state, pytree.tree_map(to_device, share.batch))
            tokens += share.tokens
            if world.rank == 0:
                log.advance()
            if noisy or n % run.log_every == 0 or n == run.steps:  # the only place that waits for the device
                values = {name: value.item() for name, value in metrics.items()}
                tokens, trained = 0, world.total(tokens)
                if world.rank == 0:
                    kept.totals = log.write(n, values, trained)
                if values["streak"] >= STREAK:
                    break
            place.now = f"while step {n} was saved"
            kept.save_if_due(n, state)
        kept.wait()
    return state, stopped


def _optimizer(run: Settings) -> train.AdamW:
    rate = (
        optim.cosine(run.lr, run.warmup, run.steps) if run.schedule == "cosine" else optim.constant(run.lr, run.warmup)
    )
    return train.AdamW(rate, decay=run.weight_decay, clip=run.clip)


def _exchanged(run: Settings, compute: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which parameters are gathered and gradients are summed."""
    return _dtype(run.param_dtype, compute), _dtype(run.reduce_dtype, torch.promote_types(compute, torch.float32))


def _mesh(run: Settings, world: World, device: torch.device, compute: torch.dtype) -> Mesh | None:
    param_dtype, reduce_dtype = _exchanged(run, compute)
    sharing = Sharing(
        run.strategy, param_dtype, reduce_dtype, run.shard_size, run.forward_prefetch, run.backward_prefetch
    )
    return distributed.mesh(world, device, sharing)


def _micro_batch(run: Settings, world: World) -> int:
    """Samples of a micro batch: no more than a process's share."""
    return min(run.micro_batch, -(-run.batch // world.size))


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else getattr(torch, name)
