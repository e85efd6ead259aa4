"""Run the checks that need a real Ascend NPU; print SKIPPED and the reason if there is none.

    lumina npu-check

On an NPU it checks every op in every dtype, with the registered kernels and, if triton-ascend is installed, with our Triton kernels;
a small model's training steps and decoding; the exported step, compiled for the graph engine; collectives, if there are two NPUs;
and processes that start on NPUs ten seconds after the last ones there were killed, as a restart does.
Results are compared with float64 on the CPU; the tolerance follows from the error of the same precision on the CPU. Prints one
line per check and a summary. Exits with 1 if a check failed, otherwise with 0, also if the checks are skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lumina_fn.process import entry, flags, startup


@dataclass(frozen=True)
class Settings:
    """The command has no flags of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, or print why they are skipped; returns the exit code."""
    flags.parse(Settings, __doc__, argv)
    with startup.importing():
        from experiments.ascend import checks

    if reason := checks.missing():
        print(f"rung 7: SKIPPED: {reason}; nothing was checked")
        return 0
    return 1 if checks.run(list(checks.checks())) else 0


if __name__ == "__main__":
    entry.run(main)
