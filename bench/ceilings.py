"""What this machine does at best: products of matrices, copies, and reading, as every token of a decoder reads all weights."""

from collections.abc import Callable

import torch

from bench.harness import THREADS, Bench, working

SIDE, TIMES = 2048, 5  # of the square matrices, and how often they are multiplied
FLOPS = TIMES * 2 * SIDE**3
BYTES = 400_000_000  # of a vector


def sgemm() -> Bench:
    a, b, out = (torch.randn(SIDE, SIDE) for _ in range(3))
    return _of(lambda: [torch.mm(a, b, out=out) for _ in range(TIMES)])


def copying() -> Bench:
    source, target = (torch.ones(BYTES // 4) for _ in range(2))
    return _of(lambda: target.copy_(source))


def reading() -> Bench:
    return _of(torch.ones(BYTES // 4).sum)


def _of(run: Callable[[], object]) -> Bench:
    return Bench(lambda: [0.0 for _ in [run()]], run)


def best(side: tuple, size: float, threads: int = THREADS) -> float:
    """Of its `size`, what the side does in a second at its fastest."""
    with working(side, threads=threads) as [worker]:
        worker.check()
        return size / min(worker.run().wall for _ in range(7))


def measured() -> dict[str, float]:
    """The ceilings by number of threads."""
    found = {}
    for threads in (1, 2):
        found[f"sgemm_gflops_{threads}"] = round(best((sgemm,), FLOPS, threads) / 1e9, 1)
        found[f"copy_gb_s_{threads}"] = round(best((copying,), 2 * BYTES, threads) / 1e9, 2)
        found[f"read_gb_s_{threads}"] = round(best((reading,), BYTES, threads) / 1e9, 2)
    return found
