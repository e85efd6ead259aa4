"""A decoded picture as its viewer shows it: 8 bits a sample, sRGB colours, upright.

Files tell their orientation, colours and range in tags that Pillow's decoders leave to the caller. A plain picture of 8 bits in sRGB
without tags comes out as it came in, to the byte.
"""

from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms

from lumina_fn.errors import InputError

# What was done to a picture, or is to be known about it; the bits of a feature's `notes`, in this order.
TURNED, CONVERTED, PROFILE_IGNORED, SCALED = "turned", "converted", "profile ignored", "scaled"
FLAT, SMALL, RENAMED = "flat", "small", "renamed"
SAID = {
    TURNED: "turned as their orientation tags say",
    CONVERTED: "converted to sRGB from another colour profile",
    PROFILE_IGNORED: "with a broken colour profile, read as sRGB",
    SCALED: "scaled to 8 bits a sample",
    FLAT: "of one colour",
    SMALL: "with less than a fourth of the width or height they are trained at",
    RENAMED: "found under a name that the list writes otherwise (case, accents, backslashes)",
}
NOTES = tuple(SAID)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the value of the orientation tag, EXIF 2.3, 4.6.4
SIDEWAYS = (5, 6, 7, 8)
# Tags of TIFF 6.0.
_BITS, _POLARITY, _FORMAT, _LEAST, _MOST = 258, 262, 339, 340, 341
_UNSIGNED, _WHITE_IS_ZERO = 1, 0
REMARKABLY_SMALL = 4
_SAME = 2  # levels of 255: a profile that changes no colour by more is taken as sRGB
_PROBE = 9  # levels of each channel that are compared
_STRIP = 1 << 20  # pixels that are scaled at once, in float64
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


class Seen(NamedTuple):
    """A picture as it is seen, and what was done to it."""

    image: Image.Image  # 8 bits a sample
    notes: frozenset[str]  # of TURNED, CONVERTED, PROFILE_IGNORED and SCALED


def as_seen(image: Image.Image) -> Seen:
    """The decoded picture scaled to 8 bits, converted to sRGB and turned as its tags say. Raises InputError where its range is unknown.

    Its colours may be converted in place: a large picture is held twice at most.
    """
    notes, profile, turn = set(), image.info.get("icc_profile"), orientation(image)
    gamma = None if "srgb" in image.info else image.info.get("gamma")  # a PNG's chunks
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled(image)
        notes.add(SCALED)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("L", "RGB") and "transparency" in image.info:  # one of its colours is
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    if profile or image.mode == "LAB":
        image, done = _converted(image, profile)
        notes |= done
    elif (table := _gamma_table(gamma)) is not None:
        image = _mapped(image, table)
        notes.add(CONVERTED)
    if turn in _TURNS:
        image = image.transpose(_TURNS[turn])
        notes.add(TURNED)
    return Seen(image, frozenset(notes))


def orientation(image: Image.Image) -> int:
    """The orientation of EXIF or XMP, 1 to 8; 1 if there is none that can be read. Pillow turns a TIFF itself when it decodes it."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parsers raise errors of many types for damaged tags
        return 1
    return value if value in _TURNS else 1


def names(bits: int) -> list[str]:
    """The NOTES whose bits are set."""
    return [name for n, name in enumerate(NOTES) if bits >> n & 1]


def bits(notes: frozenset[str]) -> int:
    """These notes as bits of a number."""
    return sum(1 << NOTES.index(note) for note in notes)


def is_visible(image: Image.Image) -> bool:
    """Whether any of its pixels is not wholly transparent."""
    return not image.has_transparency_data or bool(np.asarray(image.convert("RGBA"))[..., 3].any())


def remarkable(image: Image.Image, source: tuple[int, int]) -> frozenset[str]:
    """FLAT for an RGB picture of one colour, SMALL if its source had less than a fourth of its width or of its height."""
    pixels = np.asarray(image)
    flat = bool((pixels == pixels[0, 0]).all())
    small = any(REMARKABLY_SMALL * have < want for have, want in zip(source, image.size, strict=True))
    return frozenset([FLAT] * flat + [SMALL] * small)


def _scaled(image: Image.Image) -> Image.Image:
    """A picture of one channel of more than 8 bits, as L, or as LA if one of its values is transparent."""
    low, high = _range(image)
    values = np.asarray(image)
    black, white = (255, 0) if _tag(image, _POLARITY) == _WHITE_IS_ZERO else (0, 255)
    gray = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), rows := max(1, _STRIP // values.shape[1])):
        share = np.clip((values[top : top + rows].astype(np.float64) - low) / (high - low), 0, 1)
        gray[top : top + rows] = np.rint(black + (white - black) * np.nan_to_num(share))
    scaled = Image.fromarray(gray)
    if isinstance(clear := image.info.get("transparency"), int):
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return scaled


def _range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white, as the format or the file says. Raises InputError if neither does."""
    if image.mode.startswith("I;16"):  # PNG, JPEG 2000 and TIFF
        return 0, 2 ** (_tag(image, _BITS) or 16) - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow scales a PGM to 16 bits
        return 0, 2**16 - 1
    least, most = _tag(image, _LEAST), _tag(image, _MOST)
    if least is not None and most is not None and least < most:
        return float(least), float(most)
    kind = "float" if image.mode == "F" else "signed" if _tag(image, _FORMAT) not in (None, _UNSIGNED) else "32-bit"
    raise InputError(
        f"its {kind} samples have no known range: which value is white is not told; save it with 8 or 16 bits a sample"
    )


def _tag(image: Image.Image, tag: int) -> float | None:
    """The first value of a TIFF's tag; None for other formats and missing tags."""
    value: Any = getattr(image, "tag_v2", {}).get(tag)
    while isinstance(value, tuple):
        value = value[0] if value else None
    return value


def _converted(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, set[str]]:
    """The picture's colours in sRGB. A profile that cannot be used is ignored, with a note."""
    if image.mode == "P":
        return _palette_converted(image, profile)
    if image.mode in ("1", "PA", "YCbCr", "HSV", "RGBX"):
        image = image.convert({"1": "L", "PA": "RGBA"}.get(image.mode, "RGB"))
    mode = "L" if image.mode == "LA" else image.mode
    try:
        transform = _transform(profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, {PROFILE_IGNORED}
    if transform is None:
        return image, set()
    if transform.input_mode == transform.output_mode:
        transform.apply_in_place(image)
        return image, {CONVERTED}
    if image.mode != "LA":
        return transform.apply(image), {CONVERTED}
    colours = transform.apply(image.getchannel("L"))
    colours.putalpha(image.getchannel("A"))
    return colours, {CONVERTED}


def _palette_converted(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, set[str]]:
    palette = image.getpalette("RGB") or []
    colours, done = _converted(Image.frombytes("RGB", (len(palette) // 3, 1), bytes(palette)), profile)
    if CONVERTED in done:
        image = image.copy()
        image.putpalette(colours.tobytes())
    return image, done


def _gamma_table(gamma: object) -> list[int] | None:
    """The sRGB level of each level of a PNG with this gamma; None where it is sRGB's or means nothing."""
    if not isinstance(gamma, float) or not 0.05 < gamma < 20 or abs(2.2 * gamma - 1) < 0.05:  # libpng's threshold
        return None
    linear = (np.arange(256) / 255) ** (1 / gamma)
    return (
        np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
        .astype(int)
        .tolist()
    )


def _mapped(image: Image.Image, table: list[int]) -> Image.Image:
    """The picture with this level for each level of its colours; its alpha stays."""
    if image.mode == "P":
        mapped = image.copy()
        mapped.putpalette(bytes(table[level] for level in image.getpalette("RGB") or []))
        return mapped
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        return image
    alpha = list(range(256)) if image.mode[-1] == "A" else []
    return image.point(table * (len(image.mode) - bool(alpha)) + alpha)


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of colours of a profile (None: CIE L*a*b*) to sRGB; None if the profile is sRGB's. Raises errors for a bad profile."""
    source = ImageCms.createProfile("LAB") if profile is None else ImageCms.getOpenProfile(BytesIO(profile))
    to = ImageCms.buildTransform(
        source, SRGB, mode, "RGBA" if mode == "RGBA" else "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    probe = _probe(mode)
    if probe is not None:
        change = np.asarray(to.apply(probe)).astype(int) - np.asarray(
            probe.convert("RGBA" if mode == "RGBA" else "RGB")
        )
        if np.abs(change).max() <= _SAME:
            return None
    return to


def _probe(mode: str) -> Image.Image | None:
    """A picture of colours from the whole of a mode's range; None for a mode that is no RGB and no gray."""
    levels = np.linspace(0, 255, _PROBE).astype(np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    if mode not in ("RGB", "RGBA"):
        return None
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)).convert(mode)
