"""WebDataset's tars: files of one sample stand together and share a name up to its first dot. Nothing is unpacked."""

import io
import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.picture_files import Span
from lumina_fn.rows import folders, lists, text
from lumina_fn.rows.row import How, Keys, Stored, Unread, chained, keys_of

EXPECTED = "a tar of pictures and captions"
FORM = "WebDataset tars"
LONGEST = 1 << 20  # bytes of a caption, of the JSON that has it, or of a member's header
_BEHIND = 1 << 20  # bytes behind a tar's end that are looked at


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    begin: int  # of its header
    data: int
    size: int
    wrong: str | None = None  # why it is not read

    def key(self) -> str:
        """The name of its sample: up to the first dot of the last part."""
        at = PurePosixPath(self.name)
        return str(at.with_name(at.name.partition(".")[0]))

    def field(self) -> str:
        """Which file of its sample it is: what follows that dot, in small letters."""
        return PurePosixPath(self.name).name.partition(".")[2].lower()


def opened(paths: Sequence[Path], how: How) -> Stored:
    """The samples of some tars as rows; a row's file is `shard.tar#key`, where the tar is named from their common folder.

    16 bytes a row are in memory. A sample without exactly one picture and a caption is an `Unread` row, and so are a link, a device, a
    path that leads outside, and what follows a damaged place.
    """
    top = Path(os.path.commonpath([path.parent for path in paths]))
    return chained(FORM, [_one(path, str(path.relative_to(top)), how) for path in paths])


def _one(path: Path, name: str, how: How) -> Stored:
    begins, key = array("q"), None
    for member in listed(path):
        if member.wrong is not None or member.key() != key:
            begins.append(member.begin)
            key = None if member.wrong is not None else member.key()
    if not begins:
        raise InputError(f"{path}: the tar is empty; expected {EXPECTED}")

    def values(part: range, pictures: bool) -> Iterator[tuple[Any, Span | None]]:
        if not part:
            return
        members = listed(path, begins[part.start])
        waiting = next(members, None)
        for i in part:
            sample, end = [], begins[i + 1] if i + 1 < len(begins) else None
            while waiting is not None and (end is None or waiting.begin < end):
                sample.append(waiting)
                waiting = next(members, None)
            yield _sample(path, name, sample, how)

    return Stored(FORM, len(begins), values, how.keys.prompt or "`.txt`, `.caption` or `.json`")


def _sample(path: Path, tar: str, members: Sequence[Member], how: How) -> tuple[Any, Span | None]:
    """The row of a sample, and its picture."""
    if not members:
        return Unread("the tar has changed since it was listed", tar), None
    if members[0].wrong is not None:
        return Unread(members[0].wrong, f"{tar}#{members[0].name}"), None
    file, fields = f"{tar}#{members[0].key()}", {member.field(): member for member in members}
    has = ", ".join(f".{field}" for field in fields)
    if len(fields) < len(members):
        return Unread(f"two files have one name: {', '.join(member.name for member in members):.200}", file), None
    asked = how.keys.file
    found = [
        field
        for field in fields
        if (field == asked.strip(".") if asked else folders.ending(f"x.{field}") in folders.PICTURES)
    ]
    if len(found) != 1:
        wanted = f"one .{asked.strip('.')}" if asked else "one picture"
        return Unread(f"{len(found)} pictures among {has}: expected {wanted} (--file-key names its ending)", file), None
    picture = fields[found[0]]
    try:
        caption = _caption(path, fields, how)
    except InputError as error:
        return Unread(str(error), file), None
    return {"file": file, "prompt": caption}, Span(path, picture.data, picture.size)


def _caption(path: Path, fields: Mapping[str, Member], how: How) -> Any:
    """What a sample has for its caption. Raises InputError."""
    asked = how.keys.prompt
    wanted = (asked.strip("."),) if asked else ("txt", "caption")
    if field := next((field for field in wanted if field in fields), None):
        found = _contents(path, fields[field], how.encoding).strip()
        if bad := text.fault(found):
            raise InputError(f"its caption: {bad}")
        return found
    if "json" in fields:
        value = lists.parsed(_contents(path, fields["json"], how.encoding))
        if isinstance(value, Unread):
            raise InputError(f"its .json: {value.reason}")
        key = keys_of(value, Keys(None, asked)).prompt
        if isinstance(value, dict) and key in value:
            return value[key]
    has = ", ".join(f".{field}" for field in fields)
    raise InputError(
        f"no caption among {has}: expected .txt, .caption or .json next to the picture in the tar (--prompt-key names its ending, or the key in .json)"
    )


def _contents(path: Path, member: Member, encoding: str | None) -> str:
    if member.size > LONGEST:
        raise InputError(f"{member.name}: {member.size} bytes, more than {LONGEST}")
    with reading.opened(path, EXPECTED) as file:
        return text.of(os.pread(file.fileno(), member.size, member.data), path, EXPECTED, encoding)


class _Headers:
    """A tar's file, of which `tarfile` reads no more at once than a header."""

    def __init__(self, file: io.BufferedReader):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def listed(path: Path, begin: int = 0) -> Iterator[Member]:
    """The files of a tar from the header at `begin`, in order. A damaged place is the last, with what is wrong there."""
    with reading.opened(path, EXPECTED) as file:
        file.seek(begin)
        at, end = begin, os.fstat(file.fileno()).st_size
        if end == 0:
            return
        try:
            with tarfile.TarFile(fileobj=_Headers(file)) as tar:  # pyright: ignore[reportArgumentType]
                while (found := tar.next()) is not None:
                    tar.members.clear()  # or all of them are kept  # pyright: ignore[reportAttributeAccessIssue]
                    at = tar.offset
                    if found.isreg() and found.offset_data + found.size > end:
                        wrong = f"the tar ends at byte {end}, before this file does: it is not complete"
                        yield Member(found.name, found.offset, found.offset_data, 0, wrong)
                        return
                    if (member := _member(found)) is not None:
                        yield member
                file.seek(tar.offset)
        except Exception as error:  # of its own, and ValueError, OverflowError and others on damaged headers
            yield Member(
                f"byte {at}",
                at,
                at,
                0,
                f"the tar is damaged or not complete at byte {at} of {end}: {error}; what follows is not read",
            )
            return
        at = file.tell()
        if file.read(_BEHIND).strip(b"\0"):
            wrong = f"more follows the end of the tar at byte {at} of {end}: it is damaged, or several tars in one file; it is not read"
            yield Member(f"byte {at}", at, at, 0, wrong)


def _member(found: tarfile.TarInfo) -> Member | None:
    """A tar's entry as a file to read, or with the reason why not; None for a folder, and for what other programs keep about files."""
    wrong, at = None, PurePosixPath(found.name)
    if found.isdir() or at.name.startswith(".") or (at.name.startswith("__") and at.name.endswith("__")):
        return None
    if at.is_absolute() or ".." in at.parts or not at.name:
        wrong = "its path leads outside the tar"
    elif found.issym() or found.islnk():
        wrong = f"a link (to {found.linkname:.100}); only files are read"
    elif not found.isreg() or found.issparse():
        wrong = "a device, or another special file; only files are read"
    return Member(found.name, found.offset, found.offset_data, found.size, wrong)
