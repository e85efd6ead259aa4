"""Folders as MindSpeed-MM's training saves them, how they are changed, and what is read from them."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as real
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from lumina_fn import conversion, sources
from lumina_fn.errors import InputError
from lumina_fn.formats import names, tensor_files
from tests.support.folders import SMALL

OPTIMIZER = {"state": {"exp_avg": torch.zeros(40, 16), "step": 3}, "param_groups": [{"lr": 2e-5}]}
RNG = [{"random_rng_state": (3, (1, 2), None), "cuda_rng_state": torch.zeros(16, dtype=torch.uint8)}]
BESIDE = {"args": argparse.Namespace(bf16=True, path=Path("/")), "checkpoint_version": 3.0, "iteration": 5,
          "optimizer": OPTIMIZER, "opt_param_scheduler": {"max_lr": 2e-5}, "rng_state": RNG}  # fmt: skip


def tracked(top: Path, iteration: int = 5) -> Path:
    """The folder that holds this iteration, as the newest one of `top`."""
    folder = top / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (top / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    (top / "config.json").write_text(json.dumps(SMALL))
    return folder


def save(folder: Path, state: dict, threads: int = 1) -> Path:
    real.save(state, storage_writer=real.FileSystemWriter(folder, thread_count=threads), no_dist=True)
    return folder


def native(path: Path, to: Path) -> dict[str, Tensor]:
    """The tensors of the native folder that `path` converts to, under Hugging Face's names."""
    conversion.convert(path, to, conversion.WRITERS["native"])
    tensors = {
        key: tensor_files.read(t, "cpu", t.dtype)
        for file in to.glob("*.safetensors")
        for key, t in tensor_files.safetensors_header(file).items()
    }
    return {names.to_source(key, names.TRANSFORMER): tensor for key, tensor in tensors.items()}


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        sources.open_source(path)
    assert "\n" not in str(error.value)
    return str(error.value)


Change = Callable[[Metadata], object]


def rewritten(folder: Path, change: Change) -> Path:
    """`.metadata` as `change` leaves it, or what it returns in its place."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))
    return folder
