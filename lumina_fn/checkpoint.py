"""Load a model as a tree, from whatever folder somebody has; save one as a native folder.

A native folder is config.json (`format`, `kind`, `model`: sizes, `ids`, `source_config`), safetensors files whose keys are tree
paths, their index, and the tokenizer's files.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lumina_fn import files, model, names, sharding, sources, tensor_files, vq
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.errors import InputError
from lumina_fn.sharding import Mesh, Sharded
from lumina_fn.tensor_files import Stored

log = logging.getLogger(__name__)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[model.Params, ModelConfig]:
    """The transformer of a native, Hugging Face or MindSpeed release folder; InputError for anything else or damaged."""
    source = _transformer(path)
    return _load(source, model.init(source.cfg, device="meta"), device, dtype), source.cfg


def _transformer(path: str | Path) -> sources.Source:
    source = sources.open_source(path)
    if not isinstance(source.cfg, ModelConfig):
        raise InputError(f"{path} is {source.what}, expected the transformer: give the language model's folder")
    return source


def load_parts(path: str | Path, mesh: Mesh, dtype: torch.dtype = torch.float32) -> tuple[model.Params, ModelConfig]:
    """This rank's part of each unit of a transformer: `load_model` and `shard` without ever holding a whole unit."""
    source = _transformer(path)
    like = model.init(source.cfg, device="meta")
    stored = iter(source.tensors.values())  # in the tree's order

    def part(unit) -> Sharded:
        leaves = pytree.tree_leaves(unit)
        whole, layout = sharding.flatten(unit, mesh.shards[1])
        n = len(whole) // mesh.shards[1]
        out, first = torch.zeros(n, dtype=dtype, device=mesh.device), mesh.part * n
        for leaf in leaves:
            tensor, count = next(stored), leaf.numel()
            begin, end = max(first, 0), min(first + n, count)
            if begin < end:
                tensor_files.read_range(tensor, begin, end, out[begin - first : end - first])
            first -= count
        return Sharded(out, layout)

    return model.over_units(part, like), source.cfg


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a model's folder stores its first tensor in."""
    return next(iter(sources.open_source(path).tensors.values())).dtype


def load_vq(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[vq.Params, VQConfig]:
    """The MoVQGAN of a native folder, or of a .ckpt (or a folder with one), which is read without running it."""
    source = sources.open_source(path)
    if not isinstance(source.cfg, VQConfig):
        raise InputError(f"{path} is {source.what}, expected a MoVQGAN: give its native folder or its .ckpt")
    return _load(source, vq.init(source.cfg, device="meta"), device, dtype), source.cfg


def _load(source: sources.Source, like: names.Tree, device: str | torch.device, dtype: torch.dtype) -> names.Tree:
    for remark in source.remarks:
        log.warning(remark)
    return names.unflatten(like, {path: tensor_files.read(t, device, dtype) for path, t in source.tensors.items()})


def save_model(
    path: str | Path,
    params: model.Params,
    cfg: ModelConfig,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """A native folder, written atomically; the tokenizer's files and the Hugging Face config come from the folder `source`."""
    config, companions = (None, {}) if source is None else sources.heritage(source)
    if config is not None and not cfg.masked_ids and config.get("mask_image_logits", True):
        config = {**config, "mask_image_logits": False}  # absent would mean True
    tensors = _checked(params, model.init(cfg, device="meta"))
    with files.new_folder(path, overwrite) as folder:
        write_native(folder, cfg, tensors, config, companions)


def save_vq(path: str | Path, params: vq.Params, cfg: VQConfig, *, overwrite: bool = False) -> None:
    """A native folder, written atomically."""
    tensors = _checked(params, vq.init(cfg, device="meta"))
    with files.new_folder(path, overwrite) as folder:
        write_native(folder, cfg, tensors, None, {})


def _checked(params: object, like: object) -> dict[str, Tensor]:
    """The tree's tensors by path; ValueError unless they are those that the sizes call for."""
    tensors = names.flatten(params)
    shapes = {path: t.shape for path, t in tensors.items()}
    expected = {path: t.shape for path, t in names.flatten(like).items()}
    if wrong := sorted(path for path in shapes.keys() | expected.keys() if shapes.get(path) != expected.get(path)):
        raise ValueError(f"these parameters do not fit the sizes of cfg: {', '.join(wrong)}")
    return tensors


def write_native(
    folder: Path,
    cfg: ModelConfig | VQConfig,
    tensors: Mapping[str, Stored | Tensor],
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
    write_json(folder / "config.json", head)


def copy_companions(folder: Path, companions: Mapping[str, Path]) -> None:
    for name, path in companions.items():
        (folder / name).write_bytes(path.read_bytes())


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
