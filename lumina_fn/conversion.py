"""A model rewritten as another kind of folder, bit by bit: what `lumina_fn.convert` does once its arguments are known."""

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
    checkpoint.write_native(folder, source.cfg, source.tensors, source.config, source.companions, report)


def write_hf(folder: Path, source: sources.Source, report: Report) -> None:
    """What transformers loads; config.json comes last, so that an unfinished folder never loads."""
    tensor_files.write_shards(folder, _renamed(source), report)
    _write_config(folder, source)


def write_mindspeed(folder: Path, source: sources.Source, report: Report) -> None:
    """What MindSpeed-MM loads, with the Hugging Face config and the tokenizer beside it; the iteration file comes last."""
    file = folder / mindspeed.RELEASE
    file.parent.mkdir(parents=True)
    torch_zip.write(file, "model", _renamed(source), report)
    _write_config(folder, source)
    (folder / mindspeed.ITERATION).write_text("release")  # without a newline: their loader compares unstripped


def _renamed(source: sources.Source) -> dict[str, tensor_files.Source]:
    if not isinstance(source.cfg, ModelConfig):
        raise InputError(f"a MoVQGAN ({source.what}) converts to native only: use --to native")
    return {names.to_source(path, names.TRANSFORMER): tensor for path, tensor in source.tensors.items()}


def _write_config(folder: Path, source: sources.Source) -> None:
    checkpoint.copy_companions(folder, source.companions)
    checkpoint.write_json(folder / "config.json", hf_config.write(source.cfg, source.config))


WRITERS: dict[str, Write] = {"native": write_native, "hf": write_hf, "mindspeed": write_mindspeed}


def convert(
    src: str | Path, dst: str | Path, write: Write, *, overwrite: bool = False, norm_from: str | Path | None = None
) -> sources.Source:
    """Write what lies at `src` to the new folder `dst`; InputError, and nothing written, where that cannot be done whole.

    `norm_from` is the model that training began with, for a MindSpeed checkpoint that lost a part of its last norm.
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
    if 0 < free < total:  # what has no room at all is no disk; trying to write there tells why
        raise InputError(
            f"{dst}: {total / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free: give a place on a larger disk"
        )


def summary(source: sources.Source, dst: Path, to: str) -> str:
    """One line: what was written."""
    total = sum(tensor_files.size_of(tensor) for tensor in source.tensors.values())
    return f"{dst}: {len(source.tensors)} tensors, {total / 1e6:.1f} MB, from {source.what} to {to}"
