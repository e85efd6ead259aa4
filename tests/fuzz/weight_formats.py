"""The files of a model's folder, and the pickles in them."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch

from lumina_fn import checkpoint, model, sources, vq
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.formats import safe_pickle, tensor_files, torch_zip
from tests.fuzz import pickles
from tests.fuzz.containers import mutated_safetensors, mutated_torch_file, saved
from tests.fuzz.playground import Format, Ground, json_cases, roads
from tests.support import folders

STATE = {key: tensor for key, tensor in folders.small_state().items() if ".layers.1." not in key}
CONFIG = {**folders.SMALL, "num_hidden_layers": 1}


def _tensors(path: Path) -> object:
    source = sources.open_source(path)
    for tensor in source.tensors.values():
        tensor_files.read(tensor, "cpu", torch.float32)
    return source.remarks, source.config


def safetensors(at: Ground) -> Format:
    folders.write_hf(at.folder / "hf", STATE, CONFIG)
    file = at.folder / "hf" / "model.safetensors"
    seeds = [file.read_bytes()]
    return Format(seeds, partial(mutated_safetensors, seeds, ()), file.write_bytes, partial(_tensors, at.folder / "hf"))


def index(at: Ground) -> Format:
    folders.write_hf(at.folder / "hf", STATE, CONFIG, shards=2)
    shutil.copy(at.folder / "hf" / "model-00001-of-00002.safetensors", at.outside / "secret.safetensors")
    (at.folder / "hf" / "link.safetensors").symlink_to(at.outside / "secret.safetensors")
    file = at.folder / "hf" / tensor_files.INDEX
    seeds, mutate = json_cases(
        [json.loads(file.read_text())], [*roads(at, "secret.safetensors"), "link.safetensors", "config.json"]
    )
    return Format(seeds, mutate, file.write_bytes, partial(_tensors, at.folder / "hf"))


def ckpt(at: Ground) -> Format:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, 2).T, "c": torch.zeros(3, dtype=torch.bfloat16)}
    tensors["tied"] = tensors["a"][:1]
    seeds = [
        saved({"state_dict": tensors, "epoch": 3}),
        saved(tensors),
        saved({"state_dict": {**tensors, "run": pickles.Evil(at.outside)}}),
    ]
    file = at.folder / "model.ckpt"

    def read() -> object:
        try:
            found, others = torch_zip.state_dict(file, "state_dict")
        except OSError as error:  # `sources.open_source` does the same
            raise InputError(str(error)) from error
        for tensor in found.values():
            tensor_files.read(tensor, "cpu", tensor.dtype)
        return others

    return Format(seeds, partial(mutated_torch_file, seeds), file.write_bytes, read)


def mindspeed(at: Ground) -> Format:
    folders.write_mindspeed(at.folder / "theirs", STATE, args={"iteration": 3})
    seeds = [
        saved({"model": STATE}),
        saved({"model": STATE, "args": pickles.Evil(at.outside), "rng_state": [1, {"x": (2,)}]}),
    ]
    file = at.folder / "theirs" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    return Format(seeds, partial(mutated_torch_file, seeds), file.write_bytes, partial(_tensors, at.folder / "theirs"))


def pickle(at: Ground) -> Format:
    seeds = pickles.seeds(at.outside)
    file = at.folder / "x.pkl"
    return Format(
        seeds,
        partial(pickles.mutated_pickle, seeds),
        file.write_bytes,
        lambda: safe_pickle.loads(file.read_bytes()) and "",
        ValueError,
    )


def config(at: Ground) -> Format:
    folders.write_hf(at.folder / "hf", STATE, CONFIG)
    ids = {"start": 1, "end": 2, "newline": 3, "sep": 4, "size0": 5, "code0": 20, "codes": 16}
    more = {"ids": ids, "vocabulary_map": {"IMGIMG1": 3, "x": 5}, "dropout": 0.1, "rope_scaling": None, "head_dim": 4}
    seeds, mutate = json_cases(
        [CONFIG, {**CONFIG, **more}], ("format", "lumina_fn/1", *CONFIG, *more, "mask_image_logits")
    )
    return Format(seeds, mutate, (at.folder / "hf" / "config.json").write_bytes, partial(_tensors, at.folder / "hf"))


def native_config(at: Ground) -> Format:
    """The configs of a small model and a small VQ, each beside its weights: a case lands in both folders."""
    lm, small = at.folder / "lm", at.folder / "vq"
    cfg = ModelConfig(
        vocab=40,
        width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        hidden=8,
        max_positions=16,
        ids=shards.Ids(1, 2, 3, 4, 5, 20, 16),
    )
    checkpoint.save_model(lm, model.init(cfg), cfg)
    vq_cfg = VQConfig(channels=4, multipliers=(1, 1), res_blocks=1, attn_levels=(1,), codes=8, groups=2)
    checkpoint.save_vq(small, vq.init(vq_cfg), vq_cfg)
    seeds, mutate = json_cases(
        [json.loads((f / "config.json").read_text()) for f in (lm, small)], ("lumina", "movqgan", "ids", "model_type")
    )

    def place(case: bytes) -> None:
        kind = lm if b'lumina"' in case else small
        (kind / "config.json").write_bytes(case)
        turn[0] = kind

    turn = [lm]
    return Format(seeds, mutate, place, lambda: _tensors(turn[0]))
