"""What idle threads that sleep (OMP_WAIT_POLICY=passive) are worth to each command: on a free machine, and beside other work.

By default OpenMP's idle threads spin, and each parallel call finds them awake. Beside other work they take the cores that the next
threads need. The policy is read once, as PyTorch is loaded, so each side has a process of its own. The other work is as many busy
processes as a side has threads. `finetune` and `pretokenize` set the policy; `sample`, whose calls are short, does not.
"""

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from bench import decoding, pictures
from bench.harness import THREADS, Bench, Ratios, Row, Runs, Worker, ratio, row
from experiments.demo import tasks
from lumina_fn import checkpoint, optim, train
from lumina_fn.loss import Batch

POLICY = "OMP_WAIT_POLICY"
STEPS, ITEMS, TOKENS = 3, 32, 96  # of a run: the demo's batch, items of about its length


def steps() -> Bench:
    """Steps of the demo's fine-tune."""
    params, cfg = checkpoint.load_model(tasks.LM)
    optimizer = train.AdamW(optim.constant(0.0, 0))  # equal work each time
    step = train.make_train_step(cfg, optimizer, dtype=torch.float32, compile="blocks", donate=False)
    state = train.init_state(params, optimizer)
    ids = torch.randint(cfg.vocab, (1, ITEMS, TOKENS), generator=torch.Generator().manual_seed(1))

    def run() -> list[float]:
        for _ in range(STEPS):
            _, metrics = step(state, Batch(ids, ids))
        return [metrics["loss"].item(), metrics["grad_norm"].item()]

    return Bench(run, run)


JOBS: dict[str, tuple] = {  # a part of each command's work
    "finetune": (steps,),
    "pretokenize": (pictures.our_encoder, 256, 1),
    "sample": (decoding.ours, 1.0, 8, True),
}
TARGETS = {"finetune": {"wall_ratio": ">= 1.2"}, "pretokenize": {"wall_ratio": ">= 1.2"}}  # beside other work


def rows(quick: bool) -> Iterator[Row]:
    for name in JOBS:
        for beside in (0, THREADS):
            found = in_turn(JOBS[name], 2 if quick else 4, beside)
            yield _row(name, beside, found)


def _row(name: str, beside: int, found: Mapping[str, Runs]) -> Row:
    walls, cpus = (
        ratio(*([getattr(sample, kind) for sample in found[side].samples] for side in ("spinning", "passive")))
        for kind in ("wall", "cpu")
    )
    return row(
        f"waiting_{name}_{'busy' if beside else 'idle'}",
        f"time without {POLICY}=passive / with it, beside {beside} busy processes",
        TARGETS.get(name, {}) if beside else {},
        Ratios(cpus.median, walls.median),
        measured={"wall_spread": walls[1:], **{f"{side}_s": runs.wall for side, runs in found.items()}},
    )


def in_turn(side: tuple, pairs: int, beside: int) -> dict[str, Runs]:
    """Runs of a side with idle threads that spin, and that sleep, one of each in turn, beside so many busy processes."""
    workers: dict[str, Worker] = {}
    try:
        for name, value in (("spinning", None), ("passive", "passive")):
            with _set(value):
                workers[name] = Worker(*side)
        for worker in workers.values():
            worker.check()
        with _busy(beside):
            rounds = [{name: workers[name].run() for name in _order(turn, workers)} for turn in range(pairs)]
        return {
            name: Runs([found[name] for found in rounds], worker.peak(), worker.imported)
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.end()


def _order(turn: int, names: Mapping[str, object]) -> list[str]:
    return list(names)[:: -1 if turn % 2 else 1]


@contextmanager
def _set(value: str | None) -> Iterator[None]:
    """Within the block processes start with this policy."""
    before = os.environ.pop(POLICY, None)
    try:
        if value is not None:
            os.environ[POLICY] = value
        yield
    finally:
        os.environ.pop(POLICY, None)
        if before is not None:
            os.environ[POLICY] = before


@contextmanager
def _busy(count: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    try:
        for other in others:
            other.start()
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _spin() -> None:
    while True:
        sum(range(10_000))
