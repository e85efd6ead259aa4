"""The reference's transformer goldens as Hugging Face folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumina_fn import checkpoint, names
from lumina_fn.config import ModelConfig
from lumina_fn.model import Params

FOLDER = Path(__file__).parent / "goldens" / "transformer"
NAMES = sorted(path.stem for path in FOLDER.glob("t*.json"))


def read(name: str) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")


def load(name: str, folder: Path, dtype=torch.float32) -> tuple[Params, ModelConfig, dict, dict[str, Tensor]]:
    """The golden's model through a Hugging Face folder, with its facts and tensors."""
    facts, tensors = read(name)
    config = {"model_type": "chameleon_xllmx", **facts["config"]}
    config["vocabulary_map"] = {f"IMGIMG{i}": i for i in facts["image_token_ids"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")},
        folder / "model.safetensors",
    )
    return *checkpoint.load_model(folder, dtype=dtype), facts, tensors


def by_reference_name(tree: Params) -> dict[str, Tensor]:
    """A tree like the parameters' under the reference's key names."""
    return {names.to_source(path, names.TRANSFORMER): leaf for path, leaf in names.flatten(tree).items()}
