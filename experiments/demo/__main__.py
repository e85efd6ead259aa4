"""make demo: teach a tiny model a shape it has never seen, with the four commands that a real model takes.

    lumina demo

convert -> pretokenize -> sample -> finetune -> sample, then a grader reads every picture. It leaves before_after.png, loss.png,
metrics.jsonl and summary.json in runs/demo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lumina_fn.errors import printable
from lumina_fn.process import entry, flags, startup


@dataclass(frozen=True)
class Settings:
    out: Annotated[Path, "folder of everything this writes"] = Path("runs/demo")
    emoji: Annotated[Path | None, "write a folder of emoji pictures and captions here, to fine-tune on, and stop"] = (
        None
    )


def main(argv: Sequence[str] | None = None) -> int:
    chosen = flags.parse(Settings, __doc__, argv)
    if chosen.emoji:
        with startup.importing():
            from experiments.demo import emoji_set

        print(printable(f"{emoji_set.write(chosen.emoji)} pictures: {chosen.emoji / 'data.json'}"))
        return 0
    with startup.importing():
        from experiments.demo import run

    return run.main(chosen.out)


if __name__ == "__main__":
    entry.run(main)
