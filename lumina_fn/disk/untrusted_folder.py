"""Files of a folder that a stranger packed: each must lie in it, and JSON must be an object of a bearable size."""

from pathlib import Path

from lumina_fn.disk import reading
from lumina_fn.errors import InputError, printable


def root(folder: Path) -> Path:
    """What a folder's links may point into: itself, or the repository in Hugging Face's cache that it is a snapshot of."""
    folder = folder.resolve()
    return folder.parents[1] if folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir() else folder


def file(folder: Path, name: str, top: Path | None = None) -> Path:
    """A regular file directly in the folder; a name or link that leads out of it (or of `top`, which it is in) is an InputError."""
    path = folder / name
    if Path(name).name != name or not name.isprintable() or not path.resolve().is_relative_to(root(top or folder)):
        raise InputError(
            printable(f"{folder}: the file {name!r} lies outside of the folder; put the file itself there")
        )
    if not path.is_file():
        raise InputError(f"{path} is missing or not a regular file")
    return path


def read_json(path: Path) -> dict:
    """A JSON object; InputError for anything else."""
    return reading.json_object(path, "a model's JSON file")
