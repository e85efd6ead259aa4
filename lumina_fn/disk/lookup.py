"""Where the file is that a row of a user's list names: below one of the folders that the user gave, and nowhere else."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from lumina_fn.errors import InputError

MISSING = "no such file"
LISTED = 5  # names in a message


def check_roots(roots: Sequence[Path]) -> None:
    """Raise InputError for a folder of --image-root that is not there."""
    for root in roots:
        if not root.is_dir():
            raise InputError(f"--image-root {root}: no such folder")


class Located(NamedTuple):
    """Where a row's file is."""

    path: Path
    exact: bool  # False: its name is written otherwise in the row


def locate(file: str, roots: Sequence[Path]) -> Located:
    """`find`, also for a name as other systems write it, where exactly one file fits: as a file:// address, with backslashes,
    in another case, with accents composed otherwise (macOS). Raises InputError, with the nearest name if there is one.
    """
    if re.match(r"https?://", file, re.IGNORECASE):
        raise InputError("pictures are not downloaded: expected a file on this machine")
    if file.startswith("file://"):
        file = unquote(urlsplit(file).path)
    try:
        return Located(find(file, roots), True)
    except InputError as error:
        if "\0" in file or not str(error).startswith(MISSING):
            raise
        fitting, near = set(), set()
        for root in roots:
            found = _alike(root, file)
            fitting |= set(found)
            if not found and (there := _nearest(root, file)):
                near.add(there)
        if len(fitting) == 1:
            return Located(find(fitting.pop(), roots), False)
        if fitting:
            raise InputError(f"{error}; several fit: {', '.join(sorted(fitting)[:LISTED])}") from error
        raise InputError(f"{error}; {min(near)} is there" if near else str(error)) from error


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _alike(root: Path, file: str) -> list[str]:
    """The files below a root whose path is `file` but for case, composition and backslashes; at most LISTED."""
    parts = [part for part in re.split(r"[/\\]+", file) if part not in ("", ".")]
    if PurePosixPath(file).is_absolute() or ".." in parts:
        return []
    heads = [Path()]
    for part in parts:
        heads = [head / name for head in heads for name in _names(root, head).get(_folded(part), ())][:LISTED]
    return [str(head) for head in heads]


def _nearest(root: Path, file: str) -> str | None:
    """A file whose name is that of `file` without its folders or its ending, in the folder that `file` names or in the root."""
    at = PurePosixPath(file.replace("\\", "/"))
    if at.is_absolute() or ".." in at.parts:
        return None
    for folder in (Path(at.parent), Path()):
        for folded, names in _names(root, folder).items():
            if folded == _folded(at.name) or PurePosixPath(folded).stem == _folded(at.stem):
                return str(folder / names[0])
    return None


@lru_cache(maxsize=64)
def _names(root: Path, folder: Path) -> Mapping[str, list[str]]:
    """The names in a folder below a root, by their folded names. A folder is listed once.

    Empty where it cannot be listed, or where a link leads out of the root: a message would tell what lies there.
    """
    names: dict[str, list[str]] = {}
    real = Path(os.path.realpath(root / folder))
    if not real.is_relative_to(os.path.realpath(root)):
        return names
    with suppress(OSError):
        for path in sorted(real.iterdir()):
            names.setdefault(_folded(path.name), []).append(path.name)
    return names


def find(file: str, roots: Sequence[Path]) -> Path:
    """The path of a row's file: relative to the first root that has it, or absolute; with links resolved, it lies in one of the roots.

    Raises InputError; no file is opened.
    """
    try:
        real = [os.path.realpath(root) for root in roots]
        seen = [Path(os.path.realpath(Path(root, file))) for root in real]
        inside = [path for path in seen if any(path.is_relative_to(root) for root in real)]
        if not inside:
            raise InputError(
                f"the path leads outside {' and '.join(map(str, roots))}; name its folder with --image-root"
            )
        for path in inside:
            if path.exists():
                return path
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"not a usable path: {error}") from error
    raise InputError(f"{MISSING} under {' or '.join(map(str, roots))}")
