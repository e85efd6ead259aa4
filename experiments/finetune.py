"""Fine-tune a model on features made by experiments.pretokenize.

    python -m experiments.finetune --model DIR --features DIR --out DIR

OUT receives metrics.jsonl while it runs and model/, a native folder, at the end. Without arguments this is the
embedded default: the fine-tune of `make demo`.
"""

import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import Progress

from experiments import settings
from lumina_fn import batches, checkpoint, data, errors, files, optim, prompt, train
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.train import TrainState

CONTENTS = {"metrics.jsonl", "model", "last_good"}  # of a run's folder
SHOWN = ("loss", "ce", "z", "grad_norm", "lr", "tokens_per_second")  # of a step, on the terminal
STREAK = 5  # steps in a row without a finite loss and gradient, after which a run is broken


@dataclass(frozen=True)
class Settings:
    model: Annotated[Path, "the model: a native or Hugging Face folder"]
    features: Annotated[Path, "a folder written by experiments.pretokenize"]
    out: Annotated[Path, "the run's folder, must not exist"]
    steps: Annotated[int, "how many"] = 5000
    batch: Annotated[int, "samples per step"] = 8
    micro_batch: Annotated[int, "samples per forward and backward; a step accumulates batch / micro-batch of them"] = 1
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
    device: Annotated[str, "cpu, npu, cuda, or auto: an accelerator if there is one"] = "auto"
    remat: Annotated[bool, "keep only each block's input and compute the rest again in the backward"] = False
    compile: Annotated[Literal["off", "blocks", "step"], "nothing, one block for all, or the whole step"] = "blocks"
    last: Annotated[Literal["partial", "drop"], "what becomes of an epoch's last, smaller batch"] = "partial"
    log_every: Annotated[int, "steps between lines of metrics.jsonl"] = 10
    overwrite: Annotated[bool, "start afresh in an existing OUT"] = False


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        from experiments.demo import tasks

        argv = tasks.finetune_arguments()
    run = settings.parse(Settings, __doc__, argv)
    _check(run)
    out = files.place(run.out, [run.model, run.features])
    device = settings.device(run.device)
    compute = _dtype(run.dtype, device)
    features = data.FeatureSet(run.features)
    masters = torch.float64 if compute == torch.float64 else torch.float32
    params, cfg = checkpoint.load_model(run.model, device, masters)
    # Fine-tuning leaves mask_image_logits off: pictures are what it predicts. A model without a tokenizer has no ids of its own.
    cfg = replace(cfg, masked_ids=(), ids=cfg.ids or features.origin.ids)
    _check_features(run, features, cfg)
    with run_folder(out, run.overwrite):
        state = finetune(run, params, cfg, features, device, compute)
        broken = int(state.streak) >= STREAK
        folder = run.out / ("last_good" if broken else "model")
        stored = checkpoint.stored_dtype(run.model)
        params = pytree.tree_map(lambda leaf: leaf.to(stored), state.params)
        checkpoint.save_model(folder, params, cfg, source=run.model)
    if broken:
        print(
            f"error: the last {int(state.streak)} steps had no finite loss and gradient; the parameters before them are in "
            f"{errors.printable(folder)}: try a smaller --lr, or --dtype float32",
            file=sys.stderr,
        )
        return 1
    print(f"{run.steps} steps, {int(state.skipped)} skipped: {errors.printable(folder)}")
    return 0


def finetune(
    run: Settings, params, cfg: ModelConfig, features: data.FeatureSet, device: torch.device, compute: torch.dtype
) -> TrainState:
    """The state after run.steps, or earlier where a log interval finds the run broken."""
    rate = (
        optim.cosine(run.lr, run.warmup, run.steps) if run.schedule == "cosine" else optim.constant(run.lr, run.warmup)
    )
    opt = train.AdamW(rate, decay=run.weight_decay, clip=run.clip)
    step = train.make_train_step(
        cfg, opt, z_weight=run.z_weight, dtype=compute, compile=run.compile, remat=run.remat, donate=True
    )
    state = train.init_state(params, opt)
    with Log(run.out / "metrics.jsonl", run.steps) as log:
        stream = batches.training_batches(
            features, range(run.steps), batch=run.batch, micro_batch=run.micro_batch, max_positions=cfg.max_positions,
            end=features.origin.ids.end, seed=run.seed, caption_drop=run.caption_drop, last=run.last,
        )  # fmt: skip
        for n, batch in enumerate(stream, 1):
            state, metrics = step(state, train.Batch(*(x.to(device, non_blocking=True) for x in batch)))
            log.count(batch)
            if n % run.log_every == 0 or n == run.steps:  # the only place that waits for the device
                values = {name: value.item() for name, value in metrics.items()}
                log.write(n, values)
                if values["streak"] >= STREAK:
                    break
    return state


class Log:
    """metrics.jsonl, and the same on the terminal."""

    def __init__(self, path: Path, steps: int):
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(console=self.console, disable=not self.console.is_terminal)
        self.path = path
        self.task = self.progress.add_task("training", total=steps)
        self.tokens, self.start = 0, time.perf_counter()

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def count(self, batch: train.Batch) -> None:
        """Take note of a step's tokens, padding included: the shapes are known, the contents are on the device."""
        self.tokens += batch.tokens.numel()
        self.progress.advance(self.task)

    def write(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # NaN is no JSON
        row = {"step": step, **finite, "tokens_per_second": self.tokens / (now - self.start)}
        self.tokens, self.start = 0, now
        with files.writable(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {**values, "tokens_per_second": row["tokens_per_second"]}
        line = "  ".join(f"{name} {shown[name]:.4g}" for name in SHOWN)
        self.console.print(f"step {step}  {line}", markup=False, soft_wrap=True)


@contextmanager
def run_folder(out: Path, overwrite: bool) -> Iterator[None]:
    """OUT, made and locked by this process; what an earlier run left there is an error, or removed with `overwrite`."""
    with files.writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # The root has no name, and is never free.
        opened = (out.parent / f".{out.name}.lock").open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{out} is being written by process {file.read().strip()}: wait for it or stop it"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        with files.writable(out):
            _clear(out, overwrite)
            out.mkdir()
        yield


def _clear(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"{out} exists: give a new place, or --overwrite to start afresh there")
    strangers = [] if not out.is_dir() else sorted(p.name for p in out.iterdir() if p.name not in CONTENTS)
    if strangers or not out.is_dir():
        raise InputError(
            f"{out} is no run's folder{f' (it holds {strangers[0]})' if strangers else ''}: give another place"
        )
    shutil.rmtree(out)


def _check(run: Settings) -> None:
    for name, least in (("steps", 1), ("batch", 1), ("micro_batch", 1), ("warmup", 0), ("log_every", 1), ("seed", 0)):
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


def _check_features(run: Settings, features: data.FeatureSet, cfg: ModelConfig) -> None:
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
        note = f"{run.model} has no tokenizer, nor will the tuned model: to sample, put its original's tokenizer files into it"
        print(errors.printable(f"note: {note}"), file=sys.stderr)
    longest = max(features.lengths())
    if longest > cfg.max_positions:
        print(f"note: items of up to {longest} tokens are cut to the model's {cfg.max_positions}", file=sys.stderr)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


if __name__ == "__main__":
    errors.run(main)
