"""Fine-tune a model on features made by experiments.pretokenize.

    lumina finetune --model DIR --features DIR --out DIR
    torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node 8 -m experiments.finetune --model DIR --features DIR --out DIR

OUT receives metrics.jsonl and checkpoints/ during the run, and model/, a native folder, at its end. The same command continues
from the last checkpoint. SIGTERM and SIGINT (Ctrl-C) end a run after the current step, with a checkpoint. With torchrun each process
trains on its share of every batch and keeps its part of the model; experiments/launch has scripts for one machine and for several.
Without arguments it runs the fine-tune of `make demo`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.finetuning.settings import Settings
from experiments.launching import start
from lumina_fn import hub
from lumina_fn.process import flags, startup

if TYPE_CHECKING:
    from experiments.launching.distributed import World


def main(argv: Sequence[str] | None = None, world: "World | None" = None) -> int:
    """Run a fine-tune; returns the exit code. `world` holds this process's rank if a launcher started it."""
    argv = (sys.argv[1:] if argv is None else argv) or _embedded_default(world)
    run = hub.here(flags.parse(Settings, __doc__, argv), "model")
    with startup.importing():  # importing PyTorch takes seconds; --help and wrong flags do not wait for it
        from experiments.finetuning import loop
        from experiments.launching import distributed

    return loop.main(run, argv, world or distributed.ALONE)


def _embedded_default(world: "World | None") -> list[str]:
    """The arguments of `make demo`'s fine-tune; writes its model and features first."""
    with startup.importing():
        from experiments.demo import tasks

    if world is None or world.rank == 0:
        print(tasks.ABOUT, file=sys.stderr, flush=True)
        tasks.finetune_arguments()
    if world is not None:
        world.barrier()
    return tasks.finetune_flags()


if __name__ == "__main__":
    startup.let_idle_threads_sleep()
    start.run(main)
