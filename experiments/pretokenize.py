"""Turn a folder of pictures and captions into features to train on.

    lumina pretokenize DATA OUT --model DIR --vq DIR --size 768
    torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node 8 -m experiments.pretokenize DATA OUT --model DIR --vq DIR --size 768

DATA is one of these:
- a list of {"file": "images/x.jpg", "prompt": "..."} rows: JSON, JSONL or CSV, also with the keys of other tools;
- a folder of pictures with x.txt or x.caption beside x.jpg, or with metadata.jsonl or metadata.csv (Hugging Face's imagefolder);
- WebDataset tars or Parquet files with pictures in them: a folder, or a pattern in quotes such as 'shards/{000..031}.tar'.

OUT/manifest.jsonl has a line with the result of every row; rows that cannot be used are listed with the reason in OUT/quarantine.jsonl.
The same command continues a run that was ended, on any number of devices, also after rows were added to DATA. OUT becomes the same,
to the byte, as after an uninterrupted run.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from experiments.devices import EnvCheck
from experiments.launching import start
from experiments.pretokenizing.row_flags import Captions, Encoding, FileKey, ImageRoots, PromptKey
from lumina_fn import hub
from lumina_fn.process import flags, startup
from lumina_fn.process.flags import POSITIONAL, Group
from lumina_fn.process.ranges import LONGEST_CAPTION, SEED, Range

if TYPE_CHECKING:
    from experiments.launching.distributed import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `lumina pretokenize`."""

    data: Annotated[Path, "pictures and captions: a list, a folder, tars or Parquet (see above)", POSITIONAL]
    out: Annotated[Path, "folder to write; an earlier run in it is continued", POSITIONAL]
    model: Annotated[
        Path, "the model's folder; only its tokenizer is read", Group("data", "--size 768 --image-root /data/pictures")
    ]
    vq: Annotated[Path, "MoVQGAN: a native folder or a .ckpt"]
    download: hub.Download = False
    size: Annotated[
        int,
        "pixels, a multiple of 32: pictures are cropped to an area of about size x size, near their own aspect ratio",
    ] = 768
    long: Annotated[
        Literal["cut", "error"],
        "a size whose pictures have more tokens than the model takes: an error, or made as it is; finetune --long then cuts or skips them",
    ] = "error"
    image_root: ImageRoots = ()
    file_key: FileKey = None
    prompt_key: PromptKey = None
    captions: Captions = "first"
    encoding: Encoding = None
    pictures: Annotated[
        Literal["as-seen", "as-stored"],
        "as-seen: upright, in sRGB and with 8 bits, as a viewer shows them; as-stored: what the files' numbers are, as the reference reads them",
    ] = "as-seen"
    seed: Annotated[int, "random seed: it chooses the prompts that state the picture's size", SEED] = 0
    longest_caption: Annotated[
        int,
        "characters; rows with a longer caption are quarantined (to try them with a larger limit, give --retry)",
        Range(1, 10**7),
    ] = LONGEST_CAPTION
    batch: Annotated[
        int, "pictures encoded at once", Range(1, 1 << 12), Group("devices", "--device npu --batch 16 --workers 8")
    ] = 8
    workers: Annotated[
        int | None,
        "threads per process that read and crop pictures (default: its share of the cores)",
        Range(1, 1 << 10),
    ] = None
    device: Annotated[
        str, "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is available; each process takes its own"
    ] = "auto"
    env_check: EnvCheck = "error"
    shard: Annotated[
        int, "rows per shard, the unit of work of a process", Range(1, 1 << 20), Group("continuing", "--retry")
    ] = 1024
    retry: Annotated[bool, "try quarantined rows again"] = False
    overwrite: Annotated[bool, "start afresh in an existing OUT"] = False


def main(argv: Sequence[str] | None = None, world: "World | None" = None) -> None:
    """Write the feature set OUT. `world` holds this process's rank if a launcher started it."""
    run = hub.here(flags.parse(Settings, __doc__, sys.argv[1:] if argv is None else argv), "model", "vq")
    with startup.importing():
        from experiments.launching import distributed
        from experiments.pretokenizing import run as pretokenizing

    pretokenizing.main(run, world or distributed.ALONE)


if __name__ == "__main__":
    startup.let_idle_threads_sleep()
    start.run(main)
