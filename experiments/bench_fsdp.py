"""A sharded step against torch's FullyShardedDataParallel around the same functions, on two processes: time and peak memory.

    python -m experiments.bench_fsdp

Both start from the same weights and take the same batches; losses and gradient norms are compared first. Steps are timed in
turn in the same two processes, memory is taken in fresh ones of each side's own. Fails where the median of the ratios of times,
or the ratio of memory, exceeds its target.
"""

import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, starmap
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist

from experiments import processes
from experiments.settings import parse
from lumina_fn import cost, errors, model
from lumina_fn.config import ModelConfig
from lumina_fn.loss import Batch
from lumina_fn.optim import AdamW

RANKS, WARMUP = 2, 3  # processes of one thread each; steps that are compared and not timed
CFG = ModelConfig(vocab=16_384, width=512, layers=6, heads=8, kv_heads=8, hidden=1408)
OPT = AdamW(lr=1e-4, decay=0.1, clip=1.0)
LOSS, NORM = 1e-5, 1e-4  # how far losses, and gradient norms relative to themselves, may be apart
MB = 1e6
BUSY = ": the machine is busy, and wall times say little"

Step = Callable[[Batch], tuple[float, float]]  # a batch to its loss and gradient norm


@dataclass(frozen=True)
class Settings:
    tokens: Annotated[int, "of a process's batch, which is one sequence"] = 1024
    pairs: Annotated[int, "of timed steps, one of ours and one of theirs"] = 11
    time: Annotated[float, "our wall time over theirs, at the most"] = 0.9
    memory: Annotated[float, "our peak of resident memory over theirs, at the most"] = 1.0
    rows: Annotated[Path | None, "a file for the results, a JSON object a line"] = None


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


class Times(NamedTuple):
    """Seconds of a step: the slowest rank's, and those of all ranks' CPUs."""

    wall: float
    cpu: float


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
    from experiments import fsdp_peer

    run = fsdp_peer.make_step(model.init(CFG), CFG, OPT, "fsdp", remat=remat)
    return lambda batch: tuple(map(float, run(batch)))


OURS, THEIRS = Side("lumina_fn.train", _ours), Side("experiments.fsdp_peer", _theirs)


def ceilings(rank: int, size: int) -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s of a sum, at the best, while the other processes do the same."""
    a, b, long = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.ones(100_000_000)
    dist.barrier()
    best = lambda fn: min(_timed(fn)[0] for _ in range(7))
    return 2 * 2048**3 / best(lambda: a @ b), 4 * long.numel() / best(long.sum)


def steps_in_turn(rank: int, size: int, tokens: int, remat: bool, pairs: int):
    """[loss, norm] of each of the first steps, and (wall, CPU) seconds of each later one: both as pairs of ours and theirs."""
    sides = [side.make(rank, remat) for side in (OURS, THEIRS)]
    stream = _batches(rank, tokens)
    first = [[step(batch) for step in sides] for batch in islice(stream, WARMUP)]
    later = []
    for i, batch in enumerate(islice(stream, pairs)):
        order = (0, 1) if i % 2 else (1, 0)
        seconds = {}
        for side in order:
            dist.barrier()
            seconds[side] = _timed(sides[side], batch)
        later.append([seconds[0], seconds[1]])
    return first, later


def memory_of(rank: int, size: int, side: Side, tokens: int, remat: bool) -> tuple[int, int, int]:
    """Bytes in memory, as `Memory` names them."""
    importlib.import_module(side.module)
    imported = processes.resident()
    step, stream = side.make(rank, remat), _batches(rank, tokens)
    for batch in islice(stream, WARMUP):
        step(batch)
    making = processes.peak()
    processes.reset_peak()
    for batch in islice(stream, WARMUP):
        step(batch)
    return imported, making, processes.peak()


def _batches(rank: int, tokens: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        ids = torch.randint(CFG.vocab, (1, tokens), generator=generator)
        yield Batch(ids, ids)


def _timed(fn: Callable, *args: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    fn(*args)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(name: str, run: Settings, remat: bool) -> dict[str, Any]:
    """A row of the results, which it prints too."""
    ranks = processes.run(RANKS, steps_in_turn, run.tokens, remat, run.pairs)
    loss, norm = _apart(ranks[0][0])
    ours, theirs = zip(*_over_ranks([later for _, later in ranks]), strict=True)
    wall, cpu = ([getattr(a, of) / getattr(b, of) for a, b in zip(ours, theirs, strict=True)] for of in Times._fields)
    peaks = [_most(processes.run(RANKS, memory_of, side, run.tokens, remat)) for side in (OURS, THEIRS)]
    ratios = {
        "cpu_ratio": statistics.median(cpu),
        "wall_ratio": statistics.median(wall),
        "rss_ratio": peaks[0].peak / peaks[1].peak,
    }
    met = {
        f"losses are {loss:.1e} apart": loss <= LOSS,
        f"gradient norms are {norm:.1e} of themselves apart": norm <= NORM,
        f"wall time is {ratios['wall_ratio']:.3f} of theirs": ratios["wall_ratio"] <= run.time,
        f"peak memory is {ratios['rss_ratio']:.3f} of theirs": ratios["rss_ratio"] <= run.memory,
    }
    reason = "; ".join(text for text, fine in met.items() if not fine)
    seconds = [statistics.median(step.wall for step in side) for side in (ours, theirs)]
    share = statistics.median(step.cpu / step.wall / RANKS for step in ours + theirs)
    print(f"{name}: losses {loss:.0e} apart, gradient norms {norm:.0e} of themselves")
    print(f"  step       {seconds[0]:.2f} s, theirs {seconds[1]:.2f} s; wall {_spread(wall)}, CPU time {_spread(cpu)}")
    print(f"  a process had {share:.2f} of a core{BUSY if share < 0.8 else ''}")
    for of in ("peak", "making", "steps"):
        whole = [getattr(memory, of) for memory in peaks]
        above = [size - memory.imported for size, memory in zip(whole, peaks, strict=True)]
        print(f"  {of:9}  {_side_by_side(whole)}; above what is imported {_side_by_side(above)}")
    print(f"  {'FAILED: ' + reason if reason else 'ok'}", flush=True)
    target = {"wall_ratio": run.time, "rss_ratio": run.memory}
    return {"name": name, **ratios, "target": target, "met": not reason, "reason": reason}


def _apart(steps: list) -> tuple[float, float]:
    """How far losses, and gradient norms relative to themselves, are apart at the most."""
    return max(abs(a[0] - b[0]) for a, b in steps), max(abs(a[1] / b[1] - 1) for a, b in steps)


def _over_ranks(ranks: list) -> list[list[Times]]:
    """Every pair of steps, from what each rank measured of it."""
    one = lambda times: Times(max(wall for wall, _ in times), sum(cpu for _, cpu in times))
    return [[one(times) for times in zip(*pairs, strict=True)] for pairs in zip(*ranks, strict=True)]


def _most(ranks: list) -> Memory:
    return max(starmap(Memory, ranks), key=lambda memory: memory.peak)


def _side_by_side(sizes: list[int]) -> str:
    return f"{sizes[0] / MB:.0f} MB, theirs {sizes[1] / MB:.0f} MB: {sizes[0] / sizes[1]:.3f}"


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main(argv: Sequence[str] | None) -> int:
    run = parse(Settings, __doc__, argv)
    found = processes.run(RANKS, ceilings)
    flops, bandwidth = (min(values) for values in zip(*found, strict=True))
    print(
        f"{RANKS} processes of one thread; each, while the other does the same: sgemm of 2048 {flops / 1e9:.0f} GFLOP/s,"
        f" sum of 400 MB {bandwidth / 1e9:.1f} GB/s"
    )
    print(
        f"width {CFG.width}, {CFG.layers} layers, {CFG.heads} heads, hidden {CFG.hidden}, vocabulary {CFG.vocab}:"
        f" {cost.parameters(CFG) / 1e6:.1f}M parameters in float32; 1 x {run.tokens} tokens a process,"
        f" {run.tokens * cost.flops(CFG, run.tokens) / 1e9:.0f} GFLOP a step",
        flush=True,
    )
    rows = [compare(name, run, remat) for name, remat in (("fsdp_w2", False), ("fsdp_w2_remat", True))]
    if run.rows:
        run.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    errors.run(main)
