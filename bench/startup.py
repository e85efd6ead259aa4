"""How long a command takes to answer, and how long until a fine-tune's first step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from bench.harness import Row, row
from experiments.demo import tasks

HELP = (sys.executable, "-m", "experiments.finetune", "--help")


def rows(quick: bool) -> Iterator[Row]:
    help_seconds = [seconds(HELP) for _ in range(3 if quick else 7)]
    first, again = first_steps()
    yield row(
        "startup", "seconds; no ratio: `finetune --help`, and the demo's fine-tune up to its first step",
        {"help_s": "<= 1.5"},
        measured={
            "help_s": statistics.median(help_seconds), "help_spread": (min(help_seconds), max(help_seconds)),
            "first_step_s": first, "first_step_compiled_before_s": again,
        },
    )  # fmt: skip


def seconds(command: tuple[str, ...]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def first_steps() -> tuple[float, float]:
    """From the command to the end of the first step of the demo's fine-tune: with nothing compiled before, and again."""
    with tempfile.TemporaryDirectory() as root:
        with redirect_stdout(StringIO()):
            flags = tasks.finetune_arguments(Path(root, "demo"))
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{root}/cache"}
        return tuple(_until_first_line(flags, Path(root, f"run{i}"), environment) for i in range(2))


def _until_first_line(flags: list[str], out: Path, environment: dict[str, str]) -> float:
    command = (sys.executable, "-m", "experiments.finetune", *flags, "--out", str(out), "--log-every", "1")
    begin, metrics = time.perf_counter(), out / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if child.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {child.returncode} before its first step")
                time.sleep(0.05)
            return time.perf_counter() - begin
        finally:
            child.kill()
