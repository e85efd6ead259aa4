"""Rewrite a model as another kind of folder, every bit kept: the work of `lumina_fn.convert` after its arguments are parsed."""

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lumina_fn import checkpoint, sources
from lumina_fn.config import ModelConfig
from lumina_fn.disk import files, places
from lumina_fn.errors import InputError
from lumina_fn.formats import hf_config, mindspeed, names, tensor_files, torch_zip

Report = Callable[[int], None]  # called with the number of bytes just written
Write = Callable[[Path, sources.Source, Report], None]


def write_native(folder: Path, source: sources.Source, report: Report) -> None:
    """Write a native folder; config.json comes last, so that an unfinished folder never loads."""
    checkpoint.write_native(folder, source.cfg, source.tensors, source.config, source.companions, report)


def write_hf(folder: Path, source: sources.Source, report: Report) -> None:
    """Write a folder that transformers loads; config.json comes last, so that an unfinished folder never loads."""
    tensor_files.write_shards(folder, _renamed(source), report)
    _write_config(folder, source)


def write_mindspeed(folder: Path, source: sources.Source, report: Report) -> None:
    """Write a folder that MindSpeed-MM loads, with the Hugging Face config and the tokenizer; the iteration file comes last."""
    file = folder / mindspeed.RELEASE
    file.parent.mkdir(parents=True)
    torch_zip.write(file, "model", _renamed(source), report)
    _write_config(folder, source)
    (folder / mindspeed.ITERATION).write_text("release")  # without a newline: MindSpeed's loader does not strip it


def _transformer(source: sources.Source) -> ModelConfig:
    if not isinstance(source.cfg, ModelConfig):
        raise InputError(f"a MoVQGAN ({source.what}) converts to native only: use --to native")
    return source.cfg


def _renamed(source: sources.Source) -> dict[str, tensor_files.Source]:
    _transformer(source)
    return {names.key_of(path, names.TRANSFORMER): tensor for path, tensor in source.tensors.items()}


def _write_config(folder: Path, source: sources.Source) -> None:
    checkpoint.copy_companions(folder, source.companions)
    checkpoint.write_json(folder / "config.json", hf_config.write(_transformer(source), source.config))


WRITERS: dict[str, Write] = {"native": write_native, "hf": write_hf, "mindspeed": write_mindspeed}


def convert(
    src: str | Path, dst: str | Path, write: Write, *, overwrite: bool = False, norm_from: str | Path | None = None
) -> sources.Source:
    """Write the model at `src` to the new folder `dst`; the source. Raises InputError, with nothing written, if any part is impossible.

    `norm_from` is the model that training began with, needed for a MindSpeed checkpoint that lacks a part of its last norm.
    """
    source = sources.open_source(src, norm_from)
    total = sum(tensor_files.size_of(tensor) for tensor in source.tensors.values())
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        _check_room(places.place(dst, [Path(src), *([Path(norm_from)] if norm_from else [])]), total)
        with files.new_folder(dst, checkpoint.KIND, overwrite) as folder, bar:
            task = bar.add_task("", total=total)
            write(folder, source, lambda n: bar.advance(task, n))
    except OSError as error:
        raise InputError(f"converting {src} to {dst} failed: {error.strerror or error}; nothing was written") from error
    return source


def _check_room(dst: Path, total: int) -> None:
    parent = next(p for p in dst.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if 0 < free < total:  # 0 means no real disk, such as /proc: the write itself reports why
        raise InputError(
            f"{dst}: {total / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free: give a place on a larger disk"
        )


def summary(source: sources.Source, dst: Path, to: str) -> str:
    """One line that says what was written."""
    total = sum(tensor_files.size_of(tensor) for tensor in source.tensors.values())
    return f"{dst}: {len(source.tensors)} tensors, {total / 1e6:.1f} MB, from {source.what} to {to}"
