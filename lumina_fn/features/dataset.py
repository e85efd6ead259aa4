"""The user's dataset: a list of {"file", "prompt"} rows, and the files those rows may name."""

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from lumina_fn.disk import reading
from lumina_fn.errors import InputError

# A string, or a comma before a closing bracket: commas within strings are skipped. An unclosed string matches up to the end, and
# there is no backtracking: the time of the search is linear in the text.
_TRAILING_COMMA = re.compile(r'"(?:[^"\\]++|\\.)*+"?|,(?=\s*+[\]}])', re.DOTALL)
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that was not UTF-8
EXPECTED = "a list of file and prompt as JSON or JSONL"
MAX_LIST = 1 << 30  # bytes of a JSON list: ten million rows
FILE_KEYS = ("file", "image", "image_path", "file_name", "path")  # what tools call it, the first that a row has
PROMPT_KEYS = ("prompt", "caption", "text")
LISTED = 5  # names in a message
DEPTH = 100  # nesting of a row's content: far below Python's own recursion limit


class Keys(NamedTuple):
    """The keys of a row's file and prompt; None: the first of FILE_KEYS and PROMPT_KEYS that it has."""

    file: str | None = None
    prompt: str | None = None


class Row(NamedTuple):
    """A row of the user's list: a picture's file and its caption."""

    file: str  # as written in the list
    prompt: str


class NotJson(NamedTuple):
    """A line of a JSONL file that could not be read."""

    reason: str


def read_rows(path: Path, encoding: str | None = None) -> list[Any]:
    """The rows of a JSON list or of JSONL, trailing commas allowed; `row` checks their content.

    The text is UTF-8, or UTF-16 with its mark, or of `encoding`. Raises InputError for a file that is neither list nor lines. A bad line of
    JSONL becomes a `NotJson`, and so does a row with bytes that are not of the encoding. A list is read whole and has at most
    MAX_LIST bytes; JSONL may be longer.
    """
    with reading.opened(path, EXPECTED) as file:
        size, begins = os.fstat(file.fileno()).st_size, file.read(4096)
    if size > MAX_LIST and begins.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        rows: Any = [_line(_text(line, path, encoding)) for _, line in reading.lines(path, EXPECTED) if line.strip()]
    else:
        data = reading.contents(path, MAX_LIST, EXPECTED + ", one row a line where it is long")
        rows = _parsed(_text(data, path, encoding), path)
    rows = [rows] if isinstance(rows, dict) else rows  # JSONL of one line
    if not isinstance(rows, list):
        raise InputError(f'{path}: expected a list of {{"file": ..., "prompt": ...}}, found {type(rows).__name__}')
    if not rows:
        raise InputError(f'{path}: the dataset is empty; expected rows of {{"file": ..., "prompt": ...}}')
    return [NotJson("brackets are nested too deeply") if _deeper(value, DEPTH) else value for value in rows]


def _text(data: bytes, path: Path, encoding: str | None) -> str:
    """The text; a byte that is not of its encoding becomes a lone surrogate, which `_line` finds."""
    if encoding is None:
        marks = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
        mark, encoding = next(((mark, name) for mark, name in marks if data.startswith(mark)), (b"", "utf-8"))
        data = data.removeprefix(mark)
    try:
        return data.decode(encoding, "surrogateescape")
    except (UnicodeError, LookupError) as error:
        raise InputError(f"{path}: not {encoding}: {error}; expected {EXPECTED}") from error


def _parsed(text: str, path: Path) -> Any:
    if not text.strip():
        raise InputError(f'{path}: the file is empty; expected rows of {{"file": ..., "prompt": ...}}')
    whole = _UNDECODED.search(text) is None
    try:
        rows = _loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise InputError(f"{path}: neither JSON nor JSONL: {error}") from error
        return [_line(line) for line in text.split("\n") if line.strip()]
    # A string of JSON may say \udc92 itself, for a file's name: it is looked for only where the text has such a byte.
    return (
        rows
        if whole or not isinstance(rows, list)
        else [_undecoded(json.dumps(value, ensure_ascii=False)) or value for value in rows]
    )


def _undecoded(text: str) -> NotJson | None:
    """Why a row with a byte of another encoding is not read; None if it has none."""
    if (bad := _UNDECODED.search(text)) is None:
        return None
    return NotJson(
        f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not of the text's encoding: save the list as UTF-8, or name its encoding, as in --encoding cp1252"
    )


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
    if bad := _undecoded(text):
        return bad
    try:
        return _loads(text.strip().removesuffix(","))
    except (ValueError, RecursionError) as error:
        return NotJson(f"the line is not JSON: {error}")


def row(value: Any, keys: Keys = Keys()) -> Row:  # noqa: B008 (it is immutable)
    """The file and the prompt of a row. Raises InputError if one is missing."""
    if isinstance(value, NotJson):
        raise InputError(value.reason)
    if not isinstance(value, dict):
        raise InputError(f'expected {{"file": ..., "prompt": ...}}, found {type(value).__name__}')
    texts = []
    for kind, key, known in (("file", keys.file, FILE_KEYS), ("prompt", keys.prompt, PROMPT_KEYS)):
        name = key or next((name for name in known if name in value), None)
        if name is None or name not in value:
            wanted = key or ", ".join(known)
            has = ", ".join(map(repr, list(value)[:LISTED])) or "none"
            raise InputError(f"no {kind}: expected a key {wanted}; the row has {has:.200} (--{kind}-key names another)")
        text = value[name]
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"no {kind}: expected some text, found {text!r:.80}")
        texts.append(text)
    return Row(*texts)


def written(value: Any, keys: Keys = Keys()) -> tuple[Any, Any]:  # noqa: B008
    """What a row of any type has for its file and its prompt, checked by nothing; None where it has nothing."""
    if not isinstance(value, dict):
        return None, None
    either = lambda key, known: value.get(key) if key else next((value[name] for name in known if name in value), None)
    return either(keys.file, FILE_KEYS), either(keys.prompt, PROMPT_KEYS)


def file_of(value: Any, keys: Keys = Keys()) -> str | None:  # noqa: B008
    """The file that a row names, even if the row has other faults; None if it names none."""
    file, _ = written(value, keys)
    return file if isinstance(file, str) and "\0" not in file else None
