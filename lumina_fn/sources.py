"""Detect the kind of a model's folder (native, Hugging Face, MindSpeed, a run's, MoVQGAN .ckpt) and check it without reading tensors."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lumina_fn import model, prompt, vq
from lumina_fn.config import LATER, LUMINA_7B, ModelConfig, VQConfig
from lumina_fn.disk import untrusted_folder
from lumina_fn.disk.untrusted_folder import read_json
from lumina_fn.errors import InputError, listed, printable
from lumina_fn.formats import hf_config, mindspeed, names, tensor_files, torch_zip, vq_config, weights
from lumina_fn.formats.tensor_files import Later, Stored
from lumina_fn.state import runs, saved_state
from lumina_fn.vocab import LUMINA_VOCAB, Ids

FORMAT = "lumina_fn/1"
COMPANIONS = (  # files that travel with a model's weights; no others are copied
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE",
)  # fmt: skip


Vocab = Literal["cut", "keep"]


class Source(NamedTuple):
    """A checked model on the disk; no tensor has been read yet."""

    what: str
    cfg: ModelConfig | VQConfig
    tensors: Mapping[str, Stored | Later]  # by tree path, exactly those of the tree and in its order
    config: dict | None  # Hugging Face's config.json, verbatim
    companions: dict[str, Path]
    remarks: list[str]  # for the user: entries that were ignored


def open_source(path: str | Path, norm_from: str | Path | None = None, vocab: Vocab | None = None) -> Source:
    """The model at `path`, fully checked. Raises InputError, which lists every problem.

    `norm_from` is the model that training began with, for a MindSpeed checkpoint that lacks a part of its last norm (mindspeed.py).
    `vocab` says what to do with a Hugging Face folder whose embeddings have more rows than its config.json says: cut them to that, or
    keep them all; without it such a folder is refused.
    """
    path = Path(path)
    if norm_from is not None and not mindspeed.is_there(path):
        raise InputError(f"{path} is no MindSpeed checkpoint: leave --norm-from out")
    try:
        return _open(path, None if norm_from is None else open_source(norm_from).tensors.get("head.norm"), vocab)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error


def heritage(path: str | Path) -> tuple[dict | None, dict[str, Path]]:
    """What a model trained from this folder's keeps beside its weights: the Hugging Face config (None: none), and the companions' paths."""
    saved = runs.checkpoint(Path(path))
    path = saved.origin if saved else Path(path)
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    if config is not None and "format" in config:
        config = config.get("source_config")
    return config, companions(path)


def unmasked(config: dict | None, cfg: ModelConfig) -> dict | None:
    """The Hugging Face config, with mask_image_logits false if this model masks no ids."""
    if config is not None and not cfg.masked_ids and config.get("mask_image_logits", True):
        return {**config, "mask_image_logits": False}  # an absent field means True
    return config


def companions(folder: Path) -> dict[str, Path]:
    """The files of a folder that travel with its weights, by name. Raises InputError for a link that leads out of the folder."""
    return {name: untrusted_folder.file(folder, name) for name in COMPANIONS if (folder / name).exists()}


def _open(path: Path, norm: Stored | Later | None, vocab: Vocab | None) -> Source:
    if not path.exists():
        raise InputError(f"{path} does not exist: give a model folder or a MoVQGAN .ckpt")
    if path.is_file():
        if path.suffix not in (".ckpt", ".pt", ".pth"):
            raise InputError(f"{path} is a file: give its folder (native, Hugging Face, MindSpeed), or a MoVQGAN .ckpt")
        return _open_ckpt(path)
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    if config is not None and "format" in config:
        return _open_native(path, config)
    if saved := runs.checkpoint(path):
        return _open_run(saved)
    stored = weights.there(path)
    if config is not None and stored and not config.keys().isdisjoint({"model_type", "hidden_size"}):
        return _open_transformer(path, weights.read(path), config, "a Hugging Face folder", vocab)
    if mindspeed.is_there(path):
        theirs = mindspeed.read(path, norm)
        source = _open_transformer(path, theirs.tensors, config, theirs.what, vocab)
        return source._replace(remarks=source.remarks + theirs.remarks)
    checkpoints = sorted(path.glob("*.ckpt"))
    if len(checkpoints) == 1:
        return _open_ckpt(untrusted_folder.file(path, checkpoints[0].name))
    found = (
        f"{len(checkpoints)} of these" if checkpoints else "weights without a model's config.json" if stored else "none"
    )
    raise InputError(
        f"{path} is no model folder: expected config.json with safetensors or {weights.WHOLE} (native, Hugging Face), {mindspeed.ITERATION} "
        f"(MindSpeed), .metadata (torch.distributed.checkpoint) or one MoVQGAN .ckpt, found {found}{untrusted_folder.completed_by(path)}"
    )


def _open_run(saved: runs.Checkpoint) -> Source:
    """A checkpoint's parameters, in the dtype of the model that the run began with."""
    meta, stored = saved.meta(), saved_state.Stored(saved.folder, saved.step)
    try:
        sizes, dtype = {**meta["model"]}, getattr(torch, meta["stored_dtype"])
        ids = sizes.pop("ids")
        cfg = ModelConfig(**{**sizes, "masked_ids": tuple(sizes["masked_ids"])}, ids=ids and Ids(**ids))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{saved.folder} holds checkpoints that are not finetune's: {error!r}") from error
    config, beside = heritage(saved.origin) if saved.origin.is_dir() else (None, {})
    return Source(f"step {saved.step} of a run", cfg, stored.parameters(dtype), unmasked(config, cfg), beside, [])


def _open_native(path: Path, config: dict) -> Source:
    where = path / "config.json"
    kinds = {"lumina": ModelConfig, "movqgan": VQConfig}
    form, kind, given = config["format"], config.get("kind"), config.get("model")
    if form != FORMAT or not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"{where} has format {form!r:.200} and kind {kind!r:.200}; this version reads {FORMAT!r}, lumina or movqgan"
        )
    expected = {f.name for f in fields(kinds[kind])} - {"ids"}
    given = LATER | given if kind == "lumina" and isinstance(given, dict) else given
    if not isinstance(given, dict) or given.keys() != expected:
        raise InputError(f"{where}: `model` must hold exactly {', '.join(sorted(expected))}")
    sizes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    wrong = hf_config.problems(sizes) if kind == "lumina" else vq_config.problems(sizes)
    ids = hf_config.read_ids(config.get("ids"), sizes["vocab"], wrong) if kind == "lumina" else None
    if (
        kind == "lumina"
        and not wrong
        and not (vq_config.whole(sizes["masked_ids"], 0) and max(sizes["masked_ids"], default=-1) < sizes["vocab"])
    ):
        wrong.append("masked_ids must be a list of ids below vocab")
    if wrong:
        raise InputError(printable(f"{where}: {'; '.join(wrong)}"))
    cfg = _with_ids(ModelConfig(**sizes, ids=ids), path) if kind == "lumina" else VQConfig(**sizes)
    tensors, _ = _matched(path, weights.read(path), cfg, None, ())
    source = config.get("source_config") if isinstance(config.get("source_config"), dict) else None
    return Source(f"a native {kind} folder", cfg, tensors, source, companions(path), [])


def _open_transformer(
    path: Path, found: Mapping[str, Stored | Later], config: dict | None, what: str, vocab: Vocab | None
) -> Source:
    paths = {names.to_native(key, names.TRANSFORMER): tensor.shape for key, tensor in found.items()}
    sizes = hf_config.of_shapes({ours: shape for ours, shape in paths.items() if ours is not None})
    cfg, remarks = replace(LUMINA_7B, **sizes), []
    if config is not None:
        cfg, remarks = hf_config.parse(config, sizes, path / "config.json")
        cfg, found = _of_vocabulary(path, cfg, found, vocab)
    elif wrong := hf_config.problems(asdict(cfg)):
        raise InputError(f"{path} is no Lumina-mGPT 2.0 transformer, as its tensors tell: {'; '.join(wrong)}")
    tensors, ignored = _matched(path, found, cfg, names.TRANSFORMER, ("model.vqmodel.",))
    return Source(what, _with_ids(cfg, path), tensors, config, companions(path), remarks + ignored)


def _of_vocabulary(
    path: Path, cfg: ModelConfig, found: Mapping[str, Stored | Later], vocab: Vocab | None
) -> tuple[ModelConfig, Mapping[str, Stored | Later]]:
    """The config and the tensors of one vocabulary, where another tool has added rows to the embeddings. Raises InputError."""
    keys = [names.key_of(ours, names.TRANSFORMER) for ours in ("embed", "head.unembed")]
    rows = {found[key].shape[0] if key in found and len(found[key].shape) == 2 else 0 for key in keys}
    if len(rows) != 1 or (has := rows.pop()) <= cfg.vocab:
        return cfg, found
    if vocab == "keep":
        return replace(cfg, vocab=has), found
    if vocab is None:
        raise InputError(
            f"{path}: the embeddings have {has} rows, and vocab_size in config.json is {cfg.vocab}: another tool has resized them; "
            f"write a model of one size: lumina convert {shlex.quote(str(path))} DST --to native --vocab cut (to {cfg.vocab}) or --vocab keep ({has})"
        )
    return cfg, {**found, **{key: _first_rows(found[key], cfg.vocab) for key in keys}}


def _first_rows(tensor: Stored | Later, count: int) -> Stored | Later:
    shape = (count, *tensor.shape[1:])
    if isinstance(tensor, Stored) and tensor.stride is None:
        return tensor._replace(shape=shape, nbytes=tensor.nbytes // tensor.shape[0] * count, crc=None)
    return Later(shape, tensor.dtype, lambda: tensor_files.read(tensor, "cpu", tensor.dtype)[:count])


def _open_ckpt(file: Path) -> Source:
    found, other = torch_zip.state_dict(file, "state_dict")
    cfg = vq_config.of_shapes(file, {key: tensor.shape for key, tensor in found.items()})
    tensors, ignored = _matched(file, found, cfg, names.MOVQGAN, ("ema_", "model_ema.", "loss."))
    return Source("a MoVQGAN checkpoint", cfg, tensors, None, {}, ignored + _ignored(other))


def _ignored(keys: list[str]) -> list[str]:
    return [f"ignored {len(keys)} entries: {listed(keys)}"] if keys else []


def _matched(
    where: Path,
    found: Mapping[str, Stored | Later],
    cfg: ModelConfig | VQConfig,
    table: names.Table | None,
    ignorable: tuple[str, ...],
) -> tuple[dict[str, Stored | Later], list[str]]:
    """The tree's tensors by tree path, and remarks on ignored ones. Raises InputError, which lists missing, unknown and misshapen ones.

    Without a table, keys are tree paths.
    """
    count = cfg.layers if isinstance(cfg, ModelConfig) else len(cfg.multipliers) * cfg.res_blocks
    if count > len(found):
        raise InputError(
            f"{where} has {len(found)} tensors, too few for the {count} layers of its config.json: it is not whole"
        )
    like = names.flatten(
        model.init(cfg, device="meta") if isinstance(cfg, ModelConfig) else vq.init(cfg, device="meta")
    )
    keys = {path: path if table is None else names.key_of(path, table) for path in like}
    missing = [key for key in keys.values() if key not in found]
    extra = sorted(found.keys() - set(keys.values()))
    ignored = [key for key in extra if key.startswith(ignorable)]
    unknown = [key for key in extra if not key.startswith(ignorable)]
    misshapen = []
    for path, key in keys.items():
        if key in found and (found[key].shape != tuple(like[path].shape) or not found[key].dtype.is_floating_point):
            has = f"{str(found[key].dtype).removeprefix('torch.')} {list(found[key].shape)}"
            misshapen.append(f"{key} ({has}, expected {list(like[path].shape)})")
    lists = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if wrong := "; ".join(f"{what}: {listed(keys)}" for what, keys in lists.items() if keys):
        raise InputError(printable(f"{where} does not hold the tensors that its sizes call for: {wrong}"))
    return {path: found[key] for path, key in keys.items()}, _ignored(ignored)


def _with_ids(cfg: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the special ids of the folder's tokenizer, unless it has its own.

    A small model's tokenizer may lack the special tokens; the model then has no ids. The released model's must have them.
    """
    if cfg.ids is not None or not all((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return cfg
    try:
        return replace(cfg, ids=prompt.load_tokenizer(folder).ids)
    except InputError:
        if cfg.vocab == LUMINA_VOCAB:
            raise
        return cfg
