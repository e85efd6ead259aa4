"""Open files that a user or another program wrote: regular files of bounded size; anything else is an InputError of one line.

Pipes and devices are refused without waiting, a sparse terabyte is refused by its size, and text is UTF-8.
"""

import codecs
import io
import json
import os
import stat
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from lumina_fn.errors import InputError, printable

MAX_JSON = 64 << 20  # bytes of a JSON file, ours or of a model's folder
MAX_TEXT = 256 << 20  # bytes of a text: prompts, rows, a manifest's lines
MAX_LINE = 16 << 20  # bytes of a line of JSONL

T = TypeVar("T")


def descriptor(path: Path, folder: int | None = None, *, follow: bool = True) -> int:
    """A read-only descriptor of a regular file; `path` is relative to the descriptor `folder` if that is given.

    Raises OSError as `os.open` does, and InputError for anything but a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags, dir_fd=folder)
    except ValueError as error:  # a NUL in its name
        raise InputError(printable(f"{path}: not a usable path: {error}")) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(printable(f"{path}: not a regular file"))
    return fd


def opened(path: Path, expected: str = "a file that can be read") -> io.BufferedReader:
    """The file, open for reading in binary. Raises InputError, which says what was expected."""
    try:
        return os.fdopen(descriptor(path), "rb")
    except OSError as error:
        raise InputError(printable(f"{path}: {error.strerror}; expected {expected}")) from error
    except InputError as error:
        raise InputError(f"{error}; expected {expected}") from error


def contents(path: Path, limit: int, expected: str = "a file that can be read") -> bytes:
    """All bytes of a file of at most `limit` bytes. Raises InputError."""
    with opened(path, expected) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            # Reading up to `limit` would allocate that many bytes.
            data = file.read(size + 1) if size <= limit else b""
            if len(data) > size:  # it has grown meanwhile
                data += file.read(limit - size)
        except OSError as error:
            raise InputError(printable(f"{path}: {error.strerror}; expected {expected}")) from error
    if max(size, len(data)) > limit:
        raise InputError(printable(f"{path}: {max(size, len(data))} bytes, more than {limit}; expected {expected}"))
    return data


def text(path: Path, limit: int = MAX_TEXT, expected: str = "a text file") -> str:
    """A text in UTF-8, without a byte order mark. Raises InputError, which names the first line that is not UTF-8."""
    return decoded(contents(path, limit, expected), path, expected)


def decoded(data: bytes, path: Path, expected: str = "a text file") -> str:
    """The text of these bytes of the file `path`. Raises InputError as `text` does."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            printable(
                f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); expected {expected}, save it as UTF-8"
            )
        ) from error


def json_object(path: Path, expected: str = "a JSON object", limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object written by another program, with any content. Raises InputError for anything else."""
    data = contents(path, limit, expected)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(
            printable(
                f"{path} is not JSON ({error}): it is truncated, damaged or a Git LFS pointer, download the file itself; expected {expected}"
            )
        ) from error
    if not isinstance(value, dict):
        raise InputError(printable(f"{path} is not a JSON object but a {type(value).__name__}; expected {expected}"))
    return value


def json_of(kind: type[T], path: Path, expected: str, limit: int = MAX_JSON) -> T:
    """A JSON file of ours as a value of `kind`, with fields, types and ranges checked. Raises InputError, which names the field."""
    return parsed(kind, contents(path, limit, expected), path, expected)


def parsed(kind: type[T], data: bytes | str, path: Path, expected: str) -> T:
    """JSON text of the file `path` as a value of `kind`. Raises InputError as `json_of` does."""
    try:
        # Not msgspec's own parser: a file's name may contain a lone surrogate, which is not UTF-8.
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(printable(f"{path} is damaged ({error}); expected {expected}")) from error
    return checked(kind, value, path, expected)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def checked(kind: Any, value: Any, where: Path | str, expected: str) -> Any:
    """A parsed JSON value as a value of `kind`. Raises InputError as `json_of` does."""
    try:
        return msgspec.convert(value, kind)
    except (ValueError, RecursionError) as error:  # a lone surrogate raises ValueError, not ValidationError
        raise InputError(printable(f"{where} is damaged ({error}); expected {expected}")) from error


def lines(path: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of any length, numbered from 1, without line ends. Raises InputError for a line longer than MAX_LINE."""
    with opened(path, expected) as file:
        for number in count(1):
            try:
                line = file.readline(MAX_LINE + 1)
            except OSError as error:
                raise InputError(printable(f"{path}: {error.strerror}; expected {expected}")) from error
            if not line:
                return
            if len(line) > MAX_LINE:
                raise InputError(printable(f"{path}, line {number}: longer than {MAX_LINE} bytes; expected {expected}"))
            yield number, line.rstrip(b"\r\n")
