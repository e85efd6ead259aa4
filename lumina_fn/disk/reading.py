"""Open a file that a user or another program may have put there: a regular file of bounded size, or an InputError of one line.

A pipe is not waited for, a device is not read, a sparse terabyte is refused by its size, and text is UTF-8.
"""

import codecs
import json
import os
import stat
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import msgspec

from lumina_fn.errors import InputError, printable

MAX_JSON = 64 << 20  # bytes of a JSON file of ours, or of a model's folder
MAX_TEXT = 256 << 20  # bytes of a text: prompts, rows, a manifest's lines
MAX_LINE = 16 << 20  # bytes of a line of JSONL

T = TypeVar("T")


def descriptor(path: Path, folder: int | None = None, *, follow: bool = True) -> int:
    """A descriptor of a regular file, read-only; of the name `path` in the folder of that descriptor, where one is given.

    Raises OSError, as `os.open` does; InputError for what is no regular file.
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


def opened(path: Path, expected: str = "a file that can be read") -> BinaryIO:
    """The file, open for reading. Raises InputError, which says what was expected there."""
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
            data = (
                file.read(size + 1) if size <= limit else b""
            )  # which takes that much memory at once, as a limit would
            if len(data) > size:  # it grew since
                data += file.read(limit - size)
        except OSError as error:
            raise InputError(printable(f"{path}: {error.strerror}; expected {expected}")) from error
    if max(size, len(data)) > limit:
        raise InputError(printable(f"{path}: {max(size, len(data))} bytes, more than {limit}; expected {expected}"))
    return data


def text(path: Path, limit: int = MAX_TEXT, expected: str = "a text file") -> str:
    """A text in UTF-8, without the mark that Windows puts before it. Raises InputError, which names the line that is not UTF-8."""
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
    """A JSON object that another program wrote, whatever is in it. Raises InputError for anything else."""
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
    """A JSON file of ours as a value of `kind`: all its fields, their types and ranges. Raises InputError, which names the field."""
    return parsed(kind, contents(path, limit, expected), path, expected)


def parsed(kind: type[T], data: bytes | str, path: Path, expected: str) -> T:
    """JSON text of the file `path` as a value of `kind`. Raises InputError as `json_of` does."""
    try:
        # Not msgspec's own parser: a file's name may hold half of a surrogate pair, which is no UTF-8.
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(printable(f"{path} is damaged ({error}); expected {expected}")) from error
    return checked(kind, value, path, expected)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def checked(kind: Any, value: Any, where: Path | str, expected: str) -> Any:
    """A value that was parsed already, as one of `kind`. Raises InputError as `json_of` does."""
    try:
        return msgspec.convert(value, kind)
    except (ValueError, RecursionError) as error:  # half of a surrogate pair is no ValidationError
        raise InputError(printable(f"{where} is damaged ({error}); expected {expected}")) from error


def lines(path: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of any length, numbered from 1, without their ends; a line too long to be one is an InputError."""
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
