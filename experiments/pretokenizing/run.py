"""The run of `experiments.pretokenize`, once its settings are known."""

import hashlib
import json
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from experiments import devices
from experiments.finetuning import run_folder
from experiments.launching.distributed import World
from experiments.planning import memory
from experiments.pretokenizing import context, folder, shard_claims
from experiments.pretokenizing import rows as rows_of
from experiments.pretokenizing.encoding import Encode, Tally, Work, encode_shards
from experiments.pretokenizing.folder import Outcome
from experiments.pretokenizing.rows import Recipe, prepare
from experiments.pretokenizing.shard_claims import Shard
from lumina_fn import as_seen, checkpoint, data, errors, images, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.disk import lookup, places
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.features.shards import QUARANTINE, Feature, Origin, Rejected
from lumina_fn.prompt import Tokenizer
from lumina_fn.rows import opened
from lumina_fn.rows.row import How, Rows
from lumina_fn.vocab import PIXELS_PER_CODE

if TYPE_CHECKING:
    from experiments.pretokenize import Settings


@memory.lowered_by("lower --batch, --workers or --size")
def main(run: "Settings", world: World) -> None:
    """Write the feature set OUT, of which each rank encodes its share. Raises InputError, also if no row can be used."""
    tokenizer = prompt.load_tokenizer(run.model)
    _check(run, tokenizer)
    device = devices.checked_device(run, world.device, world.say)
    how = rows_of.how(run, run.seed)
    out = places.place(run.out, [run.model, run.vq, *opened.files(run.data), *run.image_root])
    vq_params, vq_cfg = checkpoint.load_vq(run.vq)
    if vq_cfg.downsampling != PIXELS_PER_CODE or vq_cfg.codes > tokenizer.ids.codes:
        raise InputError(
            f"{run.vq}: {vq_cfg.codes} codes of {vq_cfg.downsampling} pixels; "
            f"the model in {run.model} wants at most {tokenizer.ids.codes} of {PIXELS_PER_CODE} pixels"
        )
    origin = Origin(run.size, run.seed, tokenizer.ids, tokenizer.fingerprint, data.fingerprint(vq_params), run.pictures)
    made_from = _made_from(run, origin, how)
    if not (run.overwrite or run.retry) and (found := folder.complete(out, made_from)):
        if world.rank == 0:
            _say(run, found, "")
        return
    console = Console(stderr=True)
    with console.status("reading the rows") if world.rank == 0 and console.is_terminal else nullcontext():
        rows = opened.opened(run.data, how)
        planned = folder.plan(rows, origin, run.shard)
    if world.rank == 0:
        print(errors.printable(rows.said()))
    recipe = Recipe(
        [*rows.roots, *run.image_root], tokenizer, run.size, run.seed, run.longest_caption, run.pictures == "as-seen"
    )
    if run.overwrite and out.exists():
        named = (item.row.file for item in rows.items(range(rows.count), False))
        places.place(out, (Path(root, file) for file in named if file and "\0" not in file for root in recipe.roots))
    with run_folder.locked(out) if world.rank == 0 else nullcontext():
        if world.rank == 0:
            folder.begin(out, origin, planned, overwrite=run.overwrite, shard=run.shard, retry=run.retry)
        world.barrier()
        work = _work(out, rows, recipe, encoder(vq_params, vq_cfg, device))
        tally = _encode(run, world, out, planned, work)
        world.barrier()
        busy, wall, done_here = (world.total(round(1000 * x)) / 1000 for x in (tally.busy, tally.wall, tally.rows))
        if world.rank == 0:
            same = made_from == _made_from(run, origin, how)  # the list was not changed meanwhile
            outcome = folder.finish(out, origin, planned, rows, made_from if same else "")
    if world.rank != 0:
        return
    rate = (
        f"; {done_here * world.size / wall:.1f} pictures/s, the device was busy {busy / wall:.0%} of the time"
        if done_here
        else ""
    )
    _say(run, outcome, rate)


def _made_from(run: "Settings", origin: Origin, how: How) -> str:
    """A fingerprint of the rows and of all settings that shards depend on; empty where the rows have none."""
    rows = opened.fingerprint(run.data)
    made_from = json.dumps([shards.FORMAT, origin.settings(), run.shard, how, rows], sort_keys=True)
    return rows and hashlib.sha256(made_from.encode()).hexdigest()


def _say(run: "Settings", found: Outcome, rate: str) -> None:
    """Print what became of the rows. Raises InputError if none could be used."""
    left = found.reasons.total()
    if found.done == 0:
        assert found.first is not None, "a dataset has rows"
        raise InputError(
            f"{run.data}: none of {left} rows could be used; row {found.first.row} ({found.first.file}): {found.first.reason}; "
            f"all reasons are in {run.out / QUARANTINE}"
        )
    if blame := _common_reason(found):
        print(errors.printable(blame))
    print(errors.printable(f"{found.done} done, {left} quarantined: {run.out}{rate}"))
    if found.notes:
        print("; ".join(f"{found.notes[name]} {as_seen.SAID[name]}" for name in as_seen.NOTES if name in found.notes))


def _common_reason(found: Outcome) -> str | None:
    """The reason for which more than half of the rows were left out, if there is one: mostly a wrong folder, which is no success."""
    rows = found.done + found.reasons.total()
    reason, n = found.reasons.most_common(1)[0] if found.reasons else ("", 0)
    return f"{n} of {rows} rows were left out for one reason: {reason}" if 2 * n > rows else None


def encoder(params: vq.Params, cfg: VQConfig, device: torch.device) -> Encode:
    """The function that encodes a batch of pictures on the device."""
    params = pytree.tree_map(lambda t: t.to(device), params)

    @torch.inference_mode()
    def encode(batch: Tensor) -> np.ndarray:
        return vq.encode(params, batch.to(device), cfg).cpu().numpy()

    return encode


def _work(out: Path, rows: Rows, recipe: Recipe, encode: Encode) -> Work:
    def write(shard: Shard, features: list[Feature], rejected: list[Rejected]) -> str:
        with places.writable(out):
            return shards.write(out / shard.name, features, rejected, recipe.tokenizer.ids)

    return Work(lambda part: rows.items(part, True), lambda i, item: prepare(i, item, recipe), encode, write)


def _encode(run: "Settings", world: World, out: Path, planned: list[Shard], work: Work) -> Tally:
    """Encode this rank's share of the shards; rank 0 shows progress on a terminal."""
    workers = run.workers or max(1, (os.cpu_count() or 1) // world.local_size)
    console = Console(stderr=True)
    missing = [shard for shard in planned if not (out / shard.name).exists()]
    with (
        Progress(console=console, disable=world.rank != 0 or not console.is_terminal) as progress,
        warnings.catch_warnings(),  # ignore Pillow's warnings once for all threads: changing the filters is not thread-safe
    ):
        warnings.simplefilter("ignore")
        share = sum(len(shard.rows) for shard in missing) / world.size
        bar = progress.add_task("pictures to tokens", total=share)
        return encode_shards(
            shard_claims.claimed(out, planned, world.rank, world.size), work, batch=run.batch, workers=workers,
            progress=lambda n: progress.advance(bar, n),
        )  # fmt: skip


def _check(run: "Settings", tokenizer: Tokenizer) -> None:
    images.crop_sizes(run.size)
    prompt.check_size(tokenizer, run.size, run.size)
    if run.long == "error":
        context.check(run.model, tokenizer, run.size)
    lookup.check_roots(run.image_root)
