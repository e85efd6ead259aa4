"""Pictures: opened safely, cut to one of a target's sizes, put on white, and made numbers.

Every step is the reference's, down to Pillow's rounding: the cut is made in the file's own mode, before the whitening,
so a palette picture is resized by nearest neighbour; EXIF rotation is not applied.
"""

import io
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lumina_fn.errors import InputError

PATCH = 32  # pixels; sides are multiples of it
LARGEST_ASPECT = 4
# Formats that Pillow decodes itself: others may start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 89_478_485  # of a file, before it is decoded: 256 MiB of RGB, Pillow's own bound
MAX_BYTES = 1 << 30  # of a file: far more than MAX_PIXELS take
MAX_COVER_PIXELS = 10 * 2**26  # of the resized picture a cut is taken from: only a sliver of a picture comes near
LEVELS = (np.arange(256) / 255.0 * 2 - 1).astype(np.float32)  # what the 256 values of a byte become


class Cut(NamedTuple):
    """How a picture becomes one of the sizes; every pair is (width, height)."""

    size: tuple[int, int]
    halved: tuple[tuple[int, int], ...]  # successive BOX sizes
    cover: tuple[int, int]  # BICUBIC size
    corner: tuple[int, int]  # left and top of the cut in `cover`


def crop_sizes(target: int) -> list[tuple[int, int]]:
    """The (width, height) pairs of about target x target pixels, aspect at most 4, from the widest to the tallest."""
    if target < PATCH or target % PATCH:
        raise InputError(f"size {target}: expected a positive multiple of {PATCH} pixels")
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
    """The cut of a picture of this (width, height) that keeps most of it; None if the size is in the list already."""
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


def crop(image: Image.Image, target: int) -> Image.Image:
    """The picture at one of the target's sizes, in its own mode. Raises InputError for a sliver too long to resize."""
    how = cut(image.size, target)
    if how is None:
        return image
    if how.cover[0] * how.cover[1] > MAX_COVER_PIXELS:
        raise InputError(
            f"a picture of {image.width}x{image.height} is too long and thin to be cut to {how.size[0]}x{how.size[1]}"
        )
    for size in how.halved:
        image = image.resize(size, Image.Resampling.BOX)
    left, top = how.corner
    return image.resize(how.cover, Image.Resampling.BICUBIC).crop((left, top, left + how.size[0], top + how.size[1]))


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


def open_image(path: Path) -> Image.Image:
    """The decoded picture; of an animation its first. Raises InputError for anything that is not one of bounded size."""
    return decode(read(path))


def read(path: Path) -> bytes:
    """A picture's file. Raises InputError for what is no regular file of bounded size."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot open the file: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise InputError("not a regular file")
    with os.fdopen(fd, "rb") as file:
        if status.st_size == 0:
            raise InputError("the file has zero size")
        if status.st_size > MAX_BYTES:
            raise InputError(f"the file has {status.st_size} bytes, more than {MAX_BYTES}")
        try:
            return file.read(MAX_BYTES)
        except OSError as error:
            raise InputError(f"cannot read the file: {error.strerror}") from error


def decode(data: bytes) -> Image.Image:
    """The picture in a file's bytes, as `open_image` gives it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            image = Image.open(
                io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]
            )  # WEBP and AVIF are optional in Pillow
            if 0 in image.size:
                raise InputError(f"the picture has zero size ({image.width}x{image.height})")
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"the picture has {image.width}x{image.height} pixels, more than {MAX_PIXELS}: a decompression bomb?"
                )
            image.load()
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"not a picture in a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"decompression bomb: {error}") from error
    except (
        Exception
    ) as error:  # on a damaged file Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"the picture cannot be read: {error}") from error
    return image
