"""Checks of experiments.finetune before training: of flags, and of features that do not match the model."""

import math
from typing import Any

import numpy as np
import torch

from experiments.finetuning import feature_folders, long_items
from experiments.finetuning.long_items import Fitted
from experiments.launching.distributed import World
from lumina_fn import data, prompt
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.features.mixing import Mixture


def flags(run: Any) -> None:
    """Raises InputError for a flag of experiments.finetune whose value cannot be used."""
    if run.lr * run.weight_decay >= 1:
        raise InputError(
            f"--lr {run.lr} with --weight-decay {run.weight_decay}: a step multiplies parameters by 1 - lr x decay, which must stay "
            "above 0; give a smaller one of them"
        )
    feature_folders.named(run.features)
    if run.resume not in ("auto", "no", "last-good") and not run.resume.isdecimal():
        raise InputError(f"--resume {run.resume}: expected auto, no, last-good or the step of a checkpoint")
    for name in ("param_dtype", "reduce_dtype"):
        if getattr(run, name) == "float16":
            raise InputError(
                f"--{name.replace('_', '-')} float16: float16 gradients underflow without loss scaling, which is not offered: "
                "use bfloat16 or float32"
            )


def pairs(run: Any, world: World) -> None:
    """Print a note for two flags of which one leaves the other without its effect."""
    if run.warmup >= run.steps:
        reached = (
            f"its last step has {run.steps / run.warmup:.0%} of --lr"
            if run.warmup > run.steps
            else "only the last step has --lr"
        )
        world.say(f"note: --warmup {run.warmup} lasts as long as --steps {run.steps}: {reached}")
    if not run.save_every and run.keep_every:
        world.say(f"note: --keep-every {run.keep_every} has no effect with --save-every 0, which saves no checkpoint")
    elif run.keep_every and run.keep_every % run.save_every:
        world.say(
            f"note: --keep-every {run.keep_every} keeps only checkpoints that --save-every {run.save_every} makes: "
            f"those of each {math.lcm(run.keep_every, run.save_every)} steps"
        )


def shares(run: Any, world: World, device: torch.device, micro_batch: int) -> None:
    """Raises InputError for a step that cannot be divided as the flags ask; prints a note for flags without effect here."""
    if device.type == "cpu" and (run.forward_prefetch or run.backward_prefetch):
        world.say("note: --forward-prefetch and --backward-prefetch have no effect on a CPU: it has no streams")
    if run.noise_scale_every and run.batch <= micro_batch:
        raise InputError(
            f"--noise-scale-every {run.noise_scale_every}: a step of one micro batch has nothing to compare; "
            "give a larger --batch or a smaller --micro-batch"
        )
    if run.batch < world.size:
        world.say(f"note: --batch {run.batch} leaves {world.size - run.batch} of {world.size} processes without work")


def features(run: Any, world: World, mixture: Mixture, cfg: ModelConfig) -> Fitted:
    """The items to train on. Raises InputError for features of another model, or too few for a step."""
    for features in mixture.sets:
        _of_model(run, features, cfg)
        if n := features.unchecked():
            world.say(
                f"note: {n} shards of {features.folder} have no checksum (an earlier version wrote them): damage is not noticed; "
                "the same experiments.pretokenize command adds them"
            )
    fitted = long_items.fitted(run, world, mixture, cfg)
    mixture = fitted.mixture
    for features, count in zip(mixture.sets, mixture.sizes, strict=True):
        if mixture.weights and not count:
            what = "has no item that fits the model" if len(features) else "is empty"
            raise InputError(f"{features.folder} {what}: nothing to take its share from; leave it out")
    if mixture.steps_per_epoch(run.batch, run.last) == 0:
        names = ", ".join(str(features.folder) for features in mixture.sets)
        what = "is empty" if not len(mixture) else f"has {len(mixture)} items, fewer than --batch {run.batch}"
        raise InputError(f"{names} {what}: nothing to train on; pretokenize more, or use --last partial")
    if not (run.model / "tokenizer.json").exists():
        world.say(
            f"note: {run.model} has no tokenizer, nor will the tuned model: to sample, put its original's tokenizer files into it"
        )
    _row_length(run, mixture, cfg)
    return fitted


def _row_length(run: Any, mixture: Mixture, cfg: ModelConfig) -> None:
    """Raises InputError for a --pack that no row of the model has, or that an item is longer than, unless that item is cut anyway."""
    if run.pack is None:
        return
    fit = [np.where(n <= cfg.max_positions, n, 0) for n in mixture.lengths]
    s = max(range(len(fit)), key=lambda s: fit[s].max(initial=0))
    longest = int(fit[s].max(initial=0))
    if longest <= run.pack <= cfg.max_positions:
        return
    accepted = f"{run.model} takes {cfg.max_positions}: give --pack {max(1, longest)} to {cfg.max_positions}"
    if run.pack > cfg.max_positions:
        raise InputError(f"--pack {run.pack}: {accepted}")
    row = mixture.sets[s].row(int(fit[s].argmax()))
    raise InputError(
        f"--pack {run.pack}: the longest item, row {row} of {mixture.sets[s].folder}, has {longest} tokens, and {accepted}"
    )


def _of_model(run: Any, features: data.FeatureSet, cfg: ModelConfig) -> None:
    if features.largest_id >= cfg.vocab:
        raise InputError(
            f"{features.folder} holds id {features.largest_id} ({features.where(cfg.vocab)}), {run.model} has ids 0 to {cfg.vocab - 1}: "
            "these features were made for another model; run experiments.pretokenize with this one"
        )
    if (run.model / "tokenizer.json").exists():
        own = prompt.load_tokenizer(run.model).fingerprint
        if own != features.origin.tokenizer:
            raise InputError(
                f"{features.folder} was made with tokenizer {features.origin.tokenizer[:12]}, {run.model} has {own[:12]}: "
                "run experiments.pretokenize with this model"
            )
