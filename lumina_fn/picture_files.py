"""Picture files: opened and decoded without trust. A file's format, its bytes and its pixels are bounded before anything is decoded."""

import ctypes
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.formats import embedded_profiles

# Blocks of this size are mapped one by one and returned to the system; smaller ones stay allocated, in each thread, after a large picture.
Image.core.set_block_size(64 << 20)
# Returns memory that decoders have freed to the system; malloc keeps up to 100 MB of it in each thread. Only glibc has it.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)

T = TypeVar("T")
File = io.BufferedReader | io.BytesIO
# Formats that Pillow decodes itself; others may start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF")
with suppress(ImportError):  # the extra [heif]: imported here, since nothing is loaded while untrusted files are read
    from pillow_heif import register_heif_opener

    register_heif_opener()
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands, ISO/IEC 23008-12
MAX_PIXELS = 89_478_485  # limit of a file, checked before decoding: 256 MiB of RGB, Pillow's own bound
MAX_BYTES = 1 << 30  # limit of a file: far more than MAX_PIXELS need
# Lower limits for formats whose decoder would take half a gigabyte: WebP's holds three pictures of 4 bytes a pixel beside Pillow's.
MAX_PIXELS_OF = {"WEBP": 1 << 25, "AVIF": 1 << 25, "JPEG2000": 1 << 25, "HEIF": 1 << 26}
# Pixels from which a JPEG is decoded at 1/2, 1/4 or 1/8 size; bytes above which a file is decoded without being read into memory first.
LARGE = 1 << 24
# Pixels that all threads together decode at the same time: 4 bytes each, and 4 for the result. A picture of a format in MAX_PIXELS_OF
# counts for more, in the ratio of the two limits.
AT_ONCE = MAX_PIXELS
MAX_HELD = 1 << 28  # bytes of a file in an archive, which is read into memory


class Span(NamedTuple):
    """A picture's file that lies in another file, as in a tar."""

    path: Path
    begin: int
    size: int


Source = Path | Span | bytes  # a picture's file: by its name, in another, or its content


@contextmanager
def opened(source: Source) -> Iterator[tuple[File, Image.Image]]:
    """A picture's file and its undecoded picture. A small file is read into memory once: the hashed bytes are the decoded bytes."""
    with _file(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.init()
        with _readable(file):
            image = Image.open(
                file, formats=[f for f in FORMATS if f in Image.OPEN]
            )  # WEBP and AVIF are optional in Pillow, HEIF comes with an extra
        if 0 in image.size:
            raise InputError(f"the picture has zero size ({image.width}x{image.height})")
        most = most_pixels(image)
        if image.width * image.height > most:
            raise InputError(
                f"the picture has {image.width}x{image.height} pixels, more than {most} of {image.format}: a decompression bomb?"
            )
        if "icc_profile" not in image.info and (found := embedded_profiles.profile(file, image.format)):
            image.info["icc_profile"] = found
        file.seek(0)
        yield file, image


@contextmanager
def _file(source: Source) -> Iterator[File]:
    """A source's bytes, in memory if they are few. Raises InputError, also for none or too many."""
    if isinstance(source, bytes):
        _check_bytes(len(source), MAX_HELD)
        yield io.BytesIO(source)
        return
    path = source.path if isinstance(source, Span) else source
    with _named(reading.opened, path, "a picture") as stream:
        if isinstance(source, Span):
            _check_bytes(source.size, MAX_HELD)
            stream.seek(source.begin)
            yield io.BytesIO(_named(stream.read, source.size))
            return
        size = os.fstat(stream.fileno()).st_size
        _check_bytes(size, MAX_BYTES)
        yield io.BytesIO(_named(stream.read, MAX_BYTES)) if size <= LARGE else stream


def _check_bytes(size: int, most: int) -> None:
    if size == 0:
        raise InputError("the file has zero size")
    if size > most:
        raise InputError(f"the file has {size} bytes, more than {most}")


def most_pixels(image: Image.Image) -> int:
    """The largest number of pixels allowed for the picture's format."""
    return MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)


def decoded(file: File, image: Image.Image, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The decoded picture; a large JPEG is decoded at the smallest size of its decoder that is no smaller than `at_least`, if given."""
    file.seek(0)
    if at_least is not None and image.format == "JPEG" and image.width * image.height > LARGE:
        image.draft(image.mode, at_least)
    with _readable(file):
        image.load()
    return image


@contextmanager
def _readable(file: File) -> Iterator[None]:
    """Turn Pillow's errors into InputError: on damaged files its decoders raise OSError, SyntaxError, ValueError, struct.error and more."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        if "HEIF" not in Image.OPEN and _begins(file)[4:8] == b"ftyp" and _begins(file)[8:] in _HEIC:
            raise InputError("a HEIC picture; to read it: pip install 'lumina-fn[heif]'") from error
        raise InputError(
            f"not a picture in a known format ({', '.join(f for f in FORMATS if f in Image.OPEN)})"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"decompression bomb: {error}") from error
    except Exception as error:
        raise InputError(f"the picture cannot be read: {error}") from error


def _begins(file: File) -> bytes:
    file.seek(0)
    return file.read(12)


def _named(call: Callable[..., T], *args: Any) -> T:
    """call(*args), with errors as InputError without the file's name, which the caller adds."""
    try:
        return call(*args)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}") from error
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{args[0]}: ").partition("; expected")[0]) from error


class Room:
    """A limit on the pixels that all threads together may hold."""

    def __init__(self, pixels: int):
        self._whole = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def entered(self) -> Iterator[Callable[[int], None]]:
        """A function `take(pixels)`, to be called once, which waits until they are free; the block's end releases them."""
        taken = 0

        def take(pixels: int) -> None:
            nonlocal taken
            pixels = min(pixels, self._whole)
            with self._changed:
                self._changed.wait_for(lambda: self._free >= pixels)
                self._free -= pixels
                taken = pixels

        try:
            yield take
        finally:
            if taken > LARGE and _TRIM is not None:
                _TRIM(0)
            with self._changed:
                self._free += taken
                self._changed.notify_all()


room = Room(AT_ONCE)
