"""The model as programs for a machine that need not have this code: torch.export's .pt2 files, for a CPU or an Ascend NPU.

    lumina export MODEL OUT --what forward|step|decode --target cpu|npu

OUT holds one .pt2 for each bucket of sizes, and report.json, which names inputs, outputs and ops, and of each size that is not
fixed the least and the largest. Of MODEL only the sizes in
its config.json are read.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from lumina_fn import hub
from lumina_fn.errors import InputError
from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import POSITIONAL, Group
from lumina_fn.process.ranges import CLIP, WEIGHT_DECAY, Z_WEIGHT, Range

SIZE = Range(1, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `lumina export`."""

    model: Annotated[Path, "a model's folder, of which config.json is read and no weights", POSITIONAL]
    out: Annotated[Path, "the new folder", POSITIONAL]
    what: Annotated[
        Literal["forward", "step", "decode"], "logits of whole rows; a training step; one more token over a cache"
    ]
    target: Annotated[Literal["cpu", "npu"], "where it will run"]
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, "of compute (default: float32 for cpu, bfloat16 for npu)"
    ] = None
    batch: Annotated[tuple[int, ...], "rows; a program for each", SIZE] = (1,)
    tokens: Annotated[
        tuple[int, ...] | None,
        "tokens of a row (step) or slots of a cache (decode); a program for each (default: 4096, or the model's own limit)",
        SIZE,
    ] = None
    download: hub.Download = False
    overwrite: Annotated[bool, "replace an existing OUT"] = False
    packed: Annotated[bool, "rows hold several documents", Group("a training step", "--devices 8 --remat all")] = False
    remat: Annotated[str, "of how many blocks only the input is kept for the backward: a number, or all"] = "0"
    devices: Annotated[int, "ranks that share the state", SIZE] = 1
    strategy: Annotated[Literal["fsdp", "sdp", "no"], "how they share it"] = "fsdp"
    weight_decay: Annotated[float, "AdamW's", WEIGHT_DECAY] = 1e-2
    clip: Annotated[float, "largest norm of the gradients", CLIP] = 1.0
    z_weight: Annotated[float, "weight of the z-loss", Z_WEIGHT] = 1e-5


ONLY_STEP = ("packed", "remat", "devices", "strategy", "weight_decay", "clip", "z_weight")
IGNORED = {"forward": ("tokens", *ONLY_STEP), "decode": ONLY_STEP, "step": ()}  # flags that a --what has no use for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of sys.argv); the exit code. Raises InputError."""
    run = flags.parse(Settings, __doc__, argv)
    usual = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
    for name in IGNORED[run.what]:
        if getattr(run, name) != usual[name]:
            raise InputError(f"--{name.replace('_', '-')}: --what {run.what} does not take it; leave it out")
    with startup.importing():
        from lumina_fn.programs import folder

    folder.write(hub.here(run, "model"), print)
    return 0


if __name__ == "__main__":
    entry.run(main)
