"""Pictures: open them safely, crop them to one of a target's sizes, put them on white, convert them to tensors.

Every step is the reference's, down to Pillow's rounding: the crop is made in the file's own mode, before the whitening, so a palette
picture is resized by nearest neighbour; EXIF rotation is not applied. One difference: a JPEG of more than 16 million pixels that must
be halved is halved by its decoder, which changes values by a few levels of 255 and takes a fourth of the memory.
"""

import ctypes
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.process.ranges import MAX_TARGET

# Blocks of this size are mapped one by one and returned to the system; smaller ones stay allocated, in each thread, after a large picture.
Image.core.set_block_size(64 << 20)
# Returns memory that decoders have freed to the system; malloc keeps up to 100 MB of it in each thread. Only glibc has it.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)

T = TypeVar("T")
File = io.BufferedReader | io.BytesIO
PATCH = 32  # pixels; sides are multiples of it
LARGEST_ASPECT = 4
# Formats that Pillow decodes itself; others may start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 89_478_485  # limit of a file, checked before decoding: 256 MiB of RGB, Pillow's own bound
MAX_BYTES = 1 << 30  # limit of a file: far more than MAX_PIXELS need
# Lower limits for formats whose decoder would take half a gigabyte: WebP's holds three pictures of 4 bytes a pixel beside Pillow's.
MAX_PIXELS_OF = {"WEBP": 1 << 25, "AVIF": 1 << 25, "JPEG2000": 1 << 25}
# Pixels from which a JPEG is decoded at 1/2, 1/4 or 1/8 size; bytes above which a file is decoded without being read into memory first.
LARGE = 1 << 24
# Pixels that all threads together decode at the same time: 4 bytes each, and 4 for the result. A picture of a format in MAX_PIXELS_OF
# counts for more, in the ratio of the two limits.
AT_ONCE = MAX_PIXELS
MAX_COVER_PIXELS = 10 * 2**26  # of the resized picture before the crop; only long and thin pictures come near
LEVELS = (np.arange(256) / 255.0 * 2 - 1).astype(np.float32)  # the float of each byte value


class Cut(NamedTuple):
    """How a picture becomes one of the sizes; every pair is (width, height)."""

    size: tuple[int, int]
    halved: tuple[tuple[int, int], ...]  # successive BOX sizes
    cover: tuple[int, int]  # BICUBIC size
    corner: tuple[int, int]  # left and top of the cut in `cover`


def crop_sizes(target: int) -> list[tuple[int, int]]:
    """The (width, height) pairs of about target x target pixels, aspect at most 4, from the widest to the tallest."""
    if not PATCH <= target <= MAX_TARGET or target % PATCH:
        raise InputError(f"size {target}: expected a multiple of {PATCH} pixels from {PATCH} to {MAX_TARGET}")
    patches = (target // PATCH) ** 2
    sizes, width, height = [], patches, 1
    while width > 0:
        if max(width, height) <= LARGEST_ASPECT * min(width, height):
            sizes.append((PATCH * width, PATCH * height))
        if (height + 1) * width <= patches:
            height += 1
        else:
            width -= 1
    return sizes


def cut(size: tuple[int, int], target: int) -> Cut | None:
    """The cut that keeps most of a picture of this (width, height); None if it already has one of the target's sizes."""
    sizes = crop_sizes(target)
    if size in sizes:
        return None

    def overlap(crop: tuple[int, int]) -> float:
        x, y = crop[0] / size[0], crop[1] / size[1]
        return min(x, y) / max(x, y)

    crop = max(sizes, key=lambda crop: (overlap(crop), crop))
    halved = []
    while size[0] >= 2 * crop[0] and size[1] >= 2 * crop[1]:
        size = (size[0] // 2, size[1] // 2)
        halved.append(size)
    scale = max(crop[0] / size[0], crop[1] / size[1])
    cover = (round(size[0] * scale), round(size[1] * scale))
    return Cut(crop, tuple(halved), cover, ((cover[0] - crop[0]) // 2, (cover[1] - crop[1]) // 2))


def crop(image: Image.Image, target: int, source: tuple[int, int] | None = None) -> Image.Image:
    """The picture at one of the target's sizes, in its own mode. Raises InputError for a picture too long and thin to resize.

    `source` is the size of the whole picture if `image` was decoded at a smaller size.
    """
    how = cut(source or image.size, target)
    if how is None:
        return image
    if how.cover[0] * how.cover[1] > MAX_COVER_PIXELS:
        width, height = source or image.size
        raise InputError(f"a picture of {width}x{height} is too long and thin to be cut to {how.size[0]}x{how.size[1]}")
    for size in how.halved:
        if image.width > size[0] or image.height > size[1]:
            image = _halved(image, size)
    left, top = how.corner
    return image.resize(how.cover, Image.Resampling.BICUBIC).crop((left, top, left + how.size[0], top + how.size[1]))


def _halved(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image.resize(size, BOX)`; a large picture is resized in strips, since Pillow would copy half of it, and all of an RGBA picture.

    An odd last row of a large picture is ignored.
    """
    # P and 1 take one byte a pixel and are resized by nearest neighbour; a picture halved by a JPEG decoder may be a pixel larger than `size`.
    if image.width * image.height < LARGE or image.mode in ("P", "1") or image.height // 2 != size[1]:
        return image.resize(size, Image.Resampling.BOX)
    half, rows = Image.new(image.mode, size), max(1, LARGE // 8 // image.width)
    for top in range(0, size[1], rows):
        bottom = min(top + rows, size[1])
        strip = image.crop((0, 2 * top, image.width, 2 * bottom))
        half.paste(strip.resize((size[0], bottom - top), Image.Resampling.BOX), (0, top))
    return half


def whiten(image: Image.Image) -> Image.Image:
    """The picture over white as RGB; mixed values are truncated, not rounded."""
    if image.mode == "RGB":
        return image
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * rgba[..., :3]).astype(np.uint8))


def fit(image: Image.Image, target: int) -> Image.Image:
    """The picture at one of the target's sizes, RGB. Raises InputError for a mode that Pillow cannot resize or convert."""
    try:
        return whiten(crop(image, target))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"a picture of mode {image.mode}: {error}") from error


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """An RGB picture's values in [-1, 1], rounded once from float64."""
    return torch.from_numpy(LEVELS[np.asarray(image)].transpose(2, 0, 1).copy())


class Loaded(NamedTuple):
    """A picture of one of the target's sizes, with the size and the hash of its source file."""

    image: Image.Image  # RGB, at one of the target's sizes
    source: tuple[int, int]  # width and height of the whole picture
    sha256: bytes  # of the file


def load(path: Path, target: int) -> Loaded:
    """The picture in a file, cropped for a target. Raises InputError for anything but a picture of bounded size.

    Waits while other threads decode: AT_ONCE bounds the pixels of all threads of a process.
    """
    with _room.entered() as take:
        return _loaded(path, target, take)


def _loaded(path: Path, target: int, take: Callable[[int], None]) -> Loaded:
    with _open(path) as (file, image):
        digest = hashlib.file_digest(file, "sha256").digest()
        source = image.size
        take(source[0] * source[1] * MAX_PIXELS // _most(image))
        whole = _decoded(file, image, target)
        fitted: Image.Image | None = None
        try:
            fitted = whiten(crop(whole, target, source))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"a picture of mode {whole.mode}: {error}") from error
        finally:
            if fitted is not image:
                image.close()  # a later report of the error keeps the picture object alive, but not its pixels
    assert fitted is not None, "or an error was raised"
    return Loaded(fitted, source, digest)


def open_image(path: Path) -> Image.Image:
    """The decoded picture; the first of an animation. Raises InputError for anything but a picture of bounded size."""
    with _open(path) as (file, image):
        return _decoded(file, image)


@contextmanager
def _open(path: Path) -> Iterator[tuple[File, Image.Image]]:
    """A picture's file and its undecoded picture. A small file is read into memory once: the hashed bytes are the decoded bytes."""
    with _named(reading.opened, path, "a picture") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = os.fstat(opened.fileno())
        if status.st_size == 0:
            raise InputError("the file has zero size")
        if status.st_size > MAX_BYTES:
            raise InputError(f"the file has {status.st_size} bytes, more than {MAX_BYTES}")
        file: File = io.BytesIO(_named(opened.read, MAX_BYTES)) if status.st_size <= LARGE else opened
        Image.init()
        with _readable():
            image = Image.open(
                file, formats=[f for f in FORMATS if f in Image.OPEN]
            )  # WEBP and AVIF are optional in Pillow
        if 0 in image.size:
            raise InputError(f"the picture has zero size ({image.width}x{image.height})")
        most = _most(image)
        if image.width * image.height > most:
            raise InputError(
                f"the picture has {image.width}x{image.height} pixels, more than {most} of {image.format}: a decompression bomb?"
            )
        file.seek(0)
        yield file, image


def _most(image: Image.Image) -> int:
    """The largest number of pixels allowed for the picture's format."""
    return MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)


def _decoded(file: File, image: Image.Image, target: int | None = None) -> Image.Image:
    """The decoded picture; a large JPEG that the crop would halve is decoded at a reduced size."""
    file.seek(0)
    how = cut(image.size, target) if target is not None else None
    if how is not None and how.halved and image.format == "JPEG" and image.width * image.height > LARGE:
        image.draft(image.mode, how.halved[-1])  # the smallest decoder size that is at least this large
    with _readable():
        image.load()
    return image


@contextmanager
def _readable() -> Iterator[None]:
    """Turn Pillow's errors into InputError: on damaged files its decoders raise OSError, SyntaxError, ValueError, struct.error and more."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise InputError(f"not a picture in a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"decompression bomb: {error}") from error
    except Exception as error:
        raise InputError(f"the picture cannot be read: {error}") from error


def _named(call: Callable[..., T], *args: Any) -> T:
    """call(*args), with errors as InputError without the file's name, which the caller adds."""
    try:
        return call(*args)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}") from error
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{args[0]}: ").partition("; expected")[0]) from error


class _Room:
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


_room = _Room(AT_ONCE)
