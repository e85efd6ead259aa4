"""Report what a dataset holds, or verify its features.

    lumina dataset report FEATURES|DATA [--model DIR] [--vq DIR] [--data DATA] [--out DIR]
    lumina dataset verify FEATURES --data DATA --vq DIR [--model DIR]

`report` prints sizes, tokens, captions, duplicates and unusable rows, before or after the pictures become tokens. `verify` encodes some
pictures again and compares the codes. `report --help` and `verify --help` list the flags.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from experiments.devices import EnvCheck
from experiments.pretokenizing.row_flags import Captions, Encoding, FileKey, ImageRoots, PromptKey
from lumina_fn import hub
from lumina_fn.errors import InputError
from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import POSITIONAL
from lumina_fn.process.ranges import SEED, Range


@dataclass(frozen=True)
class Report:
    """The flags of `lumina dataset report`."""

    source: Annotated[Path, "a folder that pretokenize wrote, or the dataset that it reads", POSITIONAL]
    data: Annotated[Path | None, "for FEATURES: the dataset they were made from, for prompts and pictures"] = None
    image_root: ImageRoots = ()
    file_key: FileKey = None
    prompt_key: PromptKey = None
    captions: Captions = "first"
    encoding: Encoding = None
    model: Annotated[Path | None, "for DATA: the model's folder, whose tokenizer counts tokens"] = None
    vq: Annotated[Path | None, "for FEATURES: the MoVQGAN that made them, to decode pictures"] = None
    download: hub.Download = False
    size: Annotated[int, "for DATA: the --size that pretokenize will use"] = 768
    pictures: Annotated[Literal["as-seen", "as-stored"], "for DATA: the --pictures that pretokenize will use"] = (
        "as-seen"
    )
    samples: Annotated[int, "number of pictures shown, drawn at random", Range(0, 10**4)] = 12
    seed: Annotated[int, "random seed of that draw; for DATA also the --seed that pretokenize will use", SEED] = 0
    near: Annotated[bool, "look for near-duplicates; for FEATURES this reads or decodes every picture"] = True
    distance: Annotated[
        int, "largest number of bits, of 64, in which the difference hashes of near-duplicates differ", Range(0, 16)
    ] = 3
    json: Annotated[Path | None, "file to write the numbers to"] = None
    out: Annotated[Path | None, "folder to write report.txt, report.json and report.html to, must not exist"] = None
    device: Annotated[str, "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is available"] = "auto"
    env_check: EnvCheck = "error"
    overwrite: Annotated[bool, "replace an existing --out or --json"] = False


@dataclass(frozen=True)
class Verify:
    """The flags of `lumina dataset verify`."""

    features: Annotated[Path, "a folder that pretokenize wrote", POSITIONAL]
    data: Annotated[Path, "the dataset that it was made from"]
    vq: Annotated[Path, "the MoVQGAN that made it: a native folder or a .ckpt"]
    image_root: ImageRoots = ()
    file_key: FileKey = None
    prompt_key: PromptKey = None
    captions: Captions = "first"
    encoding: Encoding = None
    model: Annotated[Path | None, "the model's folder: captions are compared too"] = None
    download: hub.Download = False
    n: Annotated[int, "number of pictures to compare, drawn at random", Range(1, 10**9)] = 64
    seed: Annotated[int, "random seed of that draw", SEED] = 0
    allow: Annotated[
        float, "share of a picture's codes that may differ: another device rounds differently", Range(0, 1)
    ] = 0.0
    device: Annotated[str, "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is available"] = "auto"
    env_check: EnvCheck = "error"


KINDS = {"report": Report, "verify": Verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `report` or `verify`, whichever the first word names; returns the exit code. Raises InputError for any other word."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if not words or name in ("-h", "--help"):
        print(
            f"usage: {flags.program()} report|verify ... [flags]\n\n{__doc__}".rstrip(),
            file=sys.stdout if words else sys.stderr,
        )
        return 0 if words else 2
    if name == "--version":
        print(flags.version())
        return 0
    if name not in KINDS:
        raise InputError(f"expected report or verify as the first word, found {name!r}; see {flags.program()} --help")
    run = hub.here(flags.parse(KINDS[name], __doc__, words[1:], name), "model", "vq")
    with startup.importing():
        from experiments.datasets import report, verify

    return report.report(run) if isinstance(run, Report) else verify.verify(run)


if __name__ == "__main__":
    entry.run(main)
