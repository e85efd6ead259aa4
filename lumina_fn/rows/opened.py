"""A user's dataset, whatever its form: the rows of a file, of a folder, or of files that a pattern names."""

import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.rows import folders, lists, parquet, tables, tars
from lumina_fn.rows.row import How, Rows, Stored, understood

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})", re.ASCII)
MAX_FILES = 1_000_000


def opened(path: Path, how: How = How()) -> Rows:  # noqa: B008 (it is immutable)
    """The rows of a dataset: JSON, JSONL, CSV, a folder, tars or Parquet.

    `path` may be a pattern for tars or Parquet files, such as `shards/{000..031}.tar`. Raises InputError for what is no dataset.
    """
    return understood(_stored(path, how), how)


def files(path: Path) -> list[Path]:
    """The path itself, or what a pattern stands for, in order. Raises InputError for a pattern that no file fits."""
    if path.exists() or not re.search(r"[{*?\[]", str(path)):
        return [path]
    found: list[Path] = []
    for one in itertools.islice(_unbraced(str(path)), MAX_FILES):
        matching = (
            sorted(_anchor(one).glob(one.removeprefix(str(_anchor(one))).lstrip("/")))
            if re.search(r"[*?\[]", one)
            else [Path(one)]
        )
        if not matching:
            raise InputError(f"{one}: no file fits this pattern")
        found += matching
    return found


def fingerprint(path: Path) -> str:
    """The SHA-256 of a list of rows, by which it is recognised without reading its rows; empty for datasets of other forms."""
    if not path.is_file() or folders.ending(path.name) in (".tar", ".parquet"):
        return ""
    with reading.opened(path, lists.EXPECTED) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _anchor(pattern: str) -> Path:
    """The folder above the first part that has a wildcard."""
    parts = Path(pattern).parts
    return Path(*itertools.takewhile(lambda part: not re.search(r"[*?\[]", part), parts))


def _unbraced(pattern: str) -> Iterator[str]:
    """A pattern's braces, {000..031} and {a,b}, written out as a shell does."""
    if (brace := _BRACES.search(pattern)) is None:
        yield pattern
        return
    if ends := _RANGE.fullmatch(brace[1]):
        first, last = int(ends[1]), int(ends[2])
        step, width = (1 if first <= last else -1), len(ends[1])
        choices: Iterator[str] = (f"{n:0{width}d}" for n in range(first, last + step, step))
    else:
        choices = iter(brace[1].split(","))
    for choice in choices:
        yield from _unbraced(pattern[: brace.start()] + choice + pattern[brace.end() :])


def _stored(path: Path, how: How) -> Stored:
    if path.is_dir():
        return _folder(path, how)
    found = files(path)
    endings = sorted({folders.ending(file.name) for file in found})
    if len(endings) > 1:
        raise InputError(f"{path}: files of several forms: {', '.join(endings)}; name those of one form")
    if endings == [".tar"]:
        return tars.opened(found, how)
    if endings == [".parquet"]:
        return parquet.opened(found, how)
    if len(found) > 1:
        raise InputError(f"{path}: {len(found)} files; expected one list, or several tars or Parquet files")
    if endings[0] in (".gz", ".tgz", ".zst", ".xz", ".bz2", ".zip"):
        raise InputError(f"{path}: a compressed file is not read; unpack it first, to a .tar for instance")
    return (tables if endings[0] in tables.ENDINGS else lists).opened(found[0], how.encoding, how.keys)


def _folder(folder: Path, how: How) -> Stored:
    """The rows of a folder, by what is in it. Raises InputError for one with several forms, or none."""
    kept: dict[str, list[str]] = {"metadata": [], ".tar": [], ".parquet": []}
    listed, pictures, captions = "", False, False
    for below, names in folders.files(folder):
        for name in names:
            end, path = folders.ending(name), f"{below}/{name}" if below else name
            if name in folders.METADATA:
                kept["metadata"].append(path)
            elif end in kept:
                kept[end].append(path)
            pictures = pictures or end in folders.PICTURES
            captions = captions or end in folders.CAPTIONS
            listed = listed or (path if not below and end in (".json", ".jsonl", *tables.ENDINGS) else "")
    if kept["metadata"]:
        return folders.imagefolder(folder, kept["metadata"], how)
    forms = {form: names for form, names in kept.items() if names}
    if pictures and (captions or not forms):
        forms["pictures"] = []
    if len(forms) > 1:
        raise InputError(f"{folder} holds {' and '.join(forms)}: name those of one form, such as '{folder}/*.tar'")
    if not forms or (listed and not captions and "pictures" in forms):
        hint = f"; is {folder / listed} the list of its pictures?" if listed else ""
        raise InputError(
            f"{folder}: expected pictures with .txt files beside them, {' or '.join(folders.METADATA)}, tars or Parquet{hint}"
        )
    if "pictures" in forms:
        return folders.beside(folder, how)
    read = tars.opened if ".tar" in forms else parquet.opened
    return read([folder / name for names in forms.values() for name in names], how)
