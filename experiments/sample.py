"""Draw pictures from prompts.

    lumina sample --model DIR --vq DIR --prompt "a red circle" --width 768 --height 768 --out DIR
    torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node 8 -m -- experiments.sample --model DIR --vq DIR --prompts FILE --out DIR

OUT receives one PNG per prompt and picture, named by their numbers, and samples.jsonl with the prompt and settings of each. With
torchrun each process draws its share of the batches; the pictures are those of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from experiments.devices import EnvCheck
from experiments.launching import start
from lumina_fn import hub
from lumina_fn.process import flags, startup
from lumina_fn.process.flags import Group
from lumina_fn.process.ranges import SEED, Range

if TYPE_CHECKING:
    from experiments.launching.distributed import World


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `lumina sample`."""

    model: Annotated[
        Path,
        "the model: a native, Hugging Face or MindSpeed release folder with its tokenizer, a run's, or OWNER/NAME of the Hub",
        Group("pictures", "--prompts prompts.txt --n 4 --width 768 --height 768"),
    ]
    vq: Annotated[Path, "MoVQGAN: a native folder or a .ckpt"]
    download: hub.Download = False
    prompt: Annotated[str | None, "what to draw"] = None
    prompts: Annotated[Path | None, "instead of --prompt: a text file, UTF-8, one prompt per line"] = None
    width: Annotated[int, "pixels, a multiple of 32"] = 768
    height: Annotated[int, "pixels, a multiple of 32"] = 768
    n: Annotated[int, "pictures per prompt", Range(1, 10**6)] = 1
    out: Annotated[Path, "folder to write, must not exist"]
    overwrite: Annotated[bool, "replace an existing OUT"] = False
    seed: Annotated[
        int,
        "random seed; with the numbers of prompt and picture it determines the picture, whatever --batch is",
        SEED,
        Group("sampling", "--seed 7 --guidance 4 --top-k 2000 --temperature 0.9"),
    ] = 0
    guidance: Annotated[
        float,
        "classifier-free guidance: factor of the difference between the scores with and without the prompt; 1: none",
        Range(0, 1000),
    ] = 4.0
    guidance_schedule: Annotated[
        Literal["constant", "reference"],
        "reference: that of the reference code, which decays to 4 within the first rows",
    ] = "constant"
    top_k: Annotated[int, "draw from the k most likely codes", Range(1, 1 << 20)] = 4096
    temperature: Annotated[float, "temperature of the draw; 0: always the most likely code", Range(0, 1000)] = 1.0
    min_p: Annotated[
        float,
        "leave out codes whose probability before guidance is below this fraction of the most likely code's",
        Range(0, 1),
    ] = 0.0
    batch: Annotated[
        int,
        "pictures drawn at once; more are faster and take more memory",
        Range(1, 1 << 12),
        Group("devices", "--device npu --batch 8 --dtype bfloat16"),
    ] = 1
    dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16"],
        "precision of the model; auto: float32 on a CPU, else bfloat16",
    ] = "auto"
    device: Annotated[str, "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is available"] = "auto"
    env_check: EnvCheck = "error"
    compile: Annotated[
        Literal["off", "blocks"],
        "blocks: compile a block first, which takes seconds; faster for small models and many codes on a CPU",
    ] = "off"


def main(argv: Sequence[str] | None = None, world: "World | None" = None) -> None:
    """Write the pictures of all prompts to OUT. `world` holds this process's rank if a launcher started it."""
    run = hub.here(flags.parse(Settings, __doc__, argv), "model", "vq")
    with startup.importing():
        from experiments.launching import distributed
        from experiments.sampling import run as sampling

    sampling.main(run, world or distributed.ALONE)


if __name__ == "__main__":
    start.run(main)
