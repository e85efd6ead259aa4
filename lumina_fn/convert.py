"""Convert a model between a native folder, a Hugging Face folder and a MindSpeed release folder, bit by bit, in either direction.

    lumina convert SRC DST --to native|hf|mindspeed [--overwrite]

SRC's kind is detected: besides those three it may be what MindSpeed-MM's training saves (its folder of iter_NNNNNNN folders,
or one of these: one file, torch_dist, torch_dcp). A MoVQGAN .ckpt (or a folder with one) converts to native. Bytes go from file to file a chunk at a time,
so memory does not grow with the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lumina_fn import hub
from lumina_fn.errors import InputError, printable
from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import POSITIONAL


@dataclass(frozen=True)
class Settings:
    """The arguments of `lumina convert`."""

    src: Annotated[
        Path,
        "a native, Hugging Face or MindSpeed folder (release, or the newest iteration), a run's folder (its newest checkpoint), "
        "or a MoVQGAN .ckpt",
        POSITIONAL,
    ]
    dst: Annotated[Path, "the new folder", POSITIONAL]
    to: Annotated[Literal["native", "hf", "mindspeed"], "what DST becomes"]
    layout: Annotated[
        Literal["lumina", "transformers"],
        "for --to hf: as the reference's classes read it, or as transformers' own Chameleon does, with q_norm and k_norm for each head",
    ] = "lumina"
    vocab: Annotated[
        Literal["cut", "keep"] | None,
        "for embeddings with more rows than config.json says (another tool has resized them): cut them to that, or keep all",
    ] = None
    download: hub.Download = False
    overwrite: Annotated[bool, "replace an existing DST"] = False
    norm_from: Annotated[
        Path | None,
        "the model that SRC's training began with: what use_fsdp1 with torch_dist lost of the last norm is taken from it",
    ] = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of sys.argv); the exit code. Raises InputError."""
    run = flags.parse(Settings, __doc__, argv)
    with startup.importing():
        from lumina_fn import conversion

    if run.layout == "transformers" and run.to != "hf":
        raise InputError(f"--layout transformers: not of use with --to {run.to}; leave it out, or give --to hf")
    run = hub.here(run, "src", "norm_from")
    write = conversion.WRITERS[run.layout if run.layout == "transformers" else run.to]
    source = conversion.convert(
        run.src, run.dst, write, overwrite=run.overwrite, norm_from=run.norm_from, vocab=run.vocab
    )
    for line in (*source.remarks, printable(conversion.summary(source, run.dst, run.to))):
        print(line)
    return 0


if __name__ == "__main__":
    entry.run(main)
