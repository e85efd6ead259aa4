"""Small model folders as others write them, for the tests of what reads them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.demo import tokenizer as small_tokenizer
from lumina_fn.vocab import Ids
from tests.support.paths import GOLDENS

TOKENIZER = GOLDENS / "tokens" / "toy_tokenizer_bpe"
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5e5, "swin_norm": False,
         "mask_image_logits": False, "model_type": "chameleon", "torch_dtype": "bfloat16"}  # fmt: skip


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    folder = GOLDENS / ("movqgan" if name.startswith("m") else "transformer")
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}


def small_state(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The state dict that SMALL describes, under the reference's names."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    state = {"model.embed_tokens.weight": normal(40, 16)}
    for i in range(2):
        rows = {"q": 16, "k": 8, "v": 8}
        state |= {f"model.layers.{i}.self_attn.{n}_proj.weight": normal(r, 16) for n, r in rows.items()}
        state |= {f"model.layers.{i}.self_attn.{n}_norm.{w}": normal(1, 4) for n in "qk" for w in ("weight", "bias")}
        state[f"model.layers.{i}.self_attn.o_proj.weight"] = normal(16, 16)
        state |= {f"model.layers.{i}.mlp.{n}_proj.weight": normal(24, 16) for n in ("gate", "up")}
        state[f"model.layers.{i}.mlp.down_proj.weight"] = normal(16, 24)
        state |= {f"model.layers.{i}.{n}_layernorm.weight": normal(16) for n in ("input", "post_attention")}
    return state | {"model.norm.weight": normal(16), "lm_head.weight": normal(40, 16)}


def write_hf(folder: Path, state: dict[str, Tensor], config: dict, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {key: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(state)}
    for name in set(where.values()):
        save_file({key: state[key] for key in state if where[key] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def write_mindspeed(folder: Path, state: dict[str, Tensor], **others: object) -> Path:
    file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"model": state, **others}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same keys, dtypes, shapes and bits."""
    bits = lambda t: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def write_tokenizer(folder: Path, codes: int) -> Ids:
    """The embedded default's tokenizer with a model's ids for this many image codes beside it; returns those."""
    built, ids = small_tokenizer.build(codes)
    small_tokenizer.save(folder, built)
    (folder / "config.json").write_text(json.dumps({"ids": vars(ids)}))
    return ids
