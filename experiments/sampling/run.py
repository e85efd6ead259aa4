"""The run of `experiments.sample`, once its settings are known: prompts to codes to pictures."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from experiments import devices
from experiments.launching.distributed import World
from experiments.planning import memory
from lumina_fn import checkpoint, errors, prompt, sample, vq
from lumina_fn.config import VQConfig
from lumina_fn.disk import files, places, reading
from lumina_fn.errors import InputError
from lumina_fn.prompt import Tokenizer
from lumina_fn.sample import Pace, Sampling
from lumina_fn.vocab import PIXELS_PER_CODE, Ids

if TYPE_CHECKING:
    from experiments.sample import Settings

MOST_CODES = 1 << 30  # held in memory until the pictures are written: 8 GB, or 116,000 pictures of 768 px
SCHEDULES = {"constant": sample.constant, "reference": sample.reference}


@memory.lowered_by("lower --batch, or give --dtype bfloat16")
def main(run: "Settings", world: World) -> None:
    """Write the pictures of all prompts to OUT, of which each rank draws its share. Raises InputError."""
    captions = read_prompts(run)
    tokenizer = prompt.load_tokenizer(run.model)
    _check(run, captions, tokenizer)
    places.place(run.out, [run.model, run.vq, *([run.prompts] if run.prompts else [])])
    device = devices.checked_device(run, world.device, world.say)
    compiled = devices.compiling(run.compile, device) == "blocks"
    dtype = getattr(torch, run.dtype.replace("auto", "float32" if device.type == "cpu" else "bfloat16"))
    with files.new_folder(run.out, "pictures", run.overwrite) if world.rank == 0 else nullcontext() as folder:
        vq_params, vq_cfg = checkpoint.load_vq(run.vq, device)
        ids = _drawable(run, vq_cfg, tokenizer.ids, world)
        if (idle := world.size - -(-len(captions) * run.n // run.batch)) > 0:
            world.say(f"note: --batch {run.batch} leaves {idle} of {world.size} processes without work")
        how = Drawing(device, dtype, compiled, world)
        codes = world.sum(draw(run, captions, replace(tokenizer, ids=ids), how).cpu())
        count = write(folder, run, captions, codes, vq_params, vq_cfg) if folder is not None else 0
    if world.rank == 0:
        print(errors.printable(f"{count} {'picture' if count == 1 else 'pictures'}: {run.out}"))


class Drawing(NamedTuple):
    """Where codes are drawn, and in which precision."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    world: World


def read_prompts(run: "Settings") -> list[str]:
    """The prompt, or the file's lines that are neither blank nor comments (#). Raises InputError if there is none."""
    if (run.prompt is None) == (run.prompts is None):
        raise InputError("give either --prompt TEXT or --prompts FILE")
    if run.prompts is None:
        lines, where = [run.prompt], "--prompt"
    else:
        where = str(run.prompts)
        lines = reading.text(run.prompts, expected="a text file with one prompt per line").split("\n")
    captions = [line.rstrip("\r") for line in lines if line.strip() and (run.prompts is None or line[0] != "#")]
    if not captions:
        raise InputError(f"{where}: no prompt in it; expected at least one")
    return captions


def draw(run: "Settings", captions: list[str], tokenizer: Tokenizer, on: Drawing) -> Int[Tensor, "P n h w"]:
    """The codes of n pictures for each of P prompts; 0 for those that other ranks draw."""
    params, cfg = checkpoint.load_model(run.model, on.device, on.dtype)
    cfg = replace(cfg, masked_ids=(), ids=tokenizer.ids)  # mask_image_logits is for text, and this draws pictures
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=on.world.rank != 0 or not console.is_terminal) as progress:
        pictures = -(-len(captions) * run.n // on.world.size)  # of this rank, but for a part of a batch
        task = progress.add_task("codes", total=pictures * (run.height * run.width // PIXELS_PER_CODE**2))
        prompts = [prompt.prompt_ids(tokenizer, caption, run.width, run.height) for caption in captions]
        how = Sampling(
            run.height, run.width, run.guidance, SCHEDULES[run.guidance_schedule], run.top_k, run.temperature, run.min_p, run.seed
        )  # fmt: skip
        tick = lambda drawn: progress.advance(task, drawn)
        pace = Pace(run.batch, on.compiled, tick, on.world.rank, on.world.size)
        return sample.generate_many(params, prompts, cfg, how, n=run.n, pace=pace)


@torch.inference_mode()
def write(
    folder: Path, run: "Settings", captions: list[str], codes: Tensor, vq_params: vq.Params, vq_cfg: VQConfig
) -> int:
    """Write one PNG per picture and its line in samples.jsonl; returns the number of pictures."""
    said = ("width", "height", "seed", "guidance", "guidance_schedule", "top_k", "temperature", "min_p")
    common = {name: getattr(run, name) for name in said}
    lines = []
    for p, caption in enumerate(captions):
        for i in range(run.n):
            name = f"{p:04d}_{i:02d}.png"
            image = vq.pixels(vq.decode(vq_params, codes[p, i : i + 1].to(vq_params.codebook.device), vq_cfg))[0]
            Image.fromarray(image.cpu().numpy()).save(folder / name)
            lines.append({"file": name, "prompt": caption, "prompt_index": p, "picture_index": i, **common})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _check(run: "Settings", captions: list[str], tokenizer: Tokenizer) -> None:
    prompt.check_size(tokenizer, run.width, run.height)
    codes = len(captions) * run.n * (run.height * run.width // PIXELS_PER_CODE**2)
    if codes > MOST_CODES:
        raise InputError(
            f"{len(captions)} prompts x --n {run.n} of {run.width}x{run.height} pixels are {codes} codes, at most {MOST_CODES} are "
            "drawn in a run: give fewer prompts, or a smaller --n"
        )
    for number, caption in enumerate(captions, 1):
        if problem := prompt.caption_problem(tokenizer, caption):
            raise InputError(f"prompt {number}: {problem}; leave it out")


def _drawable(run: "Settings", cfg: VQConfig, ids: Ids, world: World) -> Ids:
    """The model's ids, limited to the codes that the VQ has. Raises InputError for codes of another size in pixels."""
    if cfg.downsampling != PIXELS_PER_CODE:
        raise InputError(
            f"{run.vq}: a code is {cfg.downsampling} pixels, the model in {run.model} wants {PIXELS_PER_CODE}; give its VQ"
        )
    if cfg.codes < ids.codes:
        note = (
            f"{run.vq} has {cfg.codes} codes, {run.model} has ids for {ids.codes}: only the first {cfg.codes} are drawn"
        )
        world.say(note)
    return replace(ids, codes=min(ids.codes, cfg.codes))
