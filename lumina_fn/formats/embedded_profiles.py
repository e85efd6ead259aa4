"""ICC profiles in files whose reader in Pillow does not look for them: BMP version 5, and JPEG 2000's JP2."""

import io
from collections.abc import Iterator

MAX_PROFILE = 1 << 24  # bytes; a printer's has some 3 million
_V5, _EMBEDDED = 124, b"DEBM"  # bytes of BITMAPV5HEADER; its bV5CSType PROFILE_EMBEDDED, read from low to high
_ICC = (b"\2", b"\3")  # METH of a colour specification box, ISO/IEC 15444-1, I.5.3.3, and -2, M.11.7.3


def profile(file: io.BufferedReader | io.BytesIO, kind: str | None) -> bytes | None:
    """The profile in a file of this format, as Pillow names it; None if there is none, or a damaged header. Moves in the file."""
    find = {"BMP": _of_bmp, "JPEG2000": _of_jp2}.get(kind or "")
    found = find(file) if find else b""
    return found or None


def _of_bmp(file: io.BufferedReader | io.BytesIO) -> bytes:
    file.seek(14)
    header = file.read(_V5)
    if len(header) < _V5 or int.from_bytes(header[:4], "little") != _V5 or header[56:60] != _EMBEDDED:
        return b""
    offset, size = (int.from_bytes(header[at : at + 4], "little") for at in (112, 116))
    if size > MAX_PROFILE:
        return b""
    file.seek(14 + offset)
    return file.read(size)


def _of_jp2(file: io.BufferedReader | io.BytesIO) -> bytes:
    end = file.seek(0, io.SEEK_END)
    for name, begin, stop in _boxes(file, 0, end):
        if name == b"jp2h":
            for inner, first, last in _boxes(file, begin, stop):
                file.seek(first)
                if inner == b"colr" and 3 < last - first <= MAX_PROFILE and file.read(3)[:1] in _ICC:
                    return file.read(last - first - 3)
        if name == b"jp2c":  # the picture: its header is behind us
            break
    return b""


def _boxes(file: io.BufferedReader | io.BytesIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The name and the span of the content of each box from `at` to `end`."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, begin = int.from_bytes(head[:4], "big"), at + 8
        if size == 1:  # the size follows, in 8 bytes
            size, begin = int.from_bytes(head[8:16], "big"), at + 16
        stop = end if size == 0 else at + size
        if not begin <= stop <= end:
            return
        yield head[4:8], begin, stop
        at = stop
