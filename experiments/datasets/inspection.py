"""What is known of each row of a dataset: from its picture and prompt, or from the features made from them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from experiments.datasets.duplicates import Fingerprint, fingerprint
from experiments.pretokenizing.rows import Recipe, prepare
from lumina_fn import data, images
from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.features.shards import Rejected
from lumina_fn.prompt import Tokenizer
from lumina_fn.rows import row as row_of
from lumina_fn.rows.row import Item
from lumina_fn.vocab import PIXELS_PER_CODE, image_length

UNKNOWN = bytes(32).hex()  # stands for the SHA-256 of a file that was missing when its features were migrated
Size = tuple[int, int]  # width and height in pixels


class Look(NamedTuple):
    """What is known of one row; None where something is not known."""

    row: int  # in the input
    file: str | None
    prompt: str | None = None
    reason: str | None = None  # why pretokenize leaves the row out
    source: Size | None = None  # of the picture's file
    crop: Size | None = None  # of what is encoded
    sha256: str | None = None  # of the file
    fingerprint: Fingerprint | None = None
    text: int | None = None  # tokens before the picture
    text_sha256: bytes | None = None  # of these tokens, where they are stored
    item: int | None = None  # its place in the feature set
    notes: frozenset[str] = frozenset()  # of `as_seen.NOTES`

    @property
    def tokens(self) -> int | None:
        """The number of tokens of the whole training item; None if it is not known."""
        if self.text is None or self.crop is None:
            return None
        width, height = (side // PIXELS_PER_CODE for side in self.crop)
        return self.text + image_length(height, width) + 1


class Reading(NamedTuple):
    """How pretokenize would read the pictures."""

    roots: Sequence[Path]  # folders that may hold them
    size: int
    seen: bool

    def load(self, item: Item) -> images.Loaded:
        """The picture of a row. Raises InputError."""
        picture, _ = row_of.source(item, self.roots)
        return images.load(picture, self.size, seen=self.seen)


def at_row(index: int, item: Item, how: Reading, tokenizer: Tokenizer | None, seed: int = 0) -> Look:
    """The row as pretokenize would take it with this seed; without a tokenizer captions and size tokens are not checked."""
    look = Look(index, item.row.file, item.row.prompt)
    if tokenizer is None:
        return _without_tokens(look, item, how)
    made = prepare(index, item, Recipe(how.roots, tokenizer, how.size, seed, seen=how.seen))
    if isinstance(made, Rejected):
        return look._replace(reason=made.reason)
    return look._replace(
        source=made.source, crop=made.image.size, sha256=made.sha256.hex(), fingerprint=fingerprint(made.image),
        text=len(made.text), notes=made.notes,
    )  # fmt: skip


def _without_tokens(look: Look, item: Item, how: Reading) -> Look:
    try:
        loaded = how.load(item)
    except InputError as error:
        return look._replace(reason=str(error))
    return look._replace(
        source=loaded.source, crop=loaded.image.size, sha256=loaded.sha256.hex(),
        fingerprint=fingerprint(loaded.image), notes=loaded.notes,
    )  # fmt: skip


class Done(NamedTuple):
    """A feature set, and the sizes of the pictures' files as its shards record them."""

    features: data.FeatureSet
    sources: Int[np.ndarray, "n 2"]  # width and height, zeros where they are not known


def open_done(folder: Path) -> Done:
    """The feature set in a folder. Raises InputError for a folder that is no feature set, or not complete."""
    features = data.FeatureSet(folder)
    names = [entry.file for entry in shards.read_index(folder).entries]
    sources = [shards.read(folder / name).sources for name in names]
    return Done(features, np.concatenate([np.zeros((0, 2), np.int32), *sources]))


def at_entry(
    done: Done,
    entry: Mapping[str, Any],
    written: Sequence[tuple[str | None, str | None]] | None,
    picture: Callable[[Look], Image.Image] | None,
) -> Look:
    """The row of a manifest's entry. Its prompt is taken from what the rows have `written` for file and prompt; `picture`, if given, loads or decodes its picture."""
    look = Look(entry["row"], entry.get("file"), reason=entry.get("reason"), sha256=entry["sha256"], item=entry["item"])
    look = look._replace(notes=frozenset(entry.get("notes", ())))
    if written is not None and look.row < len(written):
        file, caption = written[look.row]
        if file == look.file:
            look = look._replace(prompt=caption)
    if look.item is None:
        return look
    text, codes = done.features.text_and_codes(look.item)
    height, width = codes.shape
    width_of_file, height_of_file = done.sources[look.item].tolist()
    look = look._replace(
        crop=(PIXELS_PER_CODE * width, PIXELS_PER_CODE * height),
        source=(width_of_file, height_of_file) if width_of_file else None,
        text=len(text),
        text_sha256=hashlib.sha256(np.ascontiguousarray(text)).digest(),
    )
    if picture is not None:
        with suppress(InputError):  # the source was removed or has changed; verify names such rows
            look = look._replace(fingerprint=fingerprint(picture(look)))
    return look


def read_manifest(features: data.FeatureSet) -> list[dict[str, Any]]:
    """Every input row of a feature set, done or quarantined; "item" is its place in the set, "sha256" is None where it is unknown.

    Raises InputError for a manifest that does not match the set.
    """
    path, again = features.folder / shards.MANIFEST, "run experiments.pretokenize again"
    try:
        entries = [json.loads(line) for _, line in reading.lines(path, f"the list of a set's rows; {again}") if line]
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSONL: {error}; {again}") from error
    places = {row: i for i, row in enumerate(shards.read_index(features.folder).rows.tolist())}
    for number, entry in enumerate(entries):
        if not _is_entry(entry):
            raise InputError(f"{path}: line {number + 1} is no row of a feature set: {entry!r:.200}; {again}")
        entry["item"] = places.pop(entry["row"], None)
        if (entry["item"] is None) != (entry["status"] == "quarantined"):
            raise InputError(
                f"{path}: line {number + 1} says that row {entry['row']} is {entry['status']}, the set does not; {again}"
            )
        entry["sha256"] = None if entry.get("sha256") == UNKNOWN else entry.get("sha256")
    if places:
        raise InputError(f"{path}: {len(places)} items of the set are not in it; {again}")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("row")) is not int or entry["row"] < 0:
        return False
    if entry.get("status") == "quarantined":
        return isinstance(entry.get("file"), str | None) and isinstance(entry.get("reason"), str)
    notes = entry.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return False
    return entry.get("status") == "done" and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
