"""Sides of a comparison, each in a fresh process of its own, run in turn; and rows, which say how the sides compare.

A side is a function that makes what it needs, once, and returns a `Bench`: what it computes, to be compared with the other sides'
results, and a run, to be timed. Nothing is loaded or compiled inside a timed run, and the memory of a side is that of its process.
"""

import multiprocessing
import operator
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from experiments.launching import processes

THREADS = 2
GB = 1e9
CLOSE = 1e-4  # how far two sides' results may be apart, relative to the largest of them


class Bench(NamedTuple):
    check: Callable[[], Sequence[float]]  # numbers that equal the other sides'; it also warms up
    run: Callable[[], object]


Side = Callable[..., Bench]


class Sample(NamedTuple):
    """Seconds of a run."""

    wall: float
    cpu: float  # of all its threads


class Worker:
    """A side, made in a process of its own, which computes only when it is asked to."""

    def __init__(self, side: Side, *args: Any, threads: int = THREADS):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, side, args))
        self._process.start()
        theirs.close()
        self.imported = self._answer()  # bytes before anything is made

    def check(self) -> Sequence[float]:
        return self._ask("check")

    def run(self) -> Sample:
        return Sample(*self._ask("run"))

    def peak(self) -> int:
        """The most bytes in memory at once so far."""
        return self._ask("peak")

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a side's process ended with {self._process.exitcode}") from None
        if not done:
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        self._pipe.close()  # one that waits ends by itself, and leaves nothing behind
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, threads: int, side: Side, args: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        imported = processes.resident()
        bench = side(*args)
        pipe.send((True, imported))
        answers = {"check": lambda: list(bench.check()), "run": lambda: timed(bench.run), "peak": processes.peak}
        while True:
            pipe.send((True, answers[pipe.recv()]()))
    except EOFError:
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


def timed(run: Callable[[], object]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def working(*sides: tuple, threads: int = THREADS) -> Iterator[list[Worker]]:
    """A worker for each (side, *args)."""
    workers: list[Worker] = []
    try:
        for side, *args in sides:
            workers.append(Worker(side, *args, threads=threads))
        yield workers
    finally:
        for worker in workers:
            worker.end()


class Runs(NamedTuple):
    """What a side took."""

    samples: list[Sample]
    peak: int  # bytes of its process
    imported: int  # bytes before it made anything

    @property
    def wall(self) -> float:
        return statistics.median(sample.wall for sample in self.samples)

    @property
    def cpu(self) -> float:
        return statistics.median(sample.cpu for sample in self.samples)


def in_turn(sides: Mapping[str, tuple], pairs: int) -> dict[str, Runs]:
    """Each side's `pairs` runs, one of each in turn, once all have computed the same. Raises RuntimeError where they have not."""
    with working(*sides.values()) as workers:
        results = [torch.tensor(worker.check(), dtype=torch.float64) for worker in workers]
        for name, result in zip(sides, results, strict=True):
            apart = (result - results[0]).abs().max() / results[0].abs().max()
            if not apart <= CLOSE:
                raise RuntimeError(f"{name} is {apart:.1e} from {next(iter(sides))}, expected at most {CLOSE:.0e}")
        rounds = []
        for turn in range(pairs):  # who comes first changes from round to round
            order = [(turn + k) % len(workers) for k in range(len(workers))]
            samples = {i: workers[i].run() for i in order}
            rounds.append([samples[i] for i in range(len(workers))])
        columns = zip(*rounds, strict=True)
        return {
            name: Runs(list(samples), worker.peak(), worker.imported)
            for name, samples, worker in zip(sides, columns, workers, strict=True)
        }


def anew(sides: Mapping[str, tuple], times: int) -> dict[str, Runs]:
    """in_turn with one run each, `times` over, in fresh processes: where a process's pages lie decides up to a quarter of what reads much."""
    rounds = [in_turn(sides, 1) for _ in range(times)]
    return {
        name: Runs([found[name].samples[0] for found in rounds], max(found[name].peak for found in rounds), rounds[0][name].imported)
        for name in sides
    }  # fmt: skip


class Ratio(NamedTuple):
    """Of pairs of runs: the median, the least and the most."""

    median: float
    least: float
    most: float


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    found = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


class Row(NamedTuple):
    """A line of the results. `means` says what is compared. A ratio is theirs over ours (above 1: ours is faster, or smaller); None where there is no other side."""

    name: str
    means: str
    cpu_ratio: float | None
    wall_ratio: float | None
    rss_ratio: float | None
    measured: dict[str, Any]  # whatever else there is, spreads among it
    target: dict[str, str]  # what is asked of ratios and of what is measured, such as ">= 1.4"
    met: bool
    reason: str  # what is not met, and what was found to limit it


class Ratios(NamedTuple):
    """Theirs over ours; None where there is no other side."""

    cpu: float | None = None
    wall: float | None = None
    rss: float | None = None


NONE = Ratios()


def row(
    name: str, means: str, target: Mapping[str, str], ratios: Ratios = NONE, *, measured: Mapping[str, Any], limit: str = ""
) -> Row:  # fmt: skip
    """A row, judged; `limit` says what is known to stand in the way where a target is missed."""
    measured = {key: _rounded(value) for key, value in measured.items()}
    named = {f"{name}_ratio": _rounded(value) for name, value in ratios._asdict().items()}
    missed = [
        f"{key} is {value}, not {bound}"
        for key, bound in target.items()
        if not holds(value := (named | measured)[key], bound)
    ]
    return Row(
        name,
        means,
        **named,
        measured=measured,
        target=dict(target),
        met=not missed,
        reason="; ".join(missed + [limit] * bool(missed and limit)),
    )


def speed_row(
    name: str, target: Mapping[str, str], ours: Runs, theirs: Runs, *, measured: Mapping[str, Any], limit: str = ""
) -> Row:
    """How many times as fast ours is, and how many times as much memory theirs takes."""
    wall, cpu = speeds(ours, theirs)
    return row(
        name, "time and peak memory, theirs / ours", target,
        Ratios(cpu.median, wall.median, theirs.peak / ours.peak),
        measured={"cpu_spread": cpu[1:], "wall_spread": wall[1:], "pairs": len(ours.samples), **sides_of(ours, theirs), **measured},
        limit=limit,
    )  # fmt: skip


def speeds(ours: Runs, theirs: Runs) -> list[Ratio]:
    """How many times as fast ours is, by wall and by CPU time."""
    of = lambda runs: zip(*runs.samples, strict=True)
    return [ratio(*seconds) for seconds in zip(of(theirs), of(ours), strict=True)]


def sides_of(ours: Runs, theirs: Runs) -> dict[str, float]:
    """What each side took: median seconds, peak GB."""
    return {
        f"{of}_{unit}": value
        for of, runs in (("our", ours), ("their", theirs))
        for unit, value in (("wall_s", runs.wall), ("cpu_s", runs.cpu), ("peak_gb", runs.peak / GB))
    }


def holds(value: float | None, bound: str) -> bool:
    """Whether a value is as a bound such as "<= 0.9" asks; one that was not measured is not."""
    sign, number = bound.split()
    return value is not None and {">=": operator.ge, "<=": operator.le}[sign](value, float(number))


def _rounded(value: Any) -> Any:
    """Numbers to four digits: more say nothing."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, tuple | list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
