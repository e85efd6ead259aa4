"""Move from MindSpeed-MM: translate its guide's files into commands, or its extracted features into a feature set.

    lumina migrate GUIDE_DIR --out DIR
    lumina migrate FEATURES_DIR --out DIR --model DIR

GUIDE_DIR is a MindSpeed-MM checkout, or a folder with the guide's files. Nothing in it is run. The equivalent commands
are printed and written to DIR/commands.sh; DIR/report.md lists what each field becomes here. A field that would change results is an
error that names it; what decides results and is known only when the scripts run is asked for: --set NNODES=2.
FEATURES_DIR has data.jsonl and .pt files (MindSpeed-MM) or record.json and .pkl files (Alpha-VLLM): DIR becomes a feature set for
experiments.finetune. Records that cannot be used are listed with the reason in DIR/quarantine.jsonl.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lumina_fn import hub
from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import POSITIONAL, REPEATED
from lumina_fn.process.ranges import MAX_TARGET, Range


@dataclass(frozen=True)
class Settings:
    """The flags of `lumina migrate`."""

    source: Annotated[Path, "a MindSpeed-MM checkout, a folder with the guide's files, or one of extracted features", POSITIONAL]  # fmt: skip
    out: Annotated[Path, "folder to write, must not exist"]
    model: Annotated[Path | None, "for features: the model's folder; only its tokenizer is read"] = None
    size: Annotated[
        int,
        "for features: the target_size in pixels that they were extracted with; 0: not known",
        Range(0, MAX_TARGET),
    ] = 0
    set: Annotated[
        tuple[str, ...],
        "for a guide: NAME=VALUE, a variable of its scripts, or the number of an argument, that is known only when they run; may be given several times",
        REPEATED,
    ] = ()
    download: hub.Download = False
    overwrite: Annotated[bool, "replace an existing OUT"] = False


def main(argv: Sequence[str] | None = None) -> None:
    """Write OUT from the guide's folder or from extracted features."""
    run = hub.here(flags.parse(Settings, __doc__, argv), "model")
    with startup.importing():
        from experiments.migration import run as migration

    migration.main(run)


if __name__ == "__main__":
    entry.run(main)
