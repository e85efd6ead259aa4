"""Fine-tune a model on features made by experiments.pretokenize.

    lumina finetune --model DIR --features DIR --out DIR
    torchrun --nproc_per_node 8 -m experiments.finetune --model DIR --features DIR --out DIR

OUT receives metrics.jsonl and checkpoints/ while it runs and model/, a native folder, at the end. The same command goes on
from the last checkpoint; SIGTERM and SIGINT (Ctrl-C) end a run after its step, with a checkpoint. With torchrun each process
trains on its share of every batch and keeps its part of the model; experiments/launch has scripts for one machine and for two.
Without arguments this is the embedded default: the fine-tune of `make demo`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.finetuning.settings import Settings
from experiments.launching import start
from lumina_fn.process import flags, startup

if TYPE_CHECKING:
    from experiments.launching.distributed import World


def main(argv: Sequence[str] | None = None, world: "World | None" = None) -> int:
    """Returns the exit code."""
    argv = (sys.argv[1:] if argv is None else argv) or _embedded_default(world)
    run = flags.parse(Settings, __doc__, argv)
    with startup.importing():  # PyTorch takes seconds, for which neither --help nor a mistyped flag should wait
        from experiments.finetuning import loop
        from experiments.launching import distributed

    return loop.main(run, argv, world or distributed.ALONE)


def _embedded_default(world: "World | None") -> list[str]:
    """Arguments for the fine-tune of `make demo`, whose model and features are written first."""
    with startup.importing():
        from experiments.demo import tasks

    if world is None or world.rank == 0:
        print(tasks.ABOUT, file=sys.stderr, flush=True)
        tasks.finetune_arguments()
    if world is not None:
        world.barrier()
    return tasks.finetune_flags()


if __name__ == "__main__":
    start.run(main)
