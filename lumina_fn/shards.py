"""A feature set's files: shards that hold items, and an index that says which shards, in which order, make the set.

A shard is written once, whole, and never changed; its name ends with a key of what it was made from. The index is the one
file that is replaced: what it names was there before it, so a set is at every moment the old one or the new one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lumina_fn.disk import files, within
from lumina_fn.errors import InputError
from lumina_fn.vocab import CODES_PER_PATCH, Ids

FORMAT = "lumina_fn/features/2"
KIND = "features"  # in the mark of a set's folder
INDEX = "features.json"
SHARD_ITEMS = 1024  # 19 MB at 768 px
KEY = 12  # hex digits of a hash, in names
_ABOUT = (
    "about"  # the one entry of a shard's metadata: several would stand in any order, and shards are compared bytewise
)


class Feature(NamedTuple):
    row: int  # in the input
    text: list[int]  # ids before the picture
    codes: Integer[np.ndarray, "h w"]
    sha256: bytes = bytes(32)  # of the picture's file; zeros: unknown
    source: tuple[int, int] = (0, 0)  # width and height of the picture before it was cut; zeros: unknown


class Rejected(NamedTuple):
    """A row that could not be used."""

    row: int
    file: str | None
    reason: str


@dataclass(frozen=True)
class Origin:
    """What a feature set was made with."""

    size: int  # pixels of the target's side
    seed: int  # of the prompt variants
    ids: Ids
    tokenizer: str  # fingerprint
    vq: str  # fingerprint; empty: unknown


class Entry(NamedTuple):
    """A shard as the index knows it."""

    file: str
    count: int  # of its items
    bytes: int


class Content(NamedTuple):
    """A shard but for its texts and codes."""

    rows: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, "n 3"]  # text ids, rows of codes, columns
    sha256: UInt8[np.ndarray, "n 32"]
    sources: Int[np.ndarray, "n 2"]
    rejected: list[Rejected]
    largest_id: int  # of any item; -1 where there is none


def name(number: int, key: str) -> str:
    return f"features-{number:05d}-{key[:KEY]}.safetensors"


_OURS = re.compile(r"(features-\d{5,}|index)-[0-9a-f]{12}\.safetensors", re.ASCII)


def is_ours(name: str) -> bool:
    """Whether a file of a set's folder has a name that `write` or `finish` gives."""
    return name == INDEX or _OURS.fullmatch(name) is not None


def write(path: Path, features: Sequence[Feature], rejected: Sequence[Rejected], ids: Ids) -> None:
    """One shard. It appears whole, by a rename; the same features give the same bytes."""
    end_to_end = lambda parts, dtype: np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="unsafe")
    about = {"largest_id": max((_largest_id(f, ids) for f in features), default=-1), "rejected": rejected}
    shard = {
        "rows": np.array([f.row for f in features], np.int64),
        "lengths": np.array([(len(f.text), *f.codes.shape) for f in features], np.int32).reshape(-1, 3),
        "sources": np.array([f.source for f in features], np.int32).reshape(-1, 2),
        "text": end_to_end([np.array(f.text, np.int32) for f in features], np.int32),
        "codes": end_to_end([f.codes.ravel() for f in features], np.uint16),
        "sha256": np.frombuffer(b"".join(f.sha256 for f in features), np.uint8).reshape(-1, 32),
    }
    files.write_atomic(path, save(shard, metadata={_ABOUT: json.dumps(about)}))


def _largest_id(feature: Feature, ids: Ids) -> int:
    size = ids.size0 + max(feature.codes.shape) // CODES_PER_PATCH
    return max(*feature.text, size, ids.code0 + int(feature.codes.max()), ids.start, ids.end, ids.newline, ids.sep)


def read(path: Path) -> Content:
    """Raises InputError for a file that is no shard, or not whole."""
    with _whole(path):
        file = safe_open(path, framework="np")
        about = json.loads(file.metadata()[_ABOUT])
        lengths = file.get_tensor("lengths").astype(np.int64)
        content = Content(
            file.get_tensor("rows"), lengths, file.get_tensor("sha256"), file.get_tensor("sources"),
            [Rejected(*r) for r in about["rejected"]], int(about["largest_id"]),
        )  # fmt: skip
        ends = [[int(lengths[:, 0].sum())], [int((lengths[:, 1] * lengths[:, 2]).sum())]]
        if [file.get_slice(part).get_shape() for part in ("text", "codes")] != ends:
            raise ValueError("lengths disagree")
        return content


def open_items(path: Path) -> Any:
    """The shard's texts and codes, of which `get_slice` reads a part from mapped pages."""
    with _whole(path):
        return safe_open(path, framework="np")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """An error of the block is an InputError that names the shard."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {error}: the feature set is not whole; run experiments.pretokenize again") from error


def finish(folder: Path, origin: Origin, shards: Sequence[tuple[str, Content]]) -> int:
    """Make these shards the set that lies in the folder; returns how many items it has."""
    rows, lengths = (
        np.concatenate([np.zeros((0, *shape), dtype), *(getattr(content, part) for _, content in shards)], dtype=dtype)
        for part, shape, dtype in (("rows", (), np.int64), ("lengths", (3,), np.int32))
    )
    items = save({"rows": rows, "lengths": lengths})
    file = f"index-{hashlib.sha256(items).hexdigest()[:KEY]}.safetensors"
    files.write_atomic(folder / file, items)
    entries = [Entry(name, len(content.rows), (folder / name).stat().st_size) for name, content in shards]
    largest = max((content.largest_id for _, content in shards), default=-1)
    index = {"format": FORMAT, "count": len(rows), "largest_id": max(largest, 0), "origin": asdict(origin)}
    index |= {"items": file, "shards": [entry._asdict() for entry in entries]}
    files.write_atomic(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return len(rows)


def names(folder: Path) -> set[str]:
    """The files of a finished set that `FeatureSet` reads."""
    index = json.loads((folder / INDEX).read_bytes())
    return {INDEX, index["items"], *(entry["file"] for entry in index["shards"])}


def write_features(folder: Path, features: Iterable[Feature], origin: Origin) -> int:
    """A finished set in an existing folder; returns how many features came. A shard's worth is held in memory."""
    features, shards = iter(features), []
    while part := list(islice(features, SHARD_ITEMS)):
        key = hashlib.sha256(repr((asdict(origin), part[0].row, part[-1].row)).encode()).hexdigest()
        shard = folder / name(len(shards), key)
        write(shard, part, [], origin.ids)
        shards.append((shard.name, read(shard)))
    return finish(folder, origin, shards)


class Index(NamedTuple):
    """What `finish` wrote."""

    origin: Origin
    largest_id: int
    entries: list[Entry]
    rows: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, "n 3"]


def read_index(folder: Path) -> Index:
    """Raises InputError for a folder that is no feature set, or not whole. Shards are looked at, and not opened."""
    path = folder / INDEX
    if path.exists():
        within.file(folder, INDEX)
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise InputError(
                f"{path}: format {index['format']!r}, expected {FORMAT!r}; run experiments.pretokenize again"
            )
        origin = dict(index["origin"])
        origin = Origin(**{**origin, "ids": Ids(**origin["ids"])})
        entries = [Entry(Path(e["file"]).name, e["count"], e["bytes"]) for e in index["shards"]]
        numbers = (
            index["largest_id"],
            index["count"],
            *asdict(origin.ids).values(),
            *(n for e in entries for n in e[1:]),
        )
        if any(type(n) is not int for n in numbers):
            raise TypeError("ids, counts and sizes must be whole numbers")
        if type(origin.tokenizer) is not str:
            raise TypeError("a fingerprint must be text")
        file = folder / Path(index["items"]).name
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a folder written by experiments.pretokenize") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not the index of a feature set: {error!r}; run experiments.pretokenize again"
        ) from error
    for entry in entries:
        with _whole(folder / entry.file):
            if (size := within.file(folder, entry.file).stat().st_size) != entry.bytes:
                raise ValueError(f"{size} bytes, not {entry.bytes}")
    with _whole(file):
        items = safe_open(within.file(folder, file.name), framework="np")
        rows, lengths = items.get_tensor("rows"), items.get_tensor("lengths")
        if not len(rows) == len(lengths) == index["count"] == sum(e.count for e in entries) or lengths.shape[1:] != (
            3,
        ):
            raise ValueError("counts disagree")
        if len(lengths) and lengths.min() < 0:
            raise ValueError("a length is negative")
    return Index(origin, index["largest_id"], entries, rows, lengths)


def manifest(
    shard: str, content: Content, file_of: Mapping[int, str | None], crop_of: Callable[[tuple[int, int]], Any]
) -> Iterator[dict[str, Any]]:
    """What became of each of a shard's rows, in their order; `crop_of(source)` says how a picture of that size was cut."""
    lengths = content.lengths[:, 1] * content.lengths[:, 2]
    ends = np.cumsum(lengths)
    lines: dict[int, dict[str, Any]] = {}
    for i, row in enumerate(content.rows.tolist()):
        lines[row] = {
            "row": row, "file": file_of[row], "status": "done", "shard": shard, "offset": int(ends[i] - lengths[i]),
            "length": int(lengths[i]), "crop": crop_of((int(content.sources[i, 0]), int(content.sources[i, 1]))),
            "sha256": content.sha256[i].tobytes().hex(),
        }  # fmt: skip
    for row, file, reason in content.rejected:
        lines[row] = {"row": row, "file": file, "status": "quarantined", "reason": reason}
    return (lines[row] for row in sorted(lines))
