"""Fine-tune a model on features made by experiments.pretokenize.

    python -m experiments.finetune --model DIR --features DIR --out DIR
    torchrun --nproc_per_node 8 -m experiments.finetune --model DIR --features DIR --out DIR

OUT receives metrics.jsonl while it runs and model/, a native folder, at the end. With torchrun each process trains on its
share of every batch and keeps its part of the model; experiments/launch has scripts for one machine and for two. Without
arguments this is the embedded default: the fine-tune of `make demo`.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.utils._pytree as pytree

from experiments import distributed, run_folder, settings
from experiments.distributed import ALONE, World
from experiments.metrics import Log
from lumina_fn import batches, checkpoint, data, errors, files, model, optim, prompt, train
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.sharding import Mesh
from lumina_fn.train import TrainState

STREAK = 5  # steps in a row without a finite loss and gradient, after which a run is broken
REMAT_FROM = 10**9  # parameters: from here on activations are what does not fit


@dataclass(frozen=True)
class Settings:
    model: Annotated[Path, "the model: a native or Hugging Face folder"]
    features: Annotated[Path, "a folder written by experiments.pretokenize"]
    out: Annotated[Path, "the run's folder, must not exist"]
    steps: Annotated[int, "how many"] = 5000
    batch: Annotated[int, "samples per step, over all processes"] = 8
    micro_batch: Annotated[
        int,
        "samples per forward and backward of a process; a step accumulates as many of them as its share of the batch needs",
    ] = 1
    lr: Annotated[float, "peak learning rate"] = 2e-5
    warmup: Annotated[int, "steps of linear warm-up"] = 0
    schedule: Annotated[Literal["constant", "cosine"], "of the learning rate after warm-up; cosine ends at 0"] = (
        "constant"
    )
    weight_decay: Annotated[float, "of AdamW, on every parameter"] = 1e-2
    clip: Annotated[float, "global gradient norm"] = 1.0
    z_weight: Annotated[float, "weight of the z-loss"] = 1e-5
    caption_drop: Annotated[float, "probability that an item loses its caption, for guidance"] = 0.1
    seed: Annotated[int, "of the order and the caption drop"] = 0
    dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16"], "of compute; auto: float32 on a CPU, else bfloat16"
    ] = "auto"
    device: Annotated[str, "cpu, npu, cuda, or auto: an accelerator if there is one; each process takes its own"] = (
        "auto"
    )
    strategy: Annotated[
        Literal["fsdp", "sdp", "no", "hybrid", "hybrid_zero2"],
        "of many processes. fsdp: parameters, gradients and optimizer in parts, gathered for each forward and backward; "
        "sdp: gathered once for both; no: whole on every process; hybrid, hybrid_zero2: fsdp, sdp within --shard-size "
        "processes, whole copies across",
    ] = "fsdp"
    shard_size: Annotated[
        int | None,
        "processes that share one copy of the model under hybrid strategies; divides their number (default: those of one machine)",
    ] = None
    param_dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        "of parameters while they are gathered; auto: that of compute; float16 is refused, with the reason",
    ] = "auto"
    reduce_dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        "of gradients while they are summed over processes; auto: float32, float64 where compute is; float16 is refused",
    ] = "auto"
    forward_prefetch: Annotated[
        bool, "gather the next block's parameters while one computes, on devices with streams"
    ] = False
    backward_prefetch: Annotated[bool, "the same on the way back"] = False
    sync: Annotated[
        bool,
        "sum gradients over processes after each micro batch; if not, once a step, with a whole model's gradients held",
    ] = True
    remat: Annotated[
        bool | None,
        "keep only each block's input and compute the rest again in the backward (default: for a billion parameters and more)",
    ] = None
    compile: Annotated[Literal["off", "blocks", "step"], "nothing, one block for all, or the whole step"] = "blocks"
    last: Annotated[Literal["partial", "drop"], "what becomes of an epoch's last, smaller batch"] = "partial"
    log_every: Annotated[int, "steps between lines of metrics.jsonl"] = 10
    noise_scale_every: Annotated[
        int,
        "steps between measurements of the gradient noise scale, the batch beyond which more samples hardly help; 0: never",
    ] = 0
    overwrite: Annotated[bool, "start afresh in an existing OUT"] = False


def main(argv: Sequence[str] | None = None, world: World = ALONE) -> int:
    argv = sys.argv[1:] if argv is None else argv
    run = settings.parse(Settings, __doc__, argv or _embedded_default(world))
    _check(run)
    device = world.device(run.device)
    compute = _dtype(run.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    mesh = _mesh(run, world, device, compute)
    if device.type == "cpu" and (run.forward_prefetch or run.backward_prefetch):
        world.say("note: --forward-prefetch and --backward-prefetch have no effect on a CPU: it has no streams")
    if run.noise_scale_every and run.batch <= _micro_batch(run, world):
        raise InputError(
            f"--noise-scale-every {run.noise_scale_every}: a step of one micro batch has nothing to compare; "
            "give a larger --batch or a smaller --micro-batch"
        )
    if run.batch < world.size:
        world.say(f"note: --batch {run.batch} leaves {world.size - run.batch} of {world.size} processes without work")
    out = files.place(run.out, [run.model, run.features])
    # What an earlier attempt of this launch left in OUT is its own.
    overwrite = run.overwrite or world.remembers(f"made {out}")
    if world.rank == 0:
        run_folder.check(out, overwrite)  # loading a large model takes minutes
    world.barrier()
    features = data.FeatureSet(run.features)
    masters = torch.promote_types(compute, torch.float32)
    if mesh is None:
        params, cfg = checkpoint.load_model(run.model, device, masters)
    else:
        params, cfg = checkpoint.load_parts(run.model, mesh, masters)
    # Fine-tuning leaves mask_image_logits off: pictures are what it predicts. A model without a tokenizer has no ids of its own.
    cfg = replace(cfg, masked_ids=(), ids=cfg.ids or features.origin.ids)
    _check_features(run, world, features, cfg)
    with run_folder.made(out, overwrite) if world.rank == 0 else nullcontext():
        if world.rank == 0:
            world.remember(f"made {out}")
        world.barrier()
        state = finetune(run, world, mesh, params, cfg, features, device, compute)
        broken = int(state.streak) >= STREAK
        folder = run.out / ("last_good" if broken else "model")
        stored = checkpoint.stored_dtype(run.model)
        checkpoint.save_model(folder, state.params, cfg, source=run.model, dtype=stored, mesh=mesh)
    if broken:
        world.say(
            f"error: the last {int(state.streak)} steps had no finite loss and gradient; the parameters before them are in "
            f"{folder}: try a smaller --lr, or --dtype float32"
        )
        return 1
    print(f"{run.steps} steps, {int(state.skipped)} skipped: {errors.printable(folder)}")
    return 0


def finetune(
    run: Settings, world: World, mesh: Mesh | None, params, cfg: ModelConfig, features: data.FeatureSet,
    device: torch.device, compute: torch.dtype,
) -> TrainState:  # fmt: skip
    """The state after run.steps, or earlier where a log interval finds the run broken."""
    rate = (
        optim.cosine(run.lr, run.warmup, run.steps) if run.schedule == "cosine" else optim.constant(run.lr, run.warmup)
    )
    opt = train.AdamW(rate, decay=run.weight_decay, clip=run.clip)
    make_step = lambda noise: train.make_train_step(
        cfg, opt, mesh, z_weight=run.z_weight, dtype=compute, compile=run.compile,
        remat=_parameters(cfg) >= REMAT_FROM if run.remat is None else run.remat,
        donate=True, sync=run.sync, noise=noise,
    )  # fmt: skip
    step, noisy_step = make_step(False), make_step(True)  # nothing is compiled before it is used
    state = train.init_state(params, opt, mesh)
    with Log(run.out / "metrics.jsonl", run.steps, run.batch) if world.rank == 0 else nullcontext() as log:
        stream = batches.training_batches(
            features, range(run.steps), batch=run.batch, micro_batch=_micro_batch(run, world),
            max_positions=cfg.max_positions, end=features.origin.ids.end, seed=run.seed, caption_drop=run.caption_drop,
            last=run.last, rank=world.rank, size=world.size,
        )  # fmt: skip
        tokens = 0
        for n, batch in enumerate(stream, 1):
            noisy = run.noise_scale_every and n % run.noise_scale_every == 0
            batch = train.Batch(*(x.to(device, non_blocking=True) for x in batch))
            state, metrics = (noisy_step if noisy else step)(state, batch)
            tokens += batch.tokens.numel()
            if log:
                log.advance()
            if noisy or n % run.log_every == 0 or n == run.steps:  # the only place that waits for the device
                values = {name: value.item() for name, value in metrics.items()}
                tokens, trained = 0, world.total(tokens)
                if log:
                    log.write(n, values, trained)
                if values["streak"] >= STREAK:
                    break
    return state


def _embedded_default(world: World) -> list[str]:
    """Arguments for the fine-tune of `make demo`, whose model and features are written first."""
    from experiments.demo import tasks

    if world.rank == 0:
        tasks.finetune_arguments()
    world.barrier()
    return tasks.finetune_flags()


def _mesh(run: Settings, world: World, device: torch.device, compute: torch.dtype) -> Mesh | None:
    return distributed.mesh(
        world, device, strategy=run.strategy, shard_size=run.shard_size, param_dtype=_dtype(run.param_dtype, compute),
        reduce_dtype=_dtype(run.reduce_dtype, torch.promote_types(compute, torch.float32)),
        forward_prefetch=run.forward_prefetch, backward_prefetch=run.backward_prefetch,
    )  # fmt: skip


def _micro_batch(run: Settings, world: World) -> int:
    """Samples of a micro batch: no more than a process's share."""
    return min(run.micro_batch, -(-run.batch // world.size))


def _parameters(cfg: ModelConfig) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(model.init(cfg, device="meta")))


def _check(run: Settings) -> None:
    for name, least in (("steps", 1), ("batch", 1), ("micro_batch", 1), ("warmup", 0), ("log_every", 1), ("seed", 0),
                        ("noise_scale_every", 0)):  # fmt: skip
        if getattr(run, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(run, name)}: expected at least {least}")
    if not 0 < run.lr < math.inf:
        raise InputError(f"--lr {run.lr}: expected a positive, finite number")
    if not run.clip > 0:
        raise InputError(f"--clip {run.clip}: expected a positive number (inf: never)")
    for name in ("weight_decay", "z_weight"):
        if not 0 <= getattr(run, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(run, name)}: expected a finite number, at least 0")
    if not 0 <= run.caption_drop <= 1:
        raise InputError(f"--caption-drop {run.caption_drop}: expected a probability from 0 to 1")
    if run.shard_size is not None and run.shard_size < 1:
        raise InputError(f"--shard-size {run.shard_size}: expected at least 1")
    for name in ("param_dtype", "reduce_dtype"):
        if getattr(run, name) == "float16":
            raise InputError(
                f"--{name.replace('_', '-')} float16: float16 gradients underflow without loss scaling, which is not offered: "
                "use bfloat16 or float32"
            )


def _check_features(run: Settings, world: World, features: data.FeatureSet, cfg: ModelConfig) -> None:
    if not batches.steps_per_epoch(len(features), run.batch, run.last):
        what = "is empty" if not len(features) else f"has {len(features)} items, fewer than --batch {run.batch}"
        raise InputError(f"{run.features} {what}: nothing to train on; pretokenize more, or use --last partial")
    if features.largest_id >= cfg.vocab:
        raise InputError(
            f"{run.features} holds id {features.largest_id}, {run.model} has ids 0 to {cfg.vocab - 1}: "
            "these features were made for another model; run experiments.pretokenize with this one"
        )
    if (run.model / "tokenizer.json").exists():
        own = prompt.load_tokenizer(run.model).fingerprint
        if own != features.origin.tokenizer:
            raise InputError(
                f"{run.features} was made with tokenizer {features.origin.tokenizer[:12]}, {run.model} has {own[:12]}: "
                "run experiments.pretokenize with this model"
            )
    else:
        world.say(
            f"note: {run.model} has no tokenizer, nor will the tuned model: to sample, put its original's tokenizer files into it"
        )
    longest = max(features.lengths())
    if longest > cfg.max_positions:
        world.say(f"note: items of up to {longest} tokens are cut to the model's {cfg.max_positions}")


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else getattr(torch, name)


if __name__ == "__main__":
    distributed.run(main)
