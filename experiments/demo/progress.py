"""A training's state in one file, so that it resumes: every leaf of a tree, and the seconds spent."""

from pathlib import Path
from typing import TypeVar

import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save

from lumina_fn.disk import files

Tree = TypeVar("Tree")


def store(path: Path, state: Tree, seconds: float) -> None:
    leaves = {str(i): leaf.contiguous() for i, leaf in enumerate(pytree.tree_leaves(state))}
    files.write_atomic(path, save({**leaves, "seconds": torch.tensor(seconds)}))


def restore(path: Path, fresh: Tree) -> tuple[Tree, float]:
    """The stored state and its seconds; `fresh` and 0 where there is none yet."""
    if not path.exists():
        return fresh, 0.0
    tensors = load_file(path)
    spec = pytree.tree_structure(fresh)
    return pytree.tree_unflatten([tensors[str(i)] for i in range(spec.num_leaves)], spec), tensors["seconds"].item()
