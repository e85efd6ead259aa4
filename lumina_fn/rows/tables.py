"""Lists of rows as CSV, as spreadsheets and pandas write it: the first line names the columns; 8 bytes a row are in memory."""

import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina_fn.errors import InputError
from lumina_fn.rows import lists, text
from lumina_fn.rows.row import LISTED, Keys, Stored, Unread
from lumina_fn.rows.text import Text

ENDINGS = (".csv", ".tsv")
EXPECTED = "a table of file and prompt as CSV, with the columns' names in its first line"
_DELIMITERS = ",;\t"


def opened(path: Path, encoding: str | None = None, keys: Keys = Keys()) -> Stored:  # noqa: B008 (it is immutable)
    """The rows of a table; values are separated by commas, semicolons or tabs. Raises InputError for a file that is no table.

    A row with more or fewer values than the table has columns is one `Unread` row.
    """
    whole = text.opened(path, EXPECTED, encoding)
    head = text.decoded(next((line for _, line in text.lines(whole)), b""))
    delimiter = max(_DELIMITERS, key=head.count)
    columns, begins = _records(whole, delimiter)
    if not columns:
        raise InputError(f"{path}: the file is empty; expected {EXPECTED}")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: two columns have one name: {', '.join(columns):.200}; expected {EXPECTED}")
    count = len(begins) - 1
    if count == 0:
        raise InputError(f"{path}: the dataset is empty; expected rows below {', '.join(columns[:LISTED]):.200}")

    def values(part: range, pictures: bool = False) -> Iterator[tuple[Any, None]]:
        for i in part:
            yield _value(text.decoded(whole.read(begins[i], begins[i + 1])), columns, delimiter), None

    return Stored("CSV", count, values, lists.captions_from(values, count, keys), keys, (path.parent,))


def _value(record: str, columns: list[str], delimiter: str) -> Any:
    if bad := text.fault(record):
        return Unread(bad)
    try:
        found = next(csv.reader(io.StringIO(record, ""), delimiter=delimiter))
    except csv.Error as error:
        return Unread(f"the row is not CSV: {error}")
    if len(found) != len(columns):
        return Unread(f"{len(found)} values in a row; the table has {len(columns)} columns (are all quotes closed?)")
    return dict(zip(columns, found, strict=True))


def _records(whole: Text, delimiter: str) -> tuple[list[str], array]:
    """The first record, and where those after it begin that are not blank, and the end. A value in quotes may have line breaks in it."""
    behind, number = whole.begin, 0

    def read_lines() -> Iterator[str]:
        nonlocal behind, number
        for number, (begin, line) in enumerate(text.lines(whole), 1):  # noqa: B007 (the last one is told)
            behind = begin + len(line)
            yield text.decoded(line)

    columns: list[str] = []
    begins = array("q")
    records = csv.reader(read_lines(), delimiter=delimiter)
    try:
        while True:
            begin = behind  # a reader takes no line before it needs it
            record = [value.strip() for value in next(records)]
            if not any(record):
                continue
            if columns:
                begins.append(begin)
            else:
                columns = record
    except StopIteration:
        begins.append(whole.end)
    except csv.Error as error:
        raise InputError(
            f"{whole.path}: line {number}: {error} (is a quote not closed?); expected {EXPECTED}"
        ) from error
    return columns, begins
