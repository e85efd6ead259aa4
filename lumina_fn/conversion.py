"""Rewrite a model as another kind of folder, every bit kept: the work of `lumina_fn.convert` after its arguments are parsed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lumina_fn import checkpoint, model, sources
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
    """Write a Hugging Face folder as the reference's; config.json comes last, so that an unfinished folder never loads."""
    source = _with_shared_norms(source)
    tensor_files.write_shards(folder, _renamed(source), report)
    _write_config(folder, source)


def write_transformers(folder: Path, source: sources.Source, report: Report) -> None:
    """Write a folder that transformers' own Chameleon loads, whose heads have norms of their own; config.json comes last."""
    cfg = replace(_transformer(source), head_norms=True)
    tensor_files.write_shards(folder, _renamed(_with_norms(source, cfg, _repeated)), report)
    checkpoint.copy_companions(folder, source.companions)
    checkpoint.write_json(folder / "config.json", hf_config.write_chameleon(cfg, source.config))


def write_mindspeed(folder: Path, source: sources.Source, report: Report) -> None:
    """Write a folder that MindSpeed-MM loads, with the Hugging Face config and the tokenizer; the iteration file comes last."""
    source = _with_shared_norms(source)
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


Shaped = Callable[
    [str, torch.Tensor, int], torch.Tensor
]  # of a norm's path, its values and the number of heads to have


def _with_norms(source: sources.Source, cfg: ModelConfig, shaped: Shaped) -> sources.Source:
    """The source with the per-head norms that cfg asks for; they are read at once, the other tensors when they are written."""
    if cfg == source.cfg:
        return source
    heads = names.flatten(model.init(cfg, device="meta"))
    norms = {
        path: shaped(path, tensor_files.read(tensor, "cpu", tensor.dtype), heads[path].shape[0])
        for path, tensor in source.tensors.items()
        if "q_norm." in path or "k_norm." in path
    }
    return source._replace(cfg=cfg, tensors={**source.tensors, **norms})


def _repeated(path: str, norm: torch.Tensor, heads: int) -> torch.Tensor:
    return norm.expand(heads, -1)


def _shared(path: str, norm: torch.Tensor, heads: int) -> torch.Tensor:
    if not torch.equal(norm, norm[:1].expand_as(norm)):
        raise InputError(
            f"{path}: each head has values of its own, and this kind of folder has one for all heads: give --to hf --layout transformers, or --to native"
        )
    return norm[:1]


def _with_shared_norms(source: sources.Source) -> sources.Source:
    """The source with one norm for all heads, as the reference has it. Raises InputError if the heads' norms differ."""
    return _with_norms(source, replace(_transformer(source), head_norms=False), _shared)


def _write_config(folder: Path, source: sources.Source) -> None:
    checkpoint.copy_companions(folder, source.companions)
    checkpoint.write_json(folder / "config.json", hf_config.write(_transformer(source), source.config))


# By what DST becomes, and by the layout of a Hugging Face folder.
WRITERS: dict[str, Write] = {
    "native": write_native, "hf": write_hf, "mindspeed": write_mindspeed, "transformers": write_transformers,
}  # fmt: skip


def convert(
    src: str | Path,
    dst: str | Path,
    write: Write,
    *,
    overwrite: bool = False,
    norm_from: str | Path | None = None,
    vocab: sources.Vocab | None = None,
) -> sources.Source:
    """Write the model at `src` to the new folder `dst`; the source. Raises InputError, with nothing written, if any part is impossible.

    `norm_from` is the model that training began with, needed for a MindSpeed checkpoint that lacks a part of its last norm; `vocab` says
    what to do with embeddings of more rows than config.json says.
    """
    source = sources.open_source(src, norm_from, vocab)
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
