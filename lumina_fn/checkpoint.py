"""Load a model as a tree from a folder of any known format; save a model as a native folder.

A native folder is config.json (`format`, `kind`, `model`: sizes, `ids`, `source_config`), safetensors files whose keys are tree
paths, their index, and the tokenizer's files.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lumina_fn import model, sharding, sources, vq
from lumina_fn.config import LATER, ModelConfig, VQConfig
from lumina_fn.disk import files, reading
from lumina_fn.errors import InputError
from lumina_fn.formats import names, tensor_files
from lumina_fn.formats.tensor_files import Later, Source
from lumina_fn.sharding import Mesh, Sharded
from lumina_fn.state.manifest import steps, verify
from lumina_fn.state.saved_state import Stored, restore, save

__all__ = [
    "load_model", "load_parts", "load_vq", "read_config", "renew_from_checkpoint", "renew_model", "restore", "save", "save_heritage", "save_model", "save_vq", "steps",
    "stored_dtype", "verify",
]  # fmt: skip

KIND = "model"  # in the mark of a model's folder, whatever its format

log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]  # by tree path


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[model.Params, ModelConfig]:
    """The parameters and sizes of the transformer in a native, Hugging Face or MindSpeed release folder. Raises InputError for any other or a damaged one."""
    source, cfg = _transformer(path)
    return _load(source, model.init(cfg, device="meta"), device, dtype), cfg


def _transformer(path: str | Path) -> tuple[sources.Source, ModelConfig]:
    source = sources.open_source(path)
    if not isinstance(source.cfg, ModelConfig):
        raise InputError(f"{path} is {source.what}, expected the transformer: give the language model's folder")
    return source, source.cfg


def load_parts(path: str | Path, mesh: Mesh, dtype: torch.dtype = torch.float32) -> tuple[model.Params, ModelConfig]:
    """This rank's part of each unit of a transformer, and its sizes: `load_model` and `shard` without holding a whole unit."""
    source, cfg = _transformer(path)
    if mesh.rank == 0:
        _say_remarks(source)
    like = model.init(cfg, device="meta")
    stored = iter([(path, source.tensors[path]) for path in names.flatten(like)])

    def part(unit) -> Sharded:
        leaves = pytree.tree_leaves(unit)
        whole, layout = sharding.flatten(unit, mesh.shards[1])
        n = len(whole) // mesh.shards[1]
        out, first = torch.zeros(n, dtype=dtype, device=mesh.device), mesh.part * n
        for leaf in leaves:
            (path, tensor), count = next(stored), leaf.numel()
            begin, end = max(first, 0), min(first + n, count)
            if begin < end:
                tensor_files.read_range(tensor, begin, end, out[begin - first : end - first], path)
            first -= count
        return Sharded(out, layout)

    return model.over_units(part, like), cfg


def read_config(path: str | Path) -> ModelConfig:
    """The sizes of a transformer in a native, Hugging Face or MindSpeed release folder."""
    return _transformer(path)[1]


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the first tensor in a model's folder."""
    return next(iter(sources.open_source(path).tensors.values())).dtype


def load_vq(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[vq.Params, VQConfig]:
    """The parameters and sizes of the MoVQGAN in a native folder, or in a .ckpt (or a folder with one), whose pickle is not executed."""
    source = sources.open_source(path)
    if not isinstance(source.cfg, VQConfig):
        raise InputError(f"{path} is {source.what}, expected a MoVQGAN: give its native folder or its .ckpt")
    return _load(source, vq.init(source.cfg, device="meta"), device, dtype), source.cfg


def _load(source: sources.Source, like: names.Tree, device: str | torch.device, dtype: torch.dtype) -> names.Tree:
    _say_remarks(source)
    return names.unflatten(
        like, {path: tensor_files.read(t, device, dtype, path) for path, t in source.tensors.items()}
    )


def _say_remarks(source: sources.Source) -> None:
    for remark in source.remarks:
        log.warning(remark)


def save_model(
    path: str | Path,
    params: model.Params,
    cfg: ModelConfig,
    *,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Write a native folder, atomically; the tokenizer's files and the Hugging Face config are copied from the folder `source`.

    Raises InputError for an existing path. Tensors are stored as `dtype` (None: as they are). With a mesh every rank calls this with its parts, and rank 0 writes:
    units are gathered one at a time, and a whole model is never held.
    """
    _write_model(lambda: files.new_folder(path, KIND), params, cfg, source, dtype, mesh)


def renew_model(
    path: str | Path,
    params: model.Params,
    cfg: ModelConfig,
    *,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    mesh: Mesh | None = None,
) -> None:
    """`save_model` in a run's folder: replaces the model that an earlier part of the run wrote, and keeps other files in that folder."""
    _write_model(lambda: files.renewed_folder(path, KIND), params, cfg, source, dtype, mesh)


def renew_from_checkpoint(
    path: str | Path, checkpoints: Path, step: int, cfg: ModelConfig, *, source: str | Path, dtype: torch.dtype
) -> None:
    """`renew_model` with the parameters of a saved step of a run."""
    config, companions = sources.heritage(source)
    tensors = Stored(checkpoints, step).parameters(dtype)
    with files.renewed_folder(path, KIND) as folder:
        write_native(folder, cfg, tensors, sources.unmasked(config, cfg), companions)


def _write_model(
    opened: Callable[[], AbstractContextManager[Path]],
    params: model.Params,
    cfg: ModelConfig,
    source: str | Path | None,
    dtype: torch.dtype | None,
    mesh: Mesh | None,
) -> None:
    like = names.flatten(model.init(cfg, device="meta"))
    _check_shapes(_shapes(names.flatten(params)) if mesh is None else _whole_shapes(params, like), like)
    leaves = pytree.tree_leaves(params)
    stored: torch.dtype = leaves[0].dtype if dtype is None else dtype
    whole = iter(leaves) if mesh is None else _gathered(params, mesh)
    if mesh is not None and mesh.rank != 0:
        for _ in whole:  # a gather needs every rank
            pass
        return
    config, companions = (None, {}) if source is None else sources.heritage(source)
    config = sources.unmasked(config, cfg)
    tensors = {path: Later(tuple(t.shape), stored, lambda: next(whole).to(stored)) for path, t in like.items()}
    with opened() as folder:
        write_native(folder, cfg, tensors, config, companions)


def _gathered(params: model.Params, mesh: Mesh) -> Iterator[Tensor]:
    """Every leaf of every unit, in order; at most one whole unit is in memory."""
    for unit in model.units(params):
        yield from pytree.tree_leaves(sharding.unshard(unit, mesh))


def _whole_shapes(params: model.Params, like: Iterable[str]) -> Shapes:
    return dict(zip(like, sharding.whole_shapes(model.units(params)), strict=True))


def save_heritage(path: str | Path, source: str | Path) -> None:
    """Write, or replace, a folder with the config and the tokenizer's files of the model `source`, which models trained from it need."""
    config, companions = sources.heritage(source)
    with files.renewed_folder(path, "origin") as folder:
        copy_companions(folder, companions)
        if config is not None:
            write_json(folder / "config.json", config)


def save_vq(path: str | Path, params: vq.Params, cfg: VQConfig, *, overwrite: bool = False) -> None:
    """Write a native folder, atomically."""
    tensors = names.flatten(params)
    _check_shapes(_shapes(tensors), names.flatten(vq.init(cfg, device="meta")))
    with files.new_folder(path, KIND, overwrite) as folder:
        write_native(folder, cfg, tensors, None, {})


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {path: tuple(t.shape) for path, t in tensors.items()}


def _check_shapes(shapes: Shapes, like: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the shapes are those of the model's sizes."""
    expected = _shapes(like)
    if wrong := sorted(path for path in shapes.keys() | expected.keys() if shapes.get(path) != expected.get(path)):
        raise ValueError(f"these parameters do not fit the sizes of cfg: {', '.join(wrong)}")


def write_native(
    folder: Path,
    cfg: ModelConfig | VQConfig,
    tensors: Mapping[str, Source],
    config: dict | None,
    companions: Mapping[str, Path],
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Fill a folder with tensors (by tree path); config.json comes last, so that an unfinished one never loads."""
    tensor_files.write_shards(folder, tensors, progress)
    copy_companions(folder, companions)
    sizes = asdict(cfg)
    head = {"format": sources.FORMAT, "kind": "movqgan", "model": sizes}
    if isinstance(cfg, ModelConfig):
        head |= {"kind": "lumina", "ids": sizes.pop("ids"), "source_config": config}
        for name in [name for name, value in LATER.items() if sizes[name] == value]:
            del sizes[name]  # so that earlier versions read the folder
    write_json(folder / "config.json", head)


def copy_companions(folder: Path, companions: Mapping[str, Path]) -> None:
    """Copy the files that travel with a model, given by name, into a folder. Raises InputError for one that cannot be read."""
    for name, path in companions.items():
        (folder / name).write_bytes(reading.contents(path, reading.MAX_TEXT, "a file that travels with a model"))


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON in UTF-8, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
