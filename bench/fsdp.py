"""A sharded step against torch's FullyShardedDataParallel around the same functions, on two processes: time and peak memory.

Both start from the same weights and take the same batches; losses and gradient norms are compared first. Steps are timed in
turn in the same two processes, memory is taken in fresh ones of each side's own.
"""

import importlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, starmap
from typing import NamedTuple

import torch
import torch.distributed as dist

from bench.harness import GB, Ratios, Row, Sample, ratio, row, timed
from experiments.launching import processes
from lumina_fn import model
from lumina_fn.config import ModelConfig
from lumina_fn.loss import Batch
from lumina_fn.optim import AdamW

RANKS, WARMUP = 2, 3  # processes of one thread each; steps that are compared and not timed
TOKENS = 1024  # of a process's batch, which is one sequence
CFG = ModelConfig(vocab=16_384, width=512, layers=6, heads=8, kv_heads=8, hidden=1408)
OPT = AdamW(lr=1e-4, decay=0.1, clip=1.0)

Step = Callable[[Batch], tuple[float, float]]  # a batch to its loss and gradient norm


class Side(NamedTuple):
    module: str  # its machinery, which the other side does not load: modules are resident memory too
    make: Callable[[int, bool], Step]  # of (rank, remat)


class Memory(NamedTuple):
    """Bytes in the memory of the rank that takes the most."""

    imported: int  # before parameters are made
    making: int  # at the peak until the first steps are done: state, sharding, compiling
    steps: int  # at the peak of the steps after them

    @property
    def peak(self) -> int:
        return max(self.making, self.steps)


def _ours(rank: int, remat: bool) -> Step:
    from lumina_fn import sharding, train

    mesh = sharding.Mesh(dist.group.WORLD, rank, RANKS)
    run = train.make_train_step(CFG, OPT, mesh, compile="blocks", remat=remat, donate=True)
    state = train.init_state(model.init(CFG), OPT, mesh)

    def step(batch: Batch) -> tuple[float, float]:
        nonlocal state
        state, metrics = run(state, batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return step


def _theirs(rank: int, remat: bool) -> Step:
    from bench import fsdp_peer

    run = fsdp_peer.make_step(model.init(CFG), CFG, OPT, "fsdp", remat=remat)
    return lambda batch: tuple(map(float, run(batch)))


OURS, THEIRS = Side("lumina_fn.train", _ours), Side("bench.fsdp_peer", _theirs)


def steps_in_turn(rank: int, size: int, remat: bool, pairs: int):
    """[loss, norm] of each of the first steps, and (wall, CPU) seconds of each later one: both as pairs of ours and theirs."""
    sides = [side.make(rank, remat) for side in (OURS, THEIRS)]
    stream = _batches(rank)
    first = [[step(batch) for step in sides] for batch in islice(stream, WARMUP)]
    later = []
    for i, batch in enumerate(islice(stream, pairs)):
        order = (0, 1) if i % 2 else (1, 0)
        seconds = {}
        for side in order:
            dist.barrier()
            seconds[side] = timed(partial(sides[side], batch))
        later.append([tuple(seconds[0]), tuple(seconds[1])])
    return first, later


def memory_of(rank: int, size: int, side: Side, remat: bool) -> tuple[int, int, int]:
    """Bytes in memory, as `Memory` names them."""
    importlib.import_module(side.module)
    imported = processes.resident()
    step, stream = side.make(rank, remat), _batches(rank)
    for batch in islice(stream, WARMUP):
        step(batch)
    making = processes.peak()
    processes.reset_peak()
    for batch in islice(stream, WARMUP):
        step(batch)
    return imported, making, processes.peak()


def _batches(rank: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        ids = torch.randint(CFG.vocab, (1, TOKENS), generator=generator)
        yield Batch(ids, ids)


def rows(quick: bool) -> Iterator[Row]:
    for name, remat in (("fsdp_w2", False),) if quick else (("fsdp_w2", False), ("fsdp_w2_remat", True)):
        yield compare(name, 3 if quick else 11, remat)


def compare(name: str, pairs: int, remat: bool) -> Row:
    ranks = processes.run(RANKS, steps_in_turn, remat, pairs)
    loss, norm = _apart(ranks[0][0])
    ours, theirs = zip(*_over_ranks([later for _, later in ranks]), strict=True)
    wall, cpu = (ratio([getattr(s, of) for s in theirs], [getattr(s, of) for s in ours]) for of in Sample._fields)
    peaks = [_most(processes.run(RANKS, memory_of, side, remat)) for side in (OURS, THEIRS)]
    median = lambda side: statistics.median(step.wall for step in side)
    return row(
        name, "time and peak memory of a step, FullyShardedDataParallel / ours",
        {"wall_ratio": ">= 1.11", "rss_ratio": ">= 1", "losses_apart": "<= 1e-5", "norms_apart": "<= 1e-4"},
        Ratios(cpu.median, wall.median, peaks[1].peak / peaks[0].peak),
        measured={
            "cpu_spread": cpu[1:], "wall_spread": wall[1:], "pairs": pairs, "losses_apart": loss, "norms_apart": norm,
            "our_wall_s": median(ours), "their_wall_s": median(theirs),
            "our_peak_gb": peaks[0].peak / GB, "their_peak_gb": peaks[1].peak / GB,
            "of_a_core": statistics.median(step.cpu / step.wall / RANKS for step in ours + theirs),
        },
    )  # fmt: skip


def _apart(steps: list) -> tuple[float, float]:
    """How far losses, and gradient norms relative to themselves, are apart at the most."""
    return max(abs(a[0] - b[0]) for a, b in steps), max(abs(a[1] / b[1] - 1) for a, b in steps)


def _over_ranks(ranks: list) -> list[list[Sample]]:
    """Every pair of steps, as long as the slowest rank took, and with the CPU time of all."""
    one = lambda times: Sample(max(wall for wall, _ in times), sum(cpu for _, cpu in times))
    return [[one(times) for times in zip(*pairs, strict=True)] for pairs in zip(*ranks, strict=True)]


def _most(ranks: list) -> Memory:
    return max(starmap(Memory, ranks), key=lambda memory: memory.peak)
