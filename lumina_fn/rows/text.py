"""The text of a list or of a caption: of any length, in UTF-8, in UTF-16 with its mark, or in an encoding that the user names."""

import codecs
import os
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lumina_fn.disk import reading
from lumina_fn.errors import InputError

CHUNK = 1 << 20  # bytes that are read at once
MAX_TEXT = 1 << 30  # bytes of a text in another encoding than UTF-8, which is held in memory
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that was not of its encoding
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


class Text(NamedTuple):
    """A text as bytes of UTF-8. Bytes that are not of its encoding are kept, and a row that has one is refused by `fault`."""

    path: Path
    begin: int  # where it begins, behind a mark
    end: int
    read: Callable[[int, int], bytes]  # the bytes from one place to another; safe in any thread


def opened(path: Path, expected: str, encoding: str | None = None) -> Text:
    """The text in a file. UTF-8 is read where it lies. Raises InputError."""
    file = reading.opened(path, expected)
    size, begins = os.fstat(file.fileno()).st_size, file.read(4)
    mark = next((mark for mark in _UTF16 if begins.startswith(mark)), b"")
    if encoding is None and not mark:
        begin = len(codecs.BOM_UTF8) if begins.startswith(codecs.BOM_UTF8) else 0

        def read(start: int, stop: int) -> bytes:
            try:
                return os.pread(file.fileno(), stop - start, start)
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; expected {expected}") from error

        weakref.finalize(read, file.close)
        return Text(path, begin, size, read)
    with file:
        data = _utf8(reading.contents(path, MAX_TEXT, expected), path, encoding or _UTF16[mark], expected)
    return Text(path, 0, len(data), lambda start, stop: data[start:stop])


def _utf8(data: bytes, path: Path, encoding: str, expected: str) -> bytes:
    try:
        decoded = data.decode(encoding, "surrogateescape")
        return decoded.removeprefix("\ufeff").encode("utf-8", "surrogateescape")
    except (UnicodeError, LookupError) as error:
        raise InputError(f"{path}: not {encoding}: {error}; expected {expected}") from error


def of(data: bytes, path: Path, expected: str, encoding: str | None = None) -> str:
    """The text of some bytes, which come from `path`. Raises InputError; `fault` finds bytes of another encoding."""
    if found := encoding or next((name for mark, name in _UTF16.items() if data.startswith(mark)), None):
        data = _utf8(data, path, found, expected)
    return decoded(data.removeprefix(codecs.BOM_UTF8))


def lines(text: Text) -> Iterator[tuple[int, bytes]]:
    """The lines with their ends, and where each begins. Raises InputError for a line longer than `reading.MAX_LINE`."""
    begin, rest = text.begin, b""
    for at in range(text.begin, text.end, CHUNK):
        *whole, rest = (rest + text.read(at, min(at + CHUNK, text.end))).split(b"\n")
        for line in whole:
            yield begin, line + b"\n"
            begin += len(line) + 1
        if len(rest) > reading.MAX_LINE:
            raise InputError(f"{text.path}: a line is longer than {reading.MAX_LINE} bytes")
    if rest:
        yield begin, rest


def decoded(data: bytes) -> str:
    """The text of some bytes of a `Text`; what is not UTF-8 becomes lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


def fault(text: str) -> str | None:
    """Why a decoded text is not read: it has a byte of another encoding."""
    if (bad := _UNDECODED.search(text)) is None:
        return None
    code = ord(bad[0]) - 0xDC00
    return f"byte 0x{code:02x} is not of the text's encoding: save it as UTF-8, or name its encoding, as in --encoding cp1252"
