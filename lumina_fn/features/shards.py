"""A feature set's files: shards that hold items, and an index that lists the set's shards in order.

A shard is written once, atomically, and never changed; its name ends with a hash of its inputs. Only the index is ever replaced, after
the shards that it names are complete, so that a set is at every moment the old or the new one.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt8
from msgspec import Meta
from safetensors.numpy import load, save

from lumina_fn import as_seen
from lumina_fn.disk import files, reading, untrusted_folder
from lumina_fn.errors import InputError
from lumina_fn.features.parts import EXPECTED, Parts, whole
from lumina_fn.vocab import CODES_PER_PATCH, Ids

FORMAT = "lumina_fn/features/2"
KIND = "features"  # in the mark of a set's folder
INDEX, MANIFEST, QUARANTINE = "features.json", "manifest.jsonl", "quarantine.jsonl"
MAX_INDEX = 1 << 30  # bytes of rows and lengths: 50 million items
SHARD_ITEMS = 1024  # 19 MB at 768 px
KEY = 12  # hex digits of a hash, in names
Natural = Annotated[int, Meta(ge=0, le=1 << 53)]
_ABOUT = (
    "about"  # the only entry of a shard's metadata: the order of several is undefined, and shards are compared bytewise
)


class Feature(NamedTuple):
    """A training item as a shard stores it: the ids of its text and the codes of its picture."""

    row: int  # index in the input
    text: list[int]  # ids before the picture
    codes: Integer[np.ndarray, "h w"]
    sha256: bytes = bytes(32)  # of the picture's file; zeros: unknown
    source: tuple[int, int] = (0, 0)  # width and height of the picture before it was cut; zeros: unknown
    notes: int = 0  # bit n: `as_seen.NOTES[n]` is true of the picture


class Rejected(NamedTuple):
    """A row of the input that could not be used."""

    row: int
    file: str | None
    reason: str


@dataclass(frozen=True)
class Origin:
    """The settings and models that a feature set was made with."""

    size: int  # pixels of the target's side
    seed: int  # seed of the prompt variants
    ids: Ids
    tokenizer: str  # fingerprint
    vq: str  # fingerprint; empty: unknown
    pictures: Literal["as-seen", "as-stored"] = "as-stored"  # how files were read; sets of older versions do not say it

    def settings(self) -> dict[str, Any]:
        """The fields, of which names of shards are made; without `pictures` if it is the older versions' only way."""
        fields = asdict(self)
        return fields if self.pictures == "as-seen" else {k: v for k, v in fields.items() if k != "pictures"}


@dataclass(frozen=True)
class Entry:
    """A shard as the index describes it."""

    file: str
    count: Natural  # number of its items
    bytes: Natural
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = (
        None  # of the file; None in the index of an older version
    )


@dataclass(frozen=True)
class IndexFile:
    """The content of INDEX, as JSON."""

    format: Literal["lumina_fn/features/2"]
    count: Natural
    largest_id: Natural
    origin: Origin
    items: str  # a file's name
    shards: list[Entry]
    notes: dict[str, Natural] = field(default_factory=dict)  # how many items each of `as_seen.NOTES` is true of
    made_from: str = ""  # a fingerprint of rows and settings, by which a complete set is recognised; empty: unknown


class Content(NamedTuple):
    """A shard without its texts and codes."""

    rows: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, "n 3"]  # text ids, rows of codes, columns
    sha256: UInt8[np.ndarray, "n 32"]
    sources: Int[np.ndarray, "n 2"]
    notes: UInt8[np.ndarray, " n"]
    rejected: list[Rejected]
    largest_id: int  # of all items; -1 if there are none


def name(number: int, key: str) -> str:
    """The file name of shard `number`; it ends with the first KEY digits of the hash `key`."""
    return f"features-{number:05d}-{key[:KEY]}.safetensors"


_OURS = re.compile(r"(features-\d{5,}|index)-[0-9a-f]{12}\.safetensors", re.ASCII)


def is_ours(name: str) -> bool:
    """Whether `write` or `finish` gives files this name."""
    return name == INDEX or _OURS.fullmatch(name) is not None


def write(path: Path, features: Sequence[Feature], rejected: Sequence[Rejected], ids: Ids) -> str:
    """Write a shard atomically; its SHA-256. Equal features give equal bytes."""
    end_to_end = lambda parts, dtype: np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="unsafe")
    about = {"largest_id": max((largest_id(f, ids) for f in features), default=-1), "rejected": rejected}
    shard = {
        "rows": np.array([f.row for f in features], np.int64),
        "lengths": np.array([(len(f.text), *f.codes.shape) for f in features], np.int32).reshape(-1, 3),
        "sources": np.array([f.source for f in features], np.int32).reshape(-1, 2),
        "text": end_to_end([np.array(f.text, np.int32) for f in features], np.int32),
        "codes": end_to_end([f.codes.ravel() for f in features], np.uint16),
        "sha256": np.frombuffer(b"".join(f.sha256 for f in features), np.uint8).reshape(-1, 32),
    }
    if any(f.notes for f in features):
        shard["notes"] = np.array([f.notes for f in features], np.uint8)
    data = save(shard, metadata={_ABOUT: json.dumps(about)})
    files.write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def largest_id(feature: Feature, ids: Ids) -> int:
    """The largest id of an item."""
    size = ids.size0 + max(feature.codes.shape) // CODES_PER_PATCH
    return max(*feature.text, size, ids.code0 + int(feature.codes.max()), ids.start, ids.end, ids.newline, ids.sep)


def read(path: Path) -> Content:
    """The content of a shard. Raises InputError for a file that is no shard, or a damaged one."""
    shard = Parts(path)
    with whole(path):
        about = reading.parsed(About, shard.about[_ABOUT], path, EXPECTED)
        rows, lengths, sha256, sources = (shard.array(name) for name in ("rows", "lengths", "sha256", "sources"))
        n, lengths = len(rows), lengths.astype(np.int64)
        notes = shard.array("notes") if "notes" in shard.stored else np.zeros(n, np.uint8)
        shapes = [part.shape for part in (rows, lengths, sha256, sources, notes)]
        if shapes != [(n,), (n, 3), (n, 32), (n, 2), (n,)]:
            raise ValueError("its parts have different lengths")
        ends = [int(lengths[:, 0].sum()), int((lengths[:, 1] * lengths[:, 2]).sum())]
        if (n and lengths.min() < 0) or [shard.count(part) for part in ("text", "codes")] != ends:
            raise ValueError("lengths disagree")
    return Content(rows, lengths, sha256, sources, notes, [Rejected(*r) for r in about.rejected], about.largest_id)


def finish(
    folder: Path,
    origin: Origin,
    made: Sequence[tuple[str, Content, str]],
    notes: Mapping[str, int] | None = None,
    made_from: str = "",
) -> int:
    """Write the index that makes these shards (name, content, SHA-256) the folder's set; the number of its items."""
    shards = [(name, content) for name, content, _ in made]
    rows, lengths = (
        np.concatenate([np.zeros((0, *shape), dtype), *(getattr(content, part) for _, content in shards)], dtype=dtype)
        for part, shape, dtype in (("rows", (), np.int64), ("lengths", (3,), np.int32))
    )
    items = save({"rows": rows, "lengths": lengths})
    file = f"index-{hashlib.sha256(items).hexdigest()[:KEY]}.safetensors"
    files.write_atomic(folder / file, items)
    entries = [Entry(name, len(content.rows), (folder / name).stat().st_size, sha256) for name, content, sha256 in made]
    largest = max((content.largest_id for _, content in shards), default=-1)
    index = {"format": FORMAT, "count": len(rows), "largest_id": max(largest, 0), "origin": origin.settings()}
    index |= {"items": file, "shards": [asdict(entry) for entry in entries]}
    index |= ({"notes": dict(notes)} if notes else {}) | ({"made_from": made_from} if made_from else {})
    files.write_atomic(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return len(rows)


def names(folder: Path) -> set[str]:
    """The names of the files of a finished set that `FeatureSet` reads."""
    index = read_index_file(folder)
    return {INDEX, index.items, *(entry.file for entry in index.shards)}


def write_features(folder: Path, features: Iterable[Feature], origin: Origin) -> int:
    """Write these features as a finished set in an existing folder; their number. One shard at a time is in memory."""
    features, shards = iter(features), []
    while part := list(islice(features, SHARD_ITEMS)):
        key = hashlib.sha256(repr((origin.settings(), part[0].row, part[-1].row)).encode()).hexdigest()
        shard = folder / name(len(shards), key)
        sha256 = write(shard, part, [], origin.ids)
        shards.append((shard.name, read(shard), sha256))
    return finish(folder, origin, shards)


@dataclass(frozen=True)
class About:
    """The content of a shard's metadata."""

    largest_id: int
    rejected: list[tuple[Natural, str | None, str]]


class Index(NamedTuple):
    """The index that `finish` wrote."""

    origin: Origin
    largest_id: int
    entries: list[Entry]
    rows: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, "n 3"]


def read_index_file(folder: Path) -> IndexFile:
    """The content of a folder's INDEX. Raises InputError for a folder that is no feature set."""
    path = folder / INDEX
    if path.exists():
        untrusted_folder.file(folder, INDEX)
    index = reading.json_of(IndexFile, path, EXPECTED)
    for name in (index.items, *(entry.file for entry in index.shards)):
        if Path(name).name != name:
            raise InputError(f"{path} is damaged: {name!r} is no file's name; expected {EXPECTED}")
    return index


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises InputError for a folder that is no feature set, or an incomplete one. Shards are not opened."""
    index = read_index_file(folder)
    for file in (MANIFEST, QUARANTINE):
        if os.path.lexists(folder / file):
            untrusted_folder.file(folder, file)
    for entry in index.shards:
        with whole(folder / entry.file):
            if (size := untrusted_folder.file(folder, entry.file).stat().st_size) != entry.bytes:
                raise ValueError(f"{size} bytes, not {entry.bytes}")
    file = folder / index.items
    with whole(file):
        data = reading.contents(untrusted_folder.file(folder, file.name), MAX_INDEX, EXPECTED)
        if _OURS.fullmatch(file.name) and file.name[6 : 6 + KEY] != hashlib.sha256(data).hexdigest()[:KEY]:
            raise ValueError("its checksum differs from its name's: it is damaged")
        items = load(data)
        rows, lengths = items["rows"], items["lengths"]
        counts = {len(rows), len(lengths), index.count, sum(e.count for e in index.shards)}
        if len(counts) != 1 or rows.shape != (index.count,) or lengths.shape[1:] != (3,):
            raise ValueError("counts disagree")
        if len(lengths) and lengths.min() < 0:
            raise ValueError("a length is negative")
    return Index(index.origin, index.largest_id, index.shards, rows, lengths)


def manifest(
    shard: str, content: Content, file_of: Mapping[int, str | None], crop_of: Callable[[tuple[int, int]], Any]
) -> Iterator[dict[str, Any]]:
    """What became of each row of a shard, in order; `crop_of(source)` is the crop of a picture of that size."""
    lengths = content.lengths[:, 1] * content.lengths[:, 2]
    ends = np.cumsum(lengths)
    lines: dict[int, dict[str, Any]] = {}
    for i, row in enumerate(content.rows.tolist()):
        lines[row] = {
            "row": row, "file": file_of[row], "status": "done", "shard": shard, "offset": int(ends[i] - lengths[i]),
            "length": int(lengths[i]), "crop": crop_of((int(content.sources[i, 0]), int(content.sources[i, 1]))),
            "sha256": content.sha256[i].tobytes().hex(),
        }  # fmt: skip
        if content.notes[i]:
            lines[row]["notes"] = as_seen.names(int(content.notes[i]))
    for row, file, reason in content.rejected:
        lines[row] = {"row": row, "file": file, "status": "quarantined", "reason": reason}
    return (lines[row] for row in sorted(lines))
