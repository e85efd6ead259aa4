"""The metrics of a run's steps, in metrics.jsonl and on the terminal."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lumina_fn.disk import files

SHOWN = ("loss", "ce", "z", "grad_norm", "lr", "noise_scale", "tokens_per_second")  # on the terminal


class Log:
    """Writes metrics.jsonl and shows progress. `batch` is the samples of a step, `totals` those of an earlier part of the run."""

    def __init__(self, path: Path, steps: range, batch: int, totals: Mapping[str, float]):
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(console=self.console, disable=not self.console.is_terminal)
        self.path, self.batch = path, batch
        self.totals = {"noise": 0.0, "signal": 0.0, **totals}  # sums over the steps that measured them
        self.task = self.progress.add_task("training", total=steps.stop, completed=steps.start)
        self.start = time.perf_counter()

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self.progress.advance(self.task)

    def write(self, step: int, values: dict[str, float], tokens: int) -> dict[str, float]:
        """Write a step's metrics; `tokens` were trained on since the last call, padding not counted. Returns the totals so far."""
        now = time.perf_counter()
        values = {**values, **self._noise_scale(values), "tokens_per_second": tokens / (now - self.start)}
        self.start = now
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        files.append(self.path, json.dumps({"step": step, **finite}) + "\n")
        line = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        self.console.print(f"step {step}  {line}", markup=False, soft_wrap=True)
        return self.totals

    def _noise_scale(self, values: dict[str, float]) -> dict[str, float]:
        """The gradient noise scale in samples, from noise and signal averaged over the run so far: single steps vary too much."""
        if not math.isfinite(values.get("noise", math.nan)):  # not measured, or a last batch of one micro batch
            return {}
        self.totals = {name: total + values[name] for name, total in self.totals.items()}
        noise, signal = self.totals.values()
        return {"noise_scale": self.batch * noise / signal if signal > 0 else math.inf}
