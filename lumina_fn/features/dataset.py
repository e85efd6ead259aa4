"""The user's dataset: a list of {"file", "prompt"} rows, and the files those rows may name."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lumina_fn.disk import reading
from lumina_fn.errors import InputError

# A string, or a comma before a closing bracket: commas within strings are skipped. An unclosed string matches up to the end, and
# there is no backtracking: the time of the search is linear in the text.
_TRAILING_COMMA = re.compile(r'"(?:[^"\\]++|\\.)*+"?|,(?=\s*+[\]}])', re.DOTALL)
EXPECTED = "a list of file and prompt as JSON or JSONL"
MAX_LIST = 1 << 30  # bytes of a JSON list: ten million rows
DEPTH = 100  # nesting of a row's content: far below Python's own recursion limit


class Row(NamedTuple):
    """A row of the user's list: a picture's file and its caption."""

    file: str  # as written in the list
    prompt: str


class NotJson(NamedTuple):
    """A line of a JSONL file that could not be read."""

    reason: str


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of JSONL, trailing commas allowed; `row` checks their content.

    Raises InputError for a file that is neither. A bad line of JSONL becomes a `NotJson`. A list is read whole and has at most
    MAX_LIST bytes; JSONL may be longer.
    """
    with reading.opened(path, EXPECTED) as file:
        size, begins = os.fstat(file.fileno()).st_size, file.read(4096)
    if size > MAX_LIST and begins.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        rows: Any = [
            _line(reading.decoded(line, path, EXPECTED)) for _, line in reading.lines(path, EXPECTED) if line.strip()
        ]
    else:
        rows = _parsed(reading.text(path, MAX_LIST, EXPECTED + ", one row a line where it is long"), path)
    rows = [rows] if isinstance(rows, dict) else rows  # JSONL of one line
    if not isinstance(rows, list):
        raise InputError(f'{path}: expected a list of {{"file": ..., "prompt": ...}}, found {type(rows).__name__}')
    if not rows:
        raise InputError(f'{path}: the dataset is empty; expected rows of {{"file": ..., "prompt": ...}}')
    return [NotJson("brackets are nested too deeply") if _deeper(value, DEPTH) else value for value in rows]


def _parsed(text: str, path: Path) -> Any:
    if not text.strip():
        raise InputError(f'{path}: the file is empty; expected rows of {{"file": ..., "prompt": ...}}')
    try:
        return _loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise InputError(f"{path}: neither JSON nor JSONL: {error}") from error
        return [_line(line) for line in text.split("\n") if line.strip()]


def _deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(isinstance(v, dict | list) and _deeper(v, depth - 1) for v in inner)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        # Replace the comma by a space: other errors keep their line and column.
        return json.loads(_TRAILING_COMMA.sub(lambda m: " " if m[0] == "," else m[0], text))


def _line(text: str) -> Any:
    try:
        return _loads(text.strip().removesuffix(","))
    except (ValueError, RecursionError) as error:
        return NotJson(f"the line is not JSON: {error}")


def row(value: Any) -> Row:
    """The file and the prompt of a row. Raises InputError if one is missing."""
    if isinstance(value, NotJson):
        raise InputError(value.reason)
    if not isinstance(value, dict):
        raise InputError(f'expected {{"file": ..., "prompt": ...}}, found {type(value).__name__}')
    for key in ("file", "prompt"):
        text = value.get(key)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"no {key}: expected some text, found {text!r:.80}")
    return Row(value["file"], value["prompt"])


def file_of(value: Any) -> str | None:
    """The file that a row names, even if the row has other faults; None if it names none."""
    file = value.get("file") if isinstance(value, dict) else None
    return file if isinstance(file, str) and "\0" not in file else None


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
    raise InputError(f"no such file under {' or '.join(map(str, roots))}")
