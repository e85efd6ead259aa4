"""The mark, a small file in every result, says that we wrote the folder, of which kind it is, and which of its files are ours.

A folder without a mark, of another kind, or with any other file in it is not replaced or removed.
"""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import lumina_fn
from lumina_fn.disk import reading
from lumina_fn.errors import InputError

NAME = ".lumina.json"
FORMAT = "lumina_fn/mark/1"

Ours = Callable[[str], bool]  # whether a path below a folder in use is ours; the path of a folder ends with "/"


@dataclass(frozen=True)
class Mark:
    """What a result's mark holds, as JSON."""

    format: Literal["lumina_fn/mark/1"]
    kind: str  # model, features, run, pictures, report, ...
    version: str  # version of the writer
    files: tuple[str, ...]  # below the folder, with "/" between; empty where the kind has names of its own


class Found(NamedTuple):
    """The content of a folder as paths below it; a folder comes after its content."""

    ours: list[str]
    strangers: list[str]  # not ours; of a folder only its own name, with "/"


def listed(folder: Path) -> list[str]:
    """Every file below a folder except its mark, sorted."""
    found = (Path(root, name).relative_to(folder).as_posix() for root, _, names in os.walk(folder) for name in names)
    return sorted(name for name in found if name != NAME)


def text(kind: str, files: list[str]) -> str:
    """The text of a mark for these files."""
    return json.dumps(asdict(Mark(FORMAT, kind, lumina_fn.__version__, tuple(files))), indent=1) + "\n"


def read(folder: Path) -> Mark | None:
    """The folder's mark; None if it has none. Raises InputError for a damaged one."""
    if not os.path.lexists(folder / NAME):
        return None
    return reading.json_of(Mark, folder / NAME, "the mark of a folder that lumina wrote")


def check(folder: Path, kind: str, ours: Ours = lambda path: False) -> None:
    """Raise InputError, which names the first file that is not ours, unless the folder is empty or wholly a result of that kind."""
    advice = "give another place, or remove it yourself"
    if not any(folder.iterdir()):
        return
    mark = read(folder)
    if mark is None:
        first = min(path.name for path in folder.iterdir())
        raise InputError(
            f"{folder} holds {first}, and no {NAME} that says lumina wrote it: it is not replaced; {advice}"
        )
    if mark.kind != kind:
        raise InputError(
            f"{folder} is a result of another kind ({mark.kind}, not {kind}): it is not replaced; {advice}"
        )
    if strangers := sort_out(folder, ours).strangers:
        raise InputError(
            f"{folder} holds {strangers[0]}, which lumina did not write there: it is not replaced; {advice}"
        )


def sort_out(folder: Path, ours: Ours = lambda path: False) -> Found:
    """The paths in the folder that are ours, by its mark or by `ours`, and those that are not. A link is never ours."""
    found = Found([], [])
    mark = read(folder)
    known = set(mark.files) if mark else set()
    _visit(folder, "", known | {NAME}, ours, found)
    return found


def _visit(folder: Path, prefix: str, known: set[str], ours: Ours, found: Found) -> None:
    """Sort the content of a subfolder into `found`. `known`, `prefix` and the paths found are relative to the top folder."""
    parents = {f"{parent}/" for name in known for parent in PurePosixPath(name).parents}
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if not (f"{path}/" in parents or ours(f"{path}/")):
                found.strangers.append(f"{path}/")
                continue
            own = (
                read(Path(entry.path)) if prefix + entry.name + "/" not in parents else None
            )  # a result in a run's folder
            more = {f"{path}/{name}" for name in (*own.files, NAME)} if own else set()
            _visit(Path(entry.path), f"{path}/", known | more, ours, found)
            found.ours.append(f"{path}/")
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode) and (path in known or ours(path)):
            found.ours.append(path)
        else:
            found.strangers.append(path)
