"""Come here from MindSpeed-MM's guide, or with features that were extracted already.

    lumina migrate GUIDE_DIR --out DIR
    lumina migrate FEATURES_DIR --out DIR --model DIR

GUIDE_DIR is a MindSpeed-MM checkout, or a folder with the guide's files. Nothing in it is run. The commands that do the same here
are printed and written to DIR/commands.sh, what became of each field to DIR/report.md; a field that would change results is an
error that names it. FEATURES_DIR has data.jsonl and .pt files (MindSpeed-MM) or record.json and .pkl files (Alpha-VLLM):
DIR becomes a feature set for experiments.finetune. What does not fit is listed with the reason in DIR/quarantine.jsonl.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import POSITIONAL
from lumina_fn.process.ranges import MAX_TARGET, Range


@dataclass(frozen=True)
class Settings:
    source: Annotated[Path, "a MindSpeed-MM checkout, a folder with the guide's files, or one of extracted features", POSITIONAL]  # fmt: skip
    out: Annotated[Path, "folder to write, must not exist"]
    model: Annotated[Path | None, "for features: the model's folder; only its tokenizer is read"] = None
    size: Annotated[
        int,
        "for features: pixels of the side they were extracted for (target_size); 0: not known",
        Range(0, MAX_TARGET),
    ] = 0
    overwrite: Annotated[bool, "replace an existing OUT"] = False


def main(argv: Sequence[str] | None = None) -> None:
    run = flags.parse(Settings, __doc__, argv)
    with startup.importing():
        from experiments.migration import run as migration

    migration.main(run)


if __name__ == "__main__":
    entry.run(main)
