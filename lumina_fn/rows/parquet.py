"""Parquet files with pictures in them, as Hugging Face's datasets are stored: read a few rows at a time, never unpacked."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.picture_files import Source
from lumina_fn.rows.row import FILE_KEYS, LISTED, PROMPT_KEYS, How, Stored, Unread, chained

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

EXPECTED = "a Parquet file with a column of pictures and a column of captions"
FORM = "Parquet"
AT_ONCE = 16  # rows that are decoded at once
_OTHER_FILES = ("jpg", "jpeg", "png", "webp")  # columns that hold pictures, where no other does
MAX_PART = 16 << 30  # bytes of a row group, not compressed


def opened(paths: Sequence[Path], how: How) -> Stored:
    """The rows of some Parquet files; a row's file is `file.parquet#number`, unless the column of pictures holds names of files.

    Pictures are bytes, or {bytes, path} as Hugging Face writes them. A row group that cannot be read is as many `Unread` rows.
    Raises InputError without pyarrow, and for a file that is not Parquet or has no such columns.
    """
    top = Path(os.path.commonpath([path.parent for path in paths]))
    return chained(FORM, [_one(path, str(path.relative_to(top)), how) for path in paths])._replace(roots=(top,))


def _one(path: Path, name: str, how: How) -> Stored:
    types, ends = _about(path)
    pictures = [name for name in (*FILE_KEYS, *_OTHER_FILES, *types) if _is_picture(name, types)]
    picture = _column(path, "file", how.keys.file, pictures, types)
    captions = [name for name in (*PROMPT_KEYS, "txt") if _is_text(types.get(name))]
    caption = _column(path, "prompt", how.keys.prompt, captions, types)
    columns = [caption, *([picture] if _is_text(types[picture]) else [])]

    def values(part: range, pictures: bool) -> Iterator[tuple[Any, Source | None]]:
        wanted = list(dict.fromkeys([caption, picture])) if pictures else columns
        for group in range(int(np.searchsorted(ends, part.start, "right")), len(ends)):
            begin = int(ends[group - 1]) if group else 0
            own = range(max(begin, part.start), min(int(ends[group]), part.stop))
            if not own:
                return
            number = own.start
            try:
                for found in _group(path, group, range(own.start - begin, own.stop - begin), wanted):
                    yield _value(f"{name}#{number}", found.get(picture), found[caption])
                    number += 1
            except Exception as error:  # pyarrow's, and OSError, UnicodeError and others where a file is damaged
                for missing in range(number, own.stop):
                    yield Unread(f"row group {group} cannot be read: {error}", f"{name}#{missing}"), None

    return Stored(FORM, int(ends[-1]), values, f"`{caption}`")


def _value(name: str, picture: Any, caption: Any) -> tuple[Any, Source | None]:
    """A row: a picture as bytes, as {bytes, path}, as a file's name, or not read."""
    content = picture.get("bytes") if isinstance(picture, dict) else picture
    file = picture.get("path") if isinstance(picture, dict) and content is None else picture
    if isinstance(content, bytes):
        return {"file": name, "prompt": caption}, content
    return {"file": file if isinstance(file, str) else name, "prompt": caption}, None


def _about(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The columns' types by their names, and the number of rows up to the end of each row group. Raises InputError."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(f"{path}: to read Parquet: pip install 'lumina-fn[data]'") from error
    try:
        with _opened(path) as file:
            about = file.metadata
            counts = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
            types = {field.name: field.type for field in file.schema_arrow}
    except InputError:
        raise
    except Exception as error:  # pyarrow's, and OSError, UnicodeError and others
        raise InputError(f"{path}: not Parquet, or damaged: {error}; expected {EXPECTED}") from error
    size = path.stat().st_size
    if min(counts, default=0) < 0 or sum(counts) > size:
        raise InputError(
            f"{path}: it says that it has {sum(counts)} rows in {size} bytes: it is damaged; expected {EXPECTED}"
        )
    if sum(counts) == 0:
        raise InputError(f"{path}: the file has no rows; expected {EXPECTED}")
    return types, np.cumsum(counts, dtype=np.int64)


@contextmanager
def _opened(path: Path) -> Iterator["ParquetFile"]:
    from pyarrow.parquet import ParquetFile

    # Without a thread pool and without reading ahead, a few pages are in memory.
    with reading.opened(path, EXPECTED) as raw, ParquetFile(raw, buffer_size=1 << 20) as file:
        yield file


def _group(path: Path, group: int, part: range, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some rows of a row group, by their columns. Raises InputError, and pyarrow's errors."""
    with _opened(path) as file:
        # Not of each column: pyarrow's reader of a column's footer ends the process where that is damaged.
        if not 0 <= (size := file.metadata.row_group(group).total_byte_size) <= MAX_PART:
            raise InputError(f"{size} bytes in one row group: expected at most {MAX_PART}")
        at = 0
        for batch in file.iter_batches(AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            for i in range(max(part.start - at, 0), min(part.stop - at, batch.num_rows)):
                yield {name: batch.column(name)[i].as_py() for name in columns}
            at += batch.num_rows
            if at >= part.stop:
                return
        raise InputError(f"it has {at} rows, fewer than it says")


def _column(path: Path, kind: str, asked: str | None, known: list[str], types: dict[str, Any]) -> str:
    """The column of the pictures or of the captions. Raises InputError."""
    if asked in types and (_is_picture(asked, types) if kind == "file" else _is_text(types[asked])):
        return asked
    if asked is None and known:
        return known[0]
    has = ", ".join(f"{name} ({type_})" for name, type_ in list(types.items())[:LISTED])
    raise InputError(
        f"{path}: no {kind}: expected a column {asked or 'that is known'}; it has {has:.300} (--{kind}-key names another)"
    )


def _is_text(kind: Any) -> bool:
    """Whether a column holds a text, or a list of texts."""
    from pyarrow import types

    if kind is not None and (types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind)):
        kind = kind.value_type
    return kind is not None and (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_picture(name: str, columns: dict[str, Any]) -> bool:
    """Whether a column holds pictures: bytes, {bytes, path}; or their files' names, if it is called so."""
    from pyarrow import types

    kind = columns.get(name)
    if kind is None:
        return False
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or (name in FILE_KEYS and _is_text(kind))
