"""Features extracted by other tools, read as ours: MindSpeed-MM's data.jsonl with .pt files, Alpha-VLLM's record.json with .pkl files.

Both keep a dict of ids and labels for each picture. No pickle is executed, and no file outside of the named folder is opened.
"""

import io
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from lumina_fn.disk import lookup, reading
from lumina_fn.errors import InputError
from lumina_fn.features.shards import Feature
from lumina_fn.formats import plain_pickle
from lumina_fn.prompt import LARGEST_ID, Tokenizer
from lumina_fn.rows import lists
from lumina_fn.rows.row import Unread
from lumina_fn.vocab import CODES_PER_PATCH, IGNORE, image_codes

INDEXES = ("data.jsonl", "record.json", "record.jsonl")
PARTS = re.compile(r"(\d+)-of-(\d+)-record\.jsonl?")  # indexes of Alpha-VLLM's ranks, not yet concatenated
KINDS = (".pt", ".pkl")
MAX_FILE = plain_pickle.MAX_BYTES + (1 << 16)


class Left(NamedTuple):
    """A record from which no feature could be made."""

    row: int
    file: str | None
    reason: str
    duplicate: bool = False  # an earlier record has the same picture


class Record(NamedTuple):
    """A line of an index of extracted features: a file, the number of ids in it, and the picture's id (None: not given)."""

    file: str
    length: int | None
    id: int | None


def indexes(folder: Path) -> list[Path]:
    """The index files of a folder of extracted features, in order; empty if it is no such folder."""
    if found := [folder / name for name in INDEXES if (folder / name).is_file()]:
        return found[:1]
    parts = [(int(match[1]), path) for path in folder.glob("*-record.json*") if (match := PARTS.fullmatch(path.name))]
    return [path for _, path in sorted(parts)]


def read(folder: Path, tokenizer: Tokenizer) -> Iterator[tuple[Feature, str] | Left]:
    """For each record of a folder's index, in order, its feature and file, or the reason why there is none. Raises InputError without an index."""
    if not (found := indexes(folder)):
        raise InputError(f"{folder} holds no extracted features: expected {', '.join(INDEXES)} or N-of-M-record.jsonl")
    stored = [lists.opened(lookup.find(path.name, [folder])) for path in found]
    records = [_record(value) for part in stored for value, _ in part.values(range(part.count), False)]
    prefixes = {_prefix(r.file) for r in records if isinstance(r, Record)}
    seen: dict[Path, tuple[int, Record]] = {}
    for row, record in enumerate(records):
        if isinstance(record, str):
            yield Left(row, None, record)
            continue
        try:
            path = _place(folder, record.file, moved=len(prefixes) == 1)
            first = seen.get(path)
            if first is not None and first[1][1:] == record[1:]:
                yield Left(row, record.file, f"the same record as row {first[0]}, which was kept", True)
                continue
            feature = Feature(row, *parse(*item(path, record), tokenizer))
            if first is not None:
                raise InputError(f"its file is that of row {first[0]}")
            seen[path] = row, record
            yield feature, record.file
        except InputError as error:
            yield Left(row, record.file, str(error))


def _record(value: Any) -> Record | str:
    """The record in a line of the index, or what is wrong with the line."""
    if isinstance(value, Unread):
        return value.reason
    if not isinstance(value, dict) or not isinstance(value.get("file"), str):
        return 'expected a record like {"file": "features/x.pt", "len": 1234}'
    length, number = value.get("len"), value.get("id")
    if any(n is not None and type(n) is not int for n in (length, number)):
        return "len and id must be whole numbers"
    return Record(value["file"], length, number)


def _prefix(file: str) -> str:
    return str(PurePosixPath(file).parent.parent)


def _place(folder: Path, file: str, moved: bool) -> Path:
    """The file that a record names.

    Records hold paths relative to the folder in which the extraction was started. If all files lie in one folder, it is taken to be
    `folder`, even if that was moved (`moved`), and only the last two parts of a path are used. Raises InputError.
    """
    tail = str(PurePosixPath(*PurePosixPath(file).parts[-2:]))
    path = lookup.find(tail if moved else str(Path.cwd() / file), [folder])
    if path.suffix not in KINDS or not path.is_file():
        raise InputError(f"not a regular {' or '.join(KINDS)} file")
    return path


def item(path: Path, record: Record) -> tuple[list[int], list[int]]:
    """The ids and labels in a file. Raises InputError if they do not match its record."""
    try:
        data = reading.contents(path, MAX_FILE, "a file of extracted features")
        value = plain_pickle.loads(_zipped(data) if path.suffix == ".pt" else data)
    except (
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
        EOFError,
        zipfile.BadZipFile,
        struct.error,
    ) as error:
        raise InputError(f"cannot be read: {error}") from error
    fields = value if type(value) is dict else {}
    ids, labels = fields.get("token"), fields.get("label")
    if type(ids) is not list or type(labels) is not list or not ids:
        raise InputError("holds no lists of tokens and labels")
    if not all(type(n) is int and IGNORE <= n <= LARGEST_ID for n in (*ids, *labels)):
        raise InputError(f"a token or label is no whole number from {IGNORE} to {LARGEST_ID}")
    if record.length not in (None, len(ids)) or record.id not in (None, fields.get("id", record.id)):
        raise InputError(
            f"holds {len(ids)} tokens, its record says {record.length}: another picture of the same name has overwritten it"
            if record.length not in (None, len(ids))
            else "holds the features of another id than its record"
        )
    return ids, labels


def _zipped(data: bytes) -> bytes:
    """The bytes of the pickle in a torch file, whose members are not compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = [m for m in archive.infolist() if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
        if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size > len(data):
            raise zipfile.BadZipFile("no torch file: expected one data.pkl, not compressed")
        return archive.read(found[0])


def parse(ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], np.ndarray]:
    """The text ids and codes[h w] from which `FeatureSet` makes exactly these ids and labels. Raises InputError if there are none."""
    own = tokenizer.ids
    if len(ids) != len(labels):
        raise InputError(f"{len(ids)} tokens and {len(labels)} labels")
    begin = next((i for i, token in enumerate(ids) if token == own.start), 0)
    if not begin or ids[0] != tokenizer.bos or ids[begin - 1] != own.sep or ids[-1] != own.sep or min(ids[:begin]) < 0:
        raise InputError(
            f"expected {tokenizer.bos} (bos), a prompt, {own.sep} (sep), a picture that begins with {own.start} and {own.sep}: "
            "another model's, or with its caption dropped"
        )
    if any(label != IGNORE for label in labels[:begin]) or list(labels[begin:]) != list(ids[begin:]):
        raise InputError("its labels are not those of a prompt that is given and a picture that is predicted")
    try:
        codes = np.array(image_codes(ids[begin:-1], own), np.uint16)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not {side // CODES_PER_PATCH for side in codes.shape} <= tokenizer.sizes:
        raise InputError(f"a picture of {codes.shape} codes has no size token in this tokenizer")
    return list(ids[:begin]), codes
