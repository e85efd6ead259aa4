"""Feed each reader many thousand mutated files, and look whether any breaks the law.

    python -m tests.fuzz.run --cases 20000

The same seed gives the same cases. An input that breaks the law is saved, and the exit code is 1.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import formats, law, playground

KEPT = 20  # inputs saved of a format; what breaks the law once breaks it often


def cases(name: str, count: int, seed: int, root: Path, saved: Path, told) -> None:
    """Play a format's cases in this process; `told` is sent (accepted, refused, violations, seconds)."""
    at = playground.ground(root)
    form = formats.FORMATS[name](at)
    law.arm()
    begin, tally, found = time.perf_counter(), Counter(), Counter()
    for i in range(count):
        if i % 50 == 0:
            law.alive()
        data = form.seeds[i] if i < len(form.seeds) else form.mutate(random.Random(f"{seed} {name} {i}"))
        (root / "case").write_bytes(data)
        form.place(data)
        try:
            tally[law.judge(form.read, at.folder, at.outside, form.refusal, form.writes)] += 1
        except law.Violation as violation:
            kind = str(violation)[:60]
            found[kind] += 1
            if found[kind] == 1 and len(found) <= KEPT:
                keep(saved, name, f"{i}", data, str(violation))
    told.send((tally[True], tally[False], found.total(), time.perf_counter() - begin))


def keep(saved: Path, name: str, case: str, data: bytes, why: str) -> None:
    saved.mkdir(parents=True, exist_ok=True)
    file = saved / f"{name.replace(' ', '_').replace(',', '')}-{case}"
    file.write_bytes(data)
    print(f"{name}, case {case}: {why!r}; saved as {file}", file=sys.stderr, flush=True)


def play(name: str, count: int, seed: int, saved: Path) -> tuple[int, int, int, float]:
    """A format in a process of its own: a reader may crash, or never come back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz.formats"])
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        root = Path(folder) / "ground"
        ours, theirs = context.Pipe()
        process = context.Process(target=cases, args=(name, count, seed, root, saved, theirs))
        process.start()
        theirs.close()
        try:
            told = ours.recv()
        except EOFError:
            process.join()
            case = root / "case"
            keep(
                saved,
                name,
                "last",
                case.read_bytes() if case.exists() else b"",
                f"the process ended with {process.exitcode}",
            )
            return 0, 0, 1, 0.0
        process.join()
        return told


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.fuzz.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="of each format (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument(
        "--saved",
        type=Path,
        default=Path("runs/fuzz"),
        help="where inputs that break the law are left (default: %(default)s)",
    )
    parser.add_argument(
        "formats", nargs="*", metavar="FORMAT", help=f"one of {', '.join(formats.FORMATS)} (default: all)"
    )
    run = parser.parse_args()
    broken = 0
    print(f"{'format':28}{'cases':>8}{'accepted':>10}{'refused':>9}{'broken':>8}{'seconds':>9}", flush=True)
    with ThreadPoolExecutor(2) as pool:
        names = run.formats or list(formats.FORMATS)
        for name, told in zip(
            names, pool.map(lambda name: play(name, run.cases, run.seed, run.saved), names), strict=True
        ):
            accepted, refused, violations, seconds = told
            broken += violations
            print(
                f"{name:28}{accepted + refused + violations:8}{accepted:10}{refused:9}{violations:8}{seconds:9.1f}",
                flush=True,
            )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
