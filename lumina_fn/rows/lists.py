"""Lists of rows as JSON and JSONL, of any length: only where each row begins is in memory, 8 bytes a row."""

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.rows import text
from lumina_fn.rows.row import Keys, Stored, Unread, Values, keys_of
from lumina_fn.rows.text import CHUNK, Text

EXPECTED = "a list of file and prompt as JSON or JSONL"
DEPTH = 100  # nesting of a row's content: far below Python's own recursion limit
DEEPEST = 10 * DEPTH  # nesting at which a list is refused; a row that is nested less deep is refused alone
LARGEST_ROW = 1 << 27  # bytes; a longer one is not read
PEEKED = 100  # rows that are looked at to say which keys are read
_ROWS = 'expected rows of {"file": ..., "prompt": ...}'
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
# What stands between an element's brackets, with brackets in it up to three deep; deeper ones are counted, which takes ten times as
# long. Possessive: the time is linear in the text.
_PLAIN = rb'[^"{}\[\]]++|' + _STRING
_INSIDE = rb"(?:%b|[\[{](?:%b|[\[{](?:%b|[\[{](?:%b)*+[\]}])*+[\]}])*+[\]}])*+" % (4 * (_PLAIN,))
_ELEMENT = re.compile(rb"\s*+(?:[\[{]" + _INSIDE + rb"[\]}]|" + _STRING + rb'|[^\s,"{}\[\]]++)\s*+[,\]]', re.DOTALL)
_BRACKETS = re.compile(_STRING + rb"?|[\[{]++|[\]}]++", re.DOTALL)  # an unclosed string goes up to the end
_AFTER = re.compile(rb"\s*+([,\]])")
_CLOSED = re.compile(rb"\s*+\]")
# A string, or a comma before a closing bracket: commas within strings are skipped. An unclosed string matches up to the end.
_TRAILING_COMMA = re.compile(r'"(?:[^"\\]++|\\.)*+"?|,(?=\s*+[\]}])', re.DOTALL)


def opened(path: Path, encoding: str | None = None, keys: Keys = Keys()) -> Stored:  # noqa: B008 (it is immutable)
    """The rows of a JSON list or of JSONL, trailing commas allowed. Raises InputError for a file that is neither.

    A bad line of JSONL is one `Unread` row, and so is a row with bytes that are not of the text's encoding.
    """
    whole = text.opened(path, EXPECTED, encoding)
    first, at = _first(whole)
    if not first:
        raise InputError(f"{path}: the file is empty; {_ROWS}")
    form = "JSONL"
    if first == b"[":
        form, begins = "JSON list", _elements(whole, at + 1)
    elif first == b"{":
        begins = _lines(whole)
        if (
            len(begins) > 2
            and isinstance(parsed(text.decoded(whole.read(begins[0], begins[1]))), Unread)
            and _is_one(whole)
        ):
            begins = array("q", (whole.begin, whole.end))
    else:
        begins_with = whole.read(whole.begin, min(whole.end, whole.begin + CHUNK))
        if problem := _not_json(begins_with):
            raise InputError(f"{path}: neither JSON nor JSONL: {problem}")
        found = parsed(text.decoded(begins_with))
        raise InputError(f'{path}: expected a list of {{"file": ..., "prompt": ...}}, found {type(found).__name__}')
    count = len(begins) - 1
    if count == 0:
        raise InputError(f"{path}: the dataset is empty; {_ROWS}")

    def values(part: range, pictures: bool = False) -> Iterator[tuple[Any, None]]:
        for i in part:
            yield _value(whole, begins[i], begins[i + 1]), None

    return Stored(form, count, values, captions_from(values, count, keys), keys, (path.parent,))


def captions_from(values: Values, count: int, keys: Keys) -> str:
    """The keys of the captions of the first PEEKED rows."""
    found = {keys_of(value, keys).prompt: None for value, _ in values(range(min(count, PEEKED)), False)}
    return " and ".join(f"`{name}`" for name in found if name is not None) or "nowhere"


def _first(whole: Text) -> tuple[bytes, int]:
    """The first byte that is no space, and its place."""
    for begin in range(whole.begin, whole.end, CHUNK):
        part = whole.read(begin, min(begin + CHUNK, whole.end))
        if rest := part.lstrip():
            return rest[:1], begin + len(part) - len(rest)
    return b"", whole.end


def _lines(whole: Text) -> array:
    """Where the lines begin that are not blank, and the end."""
    begins, at, blank = array("q"), whole.begin, True
    while at < whole.end:
        part = whole.read(at, min(at + CHUNK, whole.end))
        if not part:
            raise InputError(f"{whole.path}: it became shorter while it was read")
        start = 0
        while start < len(part):
            stop = part.find(b"\n", start) + 1 or len(part)
            # A line may go on from the part before: it has begun once it is not blank.
            if blank and not part[start:stop].isspace():
                begins.append(at + start)
                blank = False
            blank = blank or part[stop - 1] == 10
            start = stop
        at += len(part)
    begins.append(whole.end)
    return begins


def _is_one(whole: Text) -> bool:
    """Whether a text of many lines is one row."""
    return whole.end - whole.begin <= reading.MAX_LINE and isinstance(
        parsed(text.decoded(whole.read(whole.begin, whole.end))), dict
    )


def _elements(whole: Text, at: int) -> array:
    """Where the elements of a list begin whose bracket is before `at`, and its end. Raises InputError for anything but a list."""
    begins, size = array("q"), CHUNK
    while True:
        # What the window holds of an element that goes on is read again, in a window of twice the size.
        window, start = whole.read(at, min(at + size, whole.end)), 0
        while (closed := _CLOSED.match(window, start)) is None and (stop := _element_end(whole, at, window, start)):
            _check_element(whole, at, window[start : stop - 1], start)
            begins.append(at + start)
            start = stop - (window[stop - 1 : stop] == b"]")
        if closed:
            begins.append(at + closed.end() - 1)
            if _first(whole._replace(begin=at + closed.end()))[0]:
                raise _no_list(whole, at + closed.end(), "extra data")
            return begins
        if at + len(window) >= whole.end or size > LARGEST_ROW:
            raise _no_list(whole, at + start, _not_json(b"[" + window[start:]) or "the list goes on after its end")
        size = CHUNK if start else 2 * size
        at += start


def _check_element(whole: Text, at: int, element: bytes, start: int) -> None:
    if problem := _not_json(element):
        raise _no_list(whole, at + start + len(element) - len(element.lstrip()), problem)


def _not_json(data: bytes) -> str | None:
    """Why some bytes are not JSON, whatever the encoding of what they say."""
    try:
        _loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        return getattr(error, "msg", str(error))
    return None


def _element_end(whole: Text, at: int, window: bytes, start: int) -> int | None:
    """The place behind the comma or bracket that follows an element; None if the window, which begins at `at`, ends before it."""
    if found := _ELEMENT.match(window, start):
        return found.end()
    depth = 0
    for token in _BRACKETS.finditer(window, start):
        run = len(token[0])
        if token[0][:1] in b"[{":
            depth += run
        elif token[0][:1] in b"]}":
            if run >= depth:
                after = _AFTER.match(window, token.start() + depth)
                return after.end() if after and depth else None
            depth -= run
        if depth > DEEPEST:
            raise _no_list(whole, at + start, "brackets are nested too deeply")
    return None


def _no_list(whole: Text, at: int, why: str) -> InputError:
    line = 1 + sum(whole.read(begin, min(begin + CHUNK, at)).count(b"\n") for begin in range(whole.begin, at, CHUNK))
    return InputError(f"{whole.path}: neither JSON nor JSONL: near line {line}: {why}")


def _value(whole: Text, begin: int, end: int) -> Any:
    if end - begin > LARGEST_ROW:
        return Unread(f"the row is longer than {LARGEST_ROW} bytes")
    return parsed(text.decoded(whole.read(begin, end)))


def parsed(read: str) -> Any:
    """The JSON value in a text, with what separates it from the next; an `Unread` for anything else."""
    if bad := text.fault(read):
        return Unread(bad)
    try:
        value = _loads(read.strip().removesuffix(","))
    except (ValueError, RecursionError) as error:
        return Unread(f"the line is not JSON: {error}")
    return Unread("brackets are nested too deeply") if _deeper(value, DEPTH) else value


def _loads(read: str) -> Any:
    try:
        return json.loads(read)
    except ValueError:
        # Replace the comma by a space: other errors keep their line and column.
        return json.loads(_TRAILING_COMMA.sub(lambda m: " " if m[0] == "," else m[0], read))


def _deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(isinstance(v, dict | list) and _deeper(v, depth - 1) for v in inner)
