"""`experiments.dataset report`: the statistics of a dataset, before or after its pictures become tokens."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from experiments import devices
from experiments.datasets import html, inspection, statistics, verify
from experiments.datasets.inspection import Look
from experiments.pretokenizing import rows as rows_of
from lumina_fn import data, images, prompt, vq
from lumina_fn.disk import files, lookup, marks, places, reading
from lumina_fn.errors import InputError, printable
from lumina_fn.features import shards
from lumina_fn.rows import opened
from lumina_fn.rows.row import Rows

if TYPE_CHECKING:
    from experiments.dataset import Report

WINDOW = 64  # rows that are processed at once
Picture = Callable[[Look], Image.Image]  # gives the picture of a row; raises InputError


def report(run: "Report") -> int:
    """Print the report, and write it to --json and --out; returns the exit code. Raises InputError."""
    is_features = run.source.is_dir() and any((run.source / name).exists() for name in (shards.INDEX, marks.NAME))
    _check(run, is_features)
    if run.out:
        places.place(run.out, _inputs(run))
    if run.json:
        places.place_of_file(run.json, _inputs(run))
    looks, show, said = _features(run) if is_features else _rows(run)
    done = [look for look in looks if look.reason is None]
    drawn = np.random.default_rng(run.seed).permutation(len(done))[: run.samples]
    sampled = [done[i] for i in sorted(drawn.tolist())] if show else []
    kind = "features" if is_features else "data"
    found = statistics.summary(str(run.source), kind, looks, run.distance, sampled)
    text, numbers = said + statistics.text(found) + "\n", json.dumps(found, indent=1) + "\n"
    if run.json:
        files.write_atomic(run.json, numbers)
    if run.out:
        by_row = {look.row: look for look in looks}
        pictures = {row: _shown(show, by_row[row]) for row in html.shown_rows(found)}
        with files.new_folder(run.out, "report", run.overwrite) as folder:
            (folder / "report.txt").write_text(text, encoding="utf-8")
            (folder / "report.json").write_text(numbers, encoding="utf-8")
            (folder / "report.html").write_text(html.page(found, pictures), encoding="utf-8")
    print(text, end="")
    return 0


def _check(run: "Report", is_features: bool) -> None:
    wrong = {"data": run.data, "vq": run.vq} if not is_features else {"model": run.model}
    for name, value in wrong.items():
        if value:
            raise InputError(
                f"--{name}: not of use for {run.source}, which {'holds' if is_features else 'is no folder of'} features; leave it out"
            )
    lookup.check_roots(run.image_root)
    if run.json and run.json.exists():
        _check_replaced(run)
    images.crop_sizes(run.size)


def _check_replaced(run: "Report") -> None:
    """Raises InputError unless the file that --json names may be replaced: with --overwrite, and only if it is a report."""
    places.place_of_file(run.json, _inputs(run))
    if not run.overwrite:
        raise InputError(f"--json {run.json}: the file exists; give a new place, or --overwrite to replace it")
    try:
        found = reading.json_object(run.json, "a report").get("format")
    except InputError as error:
        raise InputError(f"--json: {error}; it is not replaced, give another place") from error
    if found != statistics.FORMAT:
        raise InputError(f"--json {run.json} is no report of lumina's: it is not replaced, give another place")


def _inputs(run: "Report") -> list[Path]:
    return [path for path in (run.source, run.data, *run.image_root, run.model, run.vq) if path]


def _rows(run: "Report") -> tuple[list[Look], list[Picture], str]:
    """Every row of DATA, the function that loads its picture, and a line on what the rows were read as."""
    rows = opened.opened(run.source, rows_of.how(run, run.seed))
    tokenizer = prompt.load_tokenizer(run.model) if run.model else None
    how = inspection.Reading([*rows.roots, *run.image_root], run.size, run.pictures == "as-seen")
    items = enumerate(rows.items(range(rows.count), True))
    look = lambda numbered: inspection.at_row(*numbered, how, tokenizer, run.seed)
    return (
        _looks(look, items, rows.count, os.cpu_count() or 1),
        [_source_pictures(rows, how)],
        printable(rows.said()) + "\n",
    )


def _features(run: "Report") -> tuple[list[Look], list[Picture], str]:
    """Every row of a feature set's manifest, the functions that give its pictures (the source, the decoded one, both or none), and no line."""
    done = inspection.open_done(run.source)
    manifest = inspection.read_manifest(done.features)
    show: list[Picture] = []
    written = None
    if run.data:
        origin = done.features.origin
        rows = opened.opened(run.data, rows_of.how(run, origin.seed))
        how = inspection.Reading([*rows.roots, *run.image_root], origin.size, origin.pictures == "as-seen")
        show.append(_source_pictures(rows, how))
        written = [(item.row.file, item.row.prompt) for item in rows.items(range(rows.count), False)]
    if run.vq:
        show.append(_decoded_pictures(run, done.features))
    picture = show[0] if show and run.near else None
    look = lambda entry: inspection.at_entry(done, entry, written, picture)
    return _looks(look, manifest, len(manifest), (os.cpu_count() or 1) if run.data else 1), show, ""


def _source_pictures(rows: Rows, how: inspection.Reading) -> Picture:
    def source(look: Look) -> Image.Image:
        item = rows.item(look.row) if look.row < rows.count else None
        if item is None or item.row.file != look.file:
            raise InputError(f"row {look.row} is not {look.file} any more")
        loaded = how.load(item)
        if look.sha256 not in (loaded.sha256.hex(), None):
            raise InputError(f"{look.file} changed")
        return loaded.image

    return source


def _decoded_pictures(run: "Report", features: data.FeatureSet) -> Picture:
    params, cfg = verify.same_vq(run.vq, features, devices.checked_device(run))
    device = params.codebook.device

    @torch.inference_mode()
    def decoded(look: Look) -> Image.Image:
        codes = torch.from_numpy(features.text_and_codes(look.item)[1].astype(np.int64))
        if codes.max() >= cfg.codes:
            raise InputError(f"code {codes.max()}: {run.vq} has {cfg.codes}; was the set made with it?")
        return Image.fromarray(vq.pixels(vq.decode(params, codes[None].to(device), cfg))[0].cpu().numpy())

    return decoded


def _shown(show: Sequence[Picture], look: Look) -> list[Image.Image]:
    """The row's pictures, without those that can no longer be read."""
    shown = []
    for picture in show:
        try:
            shown.append(picture(look))
        except InputError:  # the source was removed or has changed; verify names such rows
            continue
    return shown


def _looks(look: Callable[[Any], Look], inputs: Iterable[Any], count: int, workers: int) -> list[Look]:
    """The results of `look` for all inputs, in order; shows progress on a terminal."""
    console, looks, waiting = Console(stderr=True), [], iter(inputs)
    with (
        Progress(console=console, disable=not console.is_terminal) as progress,
        warnings.catch_warnings(),  # ignore Pillow's warnings once for all threads: changing the filters is not thread-safe
        ThreadPoolExecutor(workers) as threads,
    ):
        warnings.simplefilter("ignore")
        bar = progress.add_task("looking at rows", total=count)
        while window := list(islice(waiting, WINDOW)):
            looks += threads.map(look, window)
            progress.update(bar, completed=len(looks))
    return looks
