"""A profile of a few steps: every op on a time line, and a table of the ops."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import profile, supported_activities

from kernels.measure import hushed
from lumina_fn.disk import files

WARM_UP = 2  # steps before the profile, in which code is compiled and files are read for the first time
TRACE, TABLE = "trace.json", "ops.txt"
LINES = 40  # of the table


class Profile:
    """Profiles `count` steps of a run with PyTorch's profiler and writes the result to `folder` after them.

    Ops that Inductor has fused are named after what they compute (`graph_0_cpp_fused_...`).
    """

    def __init__(self, folder: Path, steps: range, count: int, say: Callable[[str], None]):
        first = steps.start + 1 + WARM_UP
        self.folder, self.say, self.steps = folder, say, range(first, first + count)
        self.record: profile | None = None
        if count and self.steps.stop > steps.stop + 1:
            left = len(steps)
            say(f"note: nothing is profiled: {WARM_UP} steps of warm-up and {count} more are asked of {left}")
            self.steps = range(0)

    def __enter__(self) -> "Profile":
        return self

    def before(self, n: int) -> None:
        """Call before step n: starts the profile at its first step, and writes it after its last."""
        if n == self.steps.start and self.steps:
            self.record = profile(activities=supported_activities(), record_shapes=True)
            with hushed():
                self.record.start()
        if n == self.steps.stop:
            self._write()

    def __exit__(self, *_) -> None:
        self._write()

    def _write(self) -> None:
        if self.record is None:
            return
        record, self.record = self.record, None
        with hushed():
            record.stop()
        with files.renewed_folder(self.folder, "profile") as folder:
            record.export_chrome_trace(str(folder / TRACE))
            order = (
                "self_cpu_time_total" if torch.accelerator.current_accelerator() is None else "self_device_time_total"
            )
            table = record.key_averages().table(sort_by=order, row_limit=LINES, max_name_column_width=70)
            (folder / TABLE).write_text(table + "\n", encoding="utf-8")
        self.say(f"profile of steps {self.steps.start} to {self.steps.stop - 1}: {self.folder}")
