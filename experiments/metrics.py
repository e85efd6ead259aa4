"""What a run says of its steps: metrics.jsonl, and the same on the terminal."""

import json
import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lumina_fn import files

SHOWN = ("loss", "ce", "z", "grad_norm", "lr", "tokens_per_second")  # on the terminal


class Log:
    """metrics.jsonl and a progress bar."""

    def __init__(self, path: Path, steps: int):
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(console=self.console, disable=not self.console.is_terminal)
        self.path = path
        self.task = self.progress.add_task("training", total=steps)
        self.start = time.perf_counter()

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def advance(self) -> None:
        """A step is on its way."""
        self.progress.advance(self.task)

    def write(self, step: int, values: dict[str, float], tokens: int) -> None:
        """A step's metrics; `tokens` were trained on since the last time, padding included."""
        now = time.perf_counter()
        values = {**values, "tokens_per_second": tokens / (now - self.start)}
        self.start = now
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # NaN is no JSON
        with files.writable(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        line = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN)
        self.console.print(f"step {step}  {line}", markup=False, soft_wrap=True)
