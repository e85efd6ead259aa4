"""The reference's transformer goldens as Hugging Face folders."""

from pathlib import Path

import torch
from torch import Tensor

from lumina_fn import checkpoint
from lumina_fn.config import ModelConfig
from lumina_fn.formats import names
from lumina_fn.model import Params
from tests.support import folders

NAMES = sorted(path.stem for path in (folders.GOLDENS / "transformer").glob("t*.json"))


def load(name: str, folder: Path, dtype=torch.float32) -> tuple[Params, ModelConfig, dict, dict[str, Tensor]]:
    """The golden's model through a Hugging Face folder, with its facts and tensors."""
    tensors, facts = folders.golden(name)
    names_of_images = {f"IMGIMG{i}": i for i in facts["image_token_ids"]}
    config = {"model_type": "chameleon_xllmx", **facts["config"], "vocabulary_map": names_of_images}
    source = folders.write_hf(folder / "hf", folders.parameters(tensors), config)
    return *checkpoint.load_model(source, dtype=dtype), facts, tensors


def by_reference_name(tree: Params) -> dict[str, Tensor]:
    """A tree like the parameters' under the reference's key names."""
    return {names.to_source(path, names.TRANSFORMER): leaf for path, leaf in names.flatten(tree).items()}
