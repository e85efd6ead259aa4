"""Files of a folder from an unknown source: each must lie in it, and JSON must be an object of bounded size."""

from pathlib import Path

from lumina_fn.disk import reading
from lumina_fn.errors import InputError, printable


def root(folder: Path) -> Path:
    """The folder that links may point into: the folder itself, or the repository in Hugging Face's cache of which it is a snapshot."""
    snapshot = _snapshot(folder)
    return folder.resolve() if snapshot is None else snapshot.parents[1]


def completed_by(folder: Path) -> str:
    """The end of a message about a file that a model's folder lacks: the command that fetches it, if the folder is of Hugging Face's cache."""
    snapshot = _snapshot(folder)
    if snapshot is None:
        return ""
    name = snapshot.parents[1].name.removeprefix("models--").replace("--", "/")
    return printable(
        f"; the cache has a part of this model, the rest comes by: hf download {name} --revision {snapshot.name}"
    )


def _snapshot(folder: Path) -> Path | None:
    """The snapshot in Hugging Face's cache that the folder is, or lies in; None for any other folder."""
    folder = folder.resolve()
    inside = (
        p for p in (folder, *folder.parents) if p.parent.name == "snapshots" and (p.parents[1] / "blobs").is_dir()
    )
    return next(inside, None)


def file(folder: Path, name: str, top: Path | None = None) -> Path:
    """The path of a regular file directly in the folder. Raises InputError for a name or link that leads out of it (or out of `top`)."""
    path = folder / name
    if Path(name).name != name or not name.isprintable() or not path.resolve().is_relative_to(root(top or folder)):
        raise InputError(
            printable(f"{folder}: the file {name!r} lies outside of the folder; put the file itself there")
        )
    if not path.is_file():
        raise InputError(f"{path} is missing or not a regular file{completed_by(folder)}")
    return path


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError for anything else."""
    return reading.json_object(path, "a model's JSON file")
