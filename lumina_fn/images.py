"""Pictures: load them, crop them to one of a target's sizes, put them on white, convert them to tensors.

A picture is first made what its viewer shows (`as_seen`), unless the reference's reading is asked for, which ignores orientation and
colour profiles. Every step after it is the reference's, down to Pillow's rounding: the crop is made in the picture's own mode, before
the whitening, so a palette picture is resized by nearest neighbour. One difference: a JPEG of more than 16 million pixels that must
be halved is halved by its decoder, which changes values by a few levels of 255 and takes a fourth of the memory.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lumina_fn import as_seen, picture_files
from lumina_fn.errors import InputError
from lumina_fn.picture_files import Source
from lumina_fn.process.ranges import MAX_TARGET

PATCH = 32  # pixels; sides are multiples of it
LARGEST_ASPECT = 4
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
    if image.width * image.height < picture_files.LARGE or image.mode in ("P", "1") or image.height // 2 != size[1]:
        return image.resize(size, Image.Resampling.BOX)
    half, rows = Image.new(image.mode, size), max(1, picture_files.LARGE // 8 // image.width)
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
    source: tuple[int, int]  # width and height of the whole picture, upright if it was turned
    sha256: bytes  # of the file
    notes: frozenset[str] = frozenset()  # of `as_seen.NOTES`


def load(source: Source, target: int, *, seen: bool = True) -> Loaded:
    """The picture in a file as it is seen, or as it is stored, cropped for a target.

    Raises InputError for anything but a picture of bounded size, and for one in which nothing is to be seen. Waits while other threads
    decode: `picture_files.AT_ONCE` bounds the pixels of all threads of a process.
    """
    with picture_files.room.entered() as take, picture_files.opened(source) as (file, image):
        digest = hashlib.file_digest(file, "sha256").digest()
        take(image.width * image.height * picture_files.MAX_PIXELS // picture_files.most_pixels(image))
        loaded: Loaded | None = None
        try:
            loaded = _loaded(file, image, target, seen)._replace(sha256=digest)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"a picture of mode {image.mode}: {error}") from error
        finally:
            if loaded is None or loaded.image is not image:
                image.close()  # a later report of the error keeps the picture object alive, but not its pixels
    assert loaded is not None, "or an error was raised"
    return loaded


def _loaded(file: picture_files.File, image: Image.Image, target: int, seen: bool) -> Loaded:
    stored, halved, turn = image.size, None, 1
    if image.format == "JPEG":  # its header is read without decoding it, which tells what its decoder may halve
        turn = as_seen.orientation(image) if seen else 1
        how = cut(_upright(stored, turn), target)
        halved = _upright(how.halved[-1], turn) if how is not None and how.halved else None
    whole = picture_files.decoded(file, image, halved)
    if not seen:
        return Loaded(whiten(crop(whole, target, stored)), stored, b"")
    shown, notes = as_seen.as_seen(whole)
    if shown is not whole:
        whole.close()  # its pixels, before others are made
    source = _upright(stored, turn) if image.format == "JPEG" else shown.size
    cropped = crop(shown, target, source)
    if not as_seen.is_visible(cropped):
        raise InputError("nothing is visible in it: all of it is transparent")
    white = whiten(cropped)
    return Loaded(white, source, b"", notes | as_seen.remarkable(white, source))


def _upright(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """The size of a picture of stored size `size` once it is turned; the stored size of one that has `size` once it is turned."""
    return (size[1], size[0]) if turn in as_seen.SIDEWAYS else size


def open_image(path: Path) -> Image.Image:
    """The decoded picture as it is stored; the first of an animation. Raises InputError for anything but a picture of bounded size."""
    with picture_files.opened(path) as (file, image):
        return picture_files.decoded(file, image)
