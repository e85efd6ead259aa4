"""A copy of the project to run commands and notebooks in, with what `make demo` leaves behind."""

import os
import shutil
import sys
from pathlib import Path

from experiments.demo import splits, tasks
from tests.support.paths import ROOT


def make(folder: Path) -> Path:
    """The four floors, and a few of the demo's pictures where a run of it has all of them."""
    for part in ("kernels", "ops", "lumina_fn", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    tasks.prepare(folder / "runs/demo/data", splits.fine_tuning()[::40])
    return folder


def environment(folder: Path) -> dict[str, str]:
    """This process's, with this Python first and the copy's code instead of the project's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
