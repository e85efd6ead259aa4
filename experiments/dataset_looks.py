"""What is known of every row of a dataset: read off its pictures and prompts, or off the features made from them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.dataset_duplicates import Fingerprint, fingerprint
from lumina_fn import data, dataset, images, prompt
from lumina_fn.errors import InputError
from lumina_fn.prompt import Tokenizer
from lumina_fn.vocab import PIXELS_PER_CODE, image_length

MANIFEST = "manifest.jsonl"
Size = tuple[int, int]  # width and height in pixels


class Look(NamedTuple):
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

    @property
    def tokens(self) -> int | None:
        """Of the whole training item."""
        if self.text is None or self.crop is None:
            return None
        width, height = (side // PIXELS_PER_CODE for side in self.crop)
        return self.text + image_length(height, width) + 1


def at_row(index: int, value: Any, roots: Sequence[Path], size: int, tokenizer: Tokenizer | None) -> Look:
    """The row as pretokenize would take it at this size; without a tokenizer neither captions nor size tokens are judged."""
    file, caption = (text if isinstance(text, str) else None for text in written(value))
    look = Look(index, file, caption)
    try:
        row = dataset.row(value)
        if tokenizer and (problem := prompt.caption_problem(tokenizer, row.prompt)):
            raise InputError(problem)
        path = dataset.find(row.file, roots)
        image = images.open_image(path)
        look = look._replace(source=image.size, sha256=digest(path))
        fitted = images.fit(image, size)
        look = look._replace(crop=fitted.size, fingerprint=fingerprint(fitted))
        if tokenizer:
            prompt.check_size(tokenizer, *fitted.size)
            look = look._replace(text=len(prompt.prompt_ids(tokenizer, row.prompt, *fitted.size)))
    except InputError as error:
        look = look._replace(reason=str(error))
    return look


def digest(path: Path) -> str:
    """The SHA-256 of a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}") from error


def written(value: Any) -> tuple[Any, Any]:
    """What a row, whatever it is, says of file and prompt."""
    return (value.get("file"), value.get("prompt")) if isinstance(value, dict) else (None, None)


def at_features(
    features: data.FeatureSet,
    manifest: Sequence[dict],
    rows: Sequence[Any] | None,
    picture: Callable[[Look], Image.Image] | None,
) -> Iterator[Look]:
    """The rows of a feature set's manifest. Prompts are those of `rows`; `picture` says what its pictures look like, if anything does."""
    places = count()
    for entry in manifest:
        look = Look(entry["row"], entry["file"], reason=entry.get("reason"))
        if rows is not None:
            file, caption = written(rows[look.row]) if look.row < len(rows) else (None, None)
            if file == look.file and isinstance(caption, str):
                look = look._replace(prompt=caption)
        if look.reason is None:
            look = look._replace(item=next(places), sha256=entry["sha256"])
            feature = features.feature(look.item)
            height, width = feature.codes.shape
            digest = hashlib.sha256(np.asarray(feature.text, np.int32).tobytes()).digest()
            look = look._replace(crop=(PIXELS_PER_CODE * width, PIXELS_PER_CODE * height))
            look = look._replace(text=len(feature.text), text_sha256=digest)
            if picture is not None:
                look = look._replace(fingerprint=_seen(picture, look))
        yield look


def _seen(picture: Callable[[Look], Image.Image], look: Look) -> Fingerprint | None:
    try:
        return fingerprint(picture(look))
    except InputError:  # the source is gone or changed since: verify names those
        return None


def read_manifest(folder: Path, features: data.FeatureSet) -> list[dict]:
    """Every input row of a feature set, done or quarantined. Raises InputError for one that is not this set's."""
    path = folder / MANIFEST
    again = "run experiments.pretokenize again"
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the list of a feature set's rows; {again}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSONL: {error}; {again}") from error
    for number, entry in enumerate(entries):
        if not _is_entry(entry):
            raise InputError(f"{path}: line {number + 1} is no row of a feature set: {entry!r:.200}; {again}")
    done = sum(entry["status"] == "done" for entry in entries)
    if done != len(features):
        raise InputError(f"{path}: {done} rows are done, but the set holds {len(features)} items; {again}")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("row")) is not int or entry["row"] < 0:
        return False
    if entry.get("status") == "quarantined":
        return isinstance(entry.get("file"), str | None) and isinstance(entry.get("reason"), str)
    return entry.get("status") == "done" and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
