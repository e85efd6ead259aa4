"""Check what only an Ascend NPU can show; say SKIPPED, with the reason, where there is none.

    lumina npu-check

On an NPU: every op and dtype by the kernels that are registered for it, and by our Triton kernels where triton-ascend is installed;
a small model's training steps and its decoding; its exported step, compiled for the graph engine; collectives, where there are
two NPUs. Truth is float64 on the CPU, and the measure what the same precision costs there. A line for each check, and
one in the end. Exits 0 where it skips, 1 where something failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lumina_fn.process import entry, flags, startup


@dataclass(frozen=True)
class Settings:
    """It has no flags of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    flags.parse(Settings, __doc__, argv)
    with startup.importing():
        from experiments.ascend import checks

    if reason := checks.missing():
        print(f"rung 7: SKIPPED: {reason}; nothing was checked")
        return 0
    return 1 if checks.run(list(checks.checks())) else 0


if __name__ == "__main__":
    entry.run(main)
