"""Turn a folder of pictures and captions into features to train on.

    python -m experiments.pretokenize DATA.json OUT --model DIR --vq DIR --size 768
    torchrun --nproc_per_node 8 -m experiments.pretokenize DATA.json OUT --model DIR --vq DIR --size 768

DATA.json lists {"file": "images/x.jpg", "prompt": "..."} rows (JSON or JSONL). OUT/manifest.jsonl says of every row what became of
it; rows that cannot be used are listed with the reason in OUT/quarantine.jsonl. The same command goes on where a run was ended, on
any number of devices, and after rows were added to DATA.json: OUT becomes the same, to the byte, whatever came in between.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from experiments import settings
from experiments.finetuning import run_folder
from experiments.launching import distributed
from experiments.launching.distributed import ALONE, World
from experiments.planning import memory
from experiments.pretokenizing import shard_claims
from experiments.pretokenizing.encoding import Encode, Prepared, Tally, encode_shards
from experiments.pretokenizing.shard_claims import Shard
from experiments.settings import POSITIONAL, EnvCheck
from lumina_fn import checkpoint, data, errors, images, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.disk import files, marks, places, reading
from lumina_fn.errors import InputError
from lumina_fn.features import dataset, shards
from lumina_fn.features.parts import digest
from lumina_fn.features.shards import MANIFEST, QUARANTINE, Feature, Origin, Rejected
from lumina_fn.process.ranges import SEED, Range
from lumina_fn.prompt import Tokenizer
from lumina_fn.vocab import PIXELS_PER_CODE

SIZE_TEXT_PROBABILITY = 0.9  # of a prompt that says the picture's size
ORIGIN = "origin.json"  # what a set is begun with


@dataclass(frozen=True)
class Settings:
    data: Annotated[Path, 'JSON list or JSONL of {"file", "prompt"}', POSITIONAL]
    out: Annotated[Path, "folder to write; what an earlier run left there is continued", POSITIONAL]
    model: Annotated[Path, "the model's folder; only its tokenizer is read"]
    vq: Annotated[Path, "MoVQGAN: a native folder or a .ckpt"]
    size: Annotated[int, "pixels, a multiple of 32: pictures become about size x size, whatever their shape"] = 768
    image_root: Annotated[Path | None, "second folder that pictures may lie in (the first is DATA's own)"] = None
    seed: Annotated[int, "of the choice which prompts say the picture's size", SEED] = 0
    batch: Annotated[int, "pictures encoded at once", Range(1, 1 << 12)] = 8
    shard: Annotated[int, "rows of a shard: what a process takes on at a time", Range(1, 1 << 20)] = shards.SHARD_ITEMS
    workers: Annotated[
        int | None,
        "threads of a process that read and cut pictures (default: its share of the cores)",
        Range(1, 1 << 10),
    ] = None
    longest_caption: Annotated[
        int,
        "characters; rows with longer ones are quarantined (after another value, --retry tries them again)",
        Range(1, 10**7),
    ] = prompt.LONGEST_CAPTION
    retry: Annotated[bool, "try the rows again that were quarantined"] = False
    device: Annotated[
        str, "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is there; each process takes its own"
    ] = "auto"
    env_check: EnvCheck = "error"
    overwrite: Annotated[bool, "start afresh in an existing OUT"] = False


@memory.lowered_by("lower --batch, --workers or --size")
def main(argv: Sequence[str] | None = None, world: World = ALONE) -> None:
    run = settings.parse(Settings, __doc__, argv)
    tokenizer = prompt.load_tokenizer(run.model)
    _check(run, tokenizer)
    device = settings.checked_device(run, world.device, world.say)
    rows = dataset.read_rows(run.data)
    out = places.place(run.out, [run.data, run.model, run.vq, *([run.image_root] if run.image_root else [])])
    vq_params, vq_cfg = checkpoint.load_vq(run.vq)
    if vq_cfg.downsampling != PIXELS_PER_CODE or vq_cfg.codes > tokenizer.ids.codes:
        raise InputError(
            f"{run.vq}: {vq_cfg.codes} codes of {vq_cfg.downsampling} pixels; "
            f"the model in {run.model} wants at most {tokenizer.ids.codes} of {PIXELS_PER_CODE} pixels"
        )
    origin = Origin(run.size, run.seed, tokenizer.ids, tokenizer.fingerprint, data.fingerprint(vq_params))
    planned = plan(rows, origin, run.shard)
    if run.overwrite and out.exists():
        roots = _roots(run)
        places.place(out, (Path(root, file) for file in map(dataset.file_of, rows) if file for root in roots))
    with run_folder.locked(out) if world.rank == 0 else nullcontext():
        if world.rank == 0:
            _begin(out, origin, planned, run)
        world.barrier()
        tally = _encode(run, world, out, rows, planned, tokenizer, encoder(vq_params, vq_cfg, device))
        world.barrier()
        busy, wall, done_here = (world.total(round(1000 * x)) / 1000 for x in (tally.busy, tally.wall, tally.rows))
        if world.rank == 0:
            rejected = _finish(out, origin, planned, rows, run)
    if world.rank != 0:
        return
    if len(rejected) == len(rows):
        first = rejected[0]
        raise InputError(
            f"{run.data}: none of {len(rows)} rows could be used; row {first.row} ({first.file}): {first.reason}; "
            f"all reasons are in {run.out / QUARANTINE}"
        )
    rate = (
        f"; {done_here * world.size / wall:.1f} pictures/s, the device was busy {busy / wall:.0%} of the time"
        if done_here
        else ""
    )
    print(errors.printable(f"{len(rows) - len(rejected)} done, {len(rejected)} quarantined: {run.out}{rate}"))


def plan(rows: Sequence[Any], origin: Origin, size: int) -> list[Shard]:
    """The set's shards: rows in their order, `size` at a time, under names that tell what they are made from."""
    told = []
    for number, begin in enumerate(range(0, len(rows), size)):
        part = range(begin, min(begin + size, len(rows)))
        made_from = [shards.FORMAT, asdict(origin), begin, rows[begin : part.stop]]
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        told.append(Shard(number, shards.name(number, key), part))
    return told


def encoder(params: vq.Params, cfg: VQConfig, device: torch.device) -> Encode:
    params = pytree.tree_map(lambda t: t.to(device), params)

    @torch.inference_mode()
    def encode(batch: Tensor) -> np.ndarray:
        return vq.encode(params, batch.to(device), cfg).cpu().numpy()

    return encode


def prepare(
    index: int, value: Any, roots: Sequence[Path], tokenizer: Tokenizer, size: int, seed: int,
    longest: int = prompt.LONGEST_CAPTION,
) -> Prepared | Rejected:  # fmt: skip
    """Everything about a row that needs no model: a function of the row, its file and the settings."""
    try:
        row = dataset.row(value)
        if problem := prompt.caption_problem(tokenizer, row.prompt, longest):
            raise InputError(problem)
        loaded = images.load(dataset.find(row.file, roots), size)
        prompt.check_size(tokenizer, *loaded.image.size)
    except InputError as error:
        file = value.get("file") if isinstance(value, dict) else None
        return Rejected(index, file if isinstance(file, str) else None, str(error))
    drawn = hashlib.sha256(json.dumps([seed, row.file, row.prompt]).encode()).digest()
    with_size = int.from_bytes(drawn[:8]) < SIZE_TEXT_PROBABILITY * 2**64
    text = prompt.prompt_ids(tokenizer, row.prompt, *loaded.image.size, with_size)
    return Prepared(index, text, *loaded)


def _encode(
    run: Settings,
    world: World,
    out: Path,
    rows: Sequence[Any],
    planned: list[Shard],
    tokenizer: Tokenizer,
    encode: Encode,
) -> Tally:
    """This rank's part of the work, with progress on rank 0's terminal."""
    roots = _roots(run)
    ready = lambda i: prepare(i, rows[i], roots, tokenizer, run.size, run.seed, run.longest_caption)

    def write(shard: Shard, features: list[Feature], rejected: list[Rejected]) -> str:
        with places.writable(out):
            return shards.write(out / shard.name, features, rejected, tokenizer.ids)

    workers = run.workers or max(1, (os.cpu_count() or 1) // world.local_size)
    console = Console(stderr=True)
    missing = [shard for shard in planned if not (out / shard.name).exists()]
    with (
        Progress(console=console, disable=world.rank != 0 or not console.is_terminal) as progress,
        warnings.catch_warnings(),  # once, around the threads: Pillow's are not thread-safe to ignore one by one
    ):
        warnings.simplefilter("ignore")
        share = sum(len(shard.rows) for shard in missing) / world.size
        bar = progress.add_task("pictures to tokens", total=share)
        return encode_shards(
            shard_claims.claimed(out, planned, world.rank, world.size), ready, encode, write, batch=run.batch, workers=workers,
            progress=lambda n: progress.advance(bar, n),
        )  # fmt: skip


def _roots(run: Settings) -> list[Path]:
    """The folders that pictures may lie in."""
    return [run.data.parent, *([run.image_root] if run.image_root else [])]


def _begin(out: Path, origin: Origin, planned: list[Shard], run: Settings) -> None:
    """OUT as this run needs it: new, or what an earlier run with the same settings left."""
    with places.writable(out):
        out.mkdir(exist_ok=True)
        if run.overwrite:
            marks.check(out, shards.KIND, is_ours)
            files.empty(out, is_ours)
        files.remove_unfinished(out)
        made = json.dumps({**asdict(origin), "shard": run.shard}, indent=1) + "\n"
        if (out / ORIGIN).exists():
            _same(out, json.loads(made))
        elif others := sorted(path.name for path in out.iterdir() if path.name != marks.NAME):
            raise InputError(f"{out} is no feature set (it holds {others[0]}): give another place")
        if marks.read(out) is None:
            files.write_atomic(out / marks.NAME, marks.text(shards.KIND, []))
        if not (out / ORIGIN).exists():
            files.write_atomic(out / ORIGIN, made)
        shard_claims.begin(out)
        if run.retry:
            (out / shards.INDEX).unlink(missing_ok=True)  # unfinished until they are made again
            for shard in planned:
                if (out / shard.name).exists() and shards.read(out / shard.name).rejected:
                    (out / shard.name).unlink()


def is_ours(path: str) -> bool:
    """Whether a path below OUT (a folder's ends with "/") is one that pretokenize writes."""
    own = path in (MANIFEST, QUARANTINE, ORIGIN) or shards.is_ours(path) or shard_claims.is_ours(path)
    return own or ("/" not in path and files.is_unfinished(Path(path)))


def _same(out: Path, now: dict[str, Any]) -> None:
    """InputError where OUT was begun with other settings."""
    try:
        then = reading.json_object(out / ORIGIN, "the settings that a feature set was begun with")
    except InputError as error:
        raise InputError(f"{error}; give another place, or --overwrite to start afresh") from error
    if wrong := [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]:
        raise InputError(
            f"{out} was begun otherwise: {'; '.join(wrong)}; give another place, or --overwrite to start afresh"
        )


def _finish(out: Path, origin: Origin, planned: list[Shard], rows: Sequence[Any], run: Settings) -> list[Rejected]:
    """The index and the manifest over all shards; what belongs to an earlier state of the set is removed."""
    known = _checksums(out)
    read = [
        (
            shard.name,
            shards.read(out / shard.name),
            shard_claims.checksum(out, shard) or known.get(shard.name) or digest(out / shard.name),
        )
        for shard in planned
    ]
    name_of = {i: row.get("file") if isinstance(row, dict) else None for i, row in enumerate(rows)}
    rejected = [r for _, content, _ in read for r in content.rejected]
    told = (
        line
        for name, content, _ in read
        for line in shards.manifest(name, content, name_of, lambda size: _crop(size, run.size))
    )
    with places.writable(out):
        files.write_atomic(out / MANIFEST, "".join(json.dumps(line) + "\n" for line in told))
        files.write_atomic(out / QUARANTINE, "".join(json.dumps(r._asdict()) + "\n" for r in rejected))
        shards.finish(out, origin, read)
        kept = {MANIFEST, QUARANTINE, ORIGIN, *shards.names(out)}
        shard_claims.forget(out)
        for path in list(out.iterdir()):
            if path.name not in kept and shards.is_ours(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
    return rejected


def _checksums(out: Path) -> dict[str, str | None]:
    """By shard, those of the set that OUT was before, where it was one."""
    with suppress(InputError):
        return {entry.file: entry.sha256 for entry in shards.read_index_file(out).shards}
    return {}


def _crop(source: tuple[int, int], target: int) -> dict[str, Any] | None:
    how = images.cut(source, target)
    return how and {"size": how.size, "cover": how.cover, "corner": how.corner}


def _check(run: Settings, tokenizer: Tokenizer) -> None:
    images.crop_sizes(run.size)
    prompt.check_size(tokenizer, run.size, run.size)
    if run.image_root and not run.image_root.is_dir():
        raise InputError(f"--image-root {run.image_root}: no such folder")


if __name__ == "__main__":
    distributed.run(main)
