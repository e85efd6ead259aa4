"""A folder of pictures with a caption beside each, as kohya's and SimpleTuner's users keep them, or with Hugging Face's metadata files."""

import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from lumina_fn.disk import lookup, marks, reading
from lumina_fn.errors import InputError
from lumina_fn.rows import lists, tables, text
from lumina_fn.rows.row import How, Stored, Unread, Values, chained, keys_of

METADATA = ("metadata.jsonl", "metadata.csv")  # of Hugging Face's imagefolder; a file's name is relative to its folder
CAPTIONS = (".txt", ".caption")
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".heic", ".heif", ".jxl"),
)
LONGEST = 1 << 20  # bytes of a caption
_NONE = 0xFFFF  # for a picture without a caption


def files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `folder`, relative to it and "" for itself, with the sorted names of its files, and of folders that are links.

    Nothing whose name begins with a dot or is `__MACOSX` (copies of macOS), and nothing that lumina wrote there.
    """
    for root, folders, names in os.walk(folder):
        if root != str(folder) and marks.read(Path(root)) is not None:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        links = [name for name in folders if Path(root, name).is_symlink()]
        below = os.path.relpath(root, folder)
        yield "" if below == "." else below, sorted([*(name for name in names if not name.startswith(".")), *links])


def ending(name: str) -> str:
    """The ending of a file's name with its dot, in small letters."""
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _joined(below: str, name: str) -> str:
    return str(PurePosixPath(below, name))


def beside(folder: Path, how: How) -> Stored:
    """A row for every picture below a folder, with the caption beside it: x.txt or x.caption for x.jpg, or x.jpg.txt.

    A picture without a caption is an `Unread` row, and so is a link to a folder.
    """
    names, ends, captions = bytearray(), array("q", [0]), array("H")
    kinds: list[
        str
    ] = []  # what stands behind a picture's stem in the names of captions: .txt, .TXT, .jpg.txt and the like
    alone: list[str] = []
    for below, found in files(folder):
        texts = sorted(
            (name for name in found if ending(name) in CAPTIONS), key=lambda name: CAPTIONS.index(ending(name))
        )
        of = {_stem(name): name for name in reversed(texts)}  # .txt before .caption
        pictures = [name for name in found if ending(name) in PICTURES or (folder / below / name).is_dir()]
        used = set()
        for name in pictures:
            stem, caption = _stem(name), of.get(_stem(name)) or of.get(name)
            used |= {stem, name}
            names += os.fsencode(_joined(below, name))
            ends.append(len(names))
            if caption is not None and (kind := caption[len(stem) :]) not in kinds:
                kinds.append(kind)
            captions.append(_NONE if caption is None else kinds.index(caption[len(stem) :]))
        alone += [_joined(below, name) for name in texts if _stem(name) not in used]

    def values(part: range, pictures: bool = False) -> Iterator[tuple[Any, None]]:
        for i in part:
            file = os.fsdecode(bytes(names[ends[i] : ends[i + 1]]))
            yield _captioned(folder, file, None if captions[i] == _NONE else kinds[captions[i]], how), None

    come_from = " and ".join(f"`{kind}`" for kind in kinds) or "nowhere"
    come_from += f" ({len(alone)} captions have no picture beside them, the first is {alone[0]})" if alone else ""
    return Stored("a folder of pictures and captions", len(captions), values, come_from, roots=(folder,))


def _captioned(folder: Path, file: str, kind: str | None, how: How) -> Any:
    """The row of a picture below a folder, whose caption's name ends with `kind`."""
    stem = _stem(file)
    if ending(file) not in PICTURES:
        return Unread("a link to a folder is not followed: name that folder itself", file)
    if kind is None:
        expected = " or ".join(PurePosixPath(stem).name + end for end in CAPTIONS)
        return Unread(f"no caption: expected {expected} beside it", file)
    try:
        path = lookup.find(stem + kind, [folder])
        found = text.of(reading.contents(path, LONGEST, "a caption"), path, "a caption", how.encoding).strip()
    except InputError as error:
        return Unread(f"its caption: {error}", file)
    bad = text.fault(found)
    return Unread(f"its caption: {bad}", file) if bad else {"file": file, "prompt": found}


def imagefolder(folder: Path, metadata: Sequence[str], how: How) -> Stored:
    """The rows of Hugging Face's metadata files below a folder; each names files relative to itself."""
    stored = []
    for parent, several in groupby(sorted(metadata), lambda name: str(PurePosixPath(name).parent)):
        if len(both := list(several)) > 1:
            raise InputError(
                f"{folder / parent} holds {' and '.join(PurePosixPath(name).name for name in both)}: expected one of them; move the other away"
            )
    for name in metadata:
        path, below = folder / name, str(PurePosixPath(name).parent)
        table = (
            tables.opened(path, how.encoding, how.keys)
            if name.endswith(".csv")
            else lists.opened(path, how.encoding, how.keys)
        )
        stored.append(table._replace(values=_moved(table.values, below, how)) if below != "." else table)
    return chained("Hugging Face imagefolder", stored)._replace(keys=how.keys, roots=(folder,))


def _moved(values: Values, below: str, how: How) -> Values:
    """The values, with the files of `below` named from above it."""

    def moved(part: range, pictures: bool) -> Iterator[tuple[Any, None]]:
        for value, _ in values(part, pictures):
            key = keys_of(value, how.keys).file
            if isinstance(value, dict) and isinstance(value.get(key), str):
                value = {**value, key: _joined(below, value[key])}
            yield value, None

    return moved
