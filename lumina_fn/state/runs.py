"""A run's folder, or a checkpoint in it, as a model: which checkpoint is meant, and where its tokenizer is."""

from pathlib import Path
from typing import Any, NamedTuple

from lumina_fn.errors import InputError
from lumina_fn.state import manifest
from lumina_fn.state.manifest import CHECKPOINTS, MANIFEST, ORIGIN


class Checkpoint(NamedTuple):
    """A checkpoint of a run."""

    folder: Path  # of the run's checkpoints
    step: int
    origin: Path  # what the model takes over beside weights: the config and the tokenizer of the model that the run began with

    def meta(self) -> dict[str, Any]:
        """What the run wrote about itself. Raises InputError for a damaged checkpoint, or one that is not finetune's."""
        meta = manifest.read(self.folder, self.step)["meta"]
        if not isinstance(meta, dict) or not isinstance(meta.get("model"), dict):
            raise InputError(
                f"{self.folder} holds checkpoints that are not finetune's: they do not say which model it is"
            )
        return meta


def checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint that a path stands for: itself, or the newest of a run or of its folder of checkpoints; None for any other path.

    Raises InputError for a run without a checkpoint.
    """
    if path.name.isdecimal() and (path / MANIFEST).exists():
        return Checkpoint(path.parent, int(path.name), path.parent.parent / ORIGIN)
    if path.name == CHECKPOINTS and manifest.steps(path):
        path = path.parent
    if not (path / CHECKPOINTS).is_dir():
        return None
    if not (steps := manifest.steps(path / CHECKPOINTS)):
        raise InputError(f"{path} is a run's folder without a checkpoint: there is nothing to read yet")
    return Checkpoint(path / CHECKPOINTS, steps[-1], path / ORIGIN)
