"""The small file that every result carries: it says that a folder is ours, of which kind, and which of its files we wrote.

A folder without it, of another kind, or with anything else in it is not replaced or removed.
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

Ours = Callable[[str], bool]  # of a path below a folder that is written to while it is in use; a folder's ends with "/"


@dataclass(frozen=True)
class Mark:
    format: Literal["lumina_fn/mark/1"]
    kind: str  # model, features, run, pictures, report, ...
    version: str  # of the writer
    files: tuple[str, ...]  # below the folder, with "/" between; empty where the kind has names of its own


class Found(NamedTuple):
    """What lies in a folder, as paths below it; a folder comes after what is in it."""

    ours: list[str]
    strangers: list[str]  # of a strange folder only its own name, with "/"


def listed(folder: Path) -> list[str]:
    """Every file below a folder but its mark, sorted."""
    found = (Path(root, name).relative_to(folder).as_posix() for root, _, names in os.walk(folder) for name in names)
    return sorted(name for name in found if name != NAME)


def text(kind: str, files: list[str]) -> str:
    """What the mark of such a folder holds."""
    return json.dumps(asdict(Mark(FORMAT, kind, lumina_fn.__version__, tuple(files))), indent=1) + "\n"


def read(folder: Path) -> Mark | None:
    """The folder's mark, None where it has none. Raises InputError for one that is damaged."""
    if not os.path.lexists(folder / NAME):
        return None
    return reading.json_of(Mark, folder / NAME, "the mark of a folder that lumina wrote")


def check(folder: Path, kind: str, ours: Ours = lambda path: False) -> None:
    """InputError, which names the first stranger, unless all that lies in the folder is a result of that kind, or nothing is."""
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
    """What in the folder is ours, by its mark or by `ours`, and what is not. A link is nobody's work here: it is a stranger."""
    found = Found([], [])
    mark = read(folder)
    known = set(mark.files) if mark else set()
    _visit(folder, "", known | {NAME}, ours, found)
    return found


def _visit(folder: Path, prefix: str, known: set[str], ours: Ours, found: Found) -> None:
    """`known` are paths below the top, as `prefix` and all that is found is."""
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
