"""Pictures for tests of how files are read: one that no turn leaves as it is, saved in each format, and compared."""

import io
import struct

import numpy as np
from PIL import Image

SIZE = (64, 32)  # width and height

LOSSY = {"JPEG": 4.0, "AVIF": 4.0, "HEIF": 6.0}  # levels of the mean that a format's own coding changes


def colours(width: int, height: int) -> np.ndarray:
    """A picture that no turn leaves as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], -1).astype(np.uint8)


def saved(tmp_path, image: Image.Image, fmt: str, **how):
    if fmt == "TIFF" and "icc_profile" not in how and "exif" not in how and "tiffinfo" not in how:
        how["compression"] = "raw"
    if fmt in ("WEBP", "JPEG2000"):
        how |= {"lossless": True} if fmt == "WEBP" else {}
    if fmt in ("JPEG", "AVIF", "HEIF"):
        how["quality"] = 95
    path = tmp_path / f"x.{fmt.lower()}"
    image.save(path, fmt, **how)
    return path


def near(got: Image.Image, want: np.ndarray, levels: float) -> None:
    assert np.asarray(got).shape == want.shape
    assert np.abs(np.asarray(got).astype(float) - want).mean() <= levels


RAMP = np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[1], SIZE[0])


def bmp_with_profile(image: Image.Image, profile: bytes) -> bytes:
    """A BMP of version 5, which Pillow does not write."""
    pixels = np.ascontiguousarray(np.asarray(image)[::-1, :, ::-1]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, *image.size, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    header += bytes(16) + b"DEBM" + bytes(48) + struct.pack("<IIII", 4, 124 + len(pixels), len(profile), 0)
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(pixels) + len(profile), 0, 0, start) + header + pixels + profile


def jp2_with_profile(image: Image.Image, profile: bytes) -> bytes:
    """A JP2 whose colour specification is this profile, which Pillow does not write."""
    image.save(out := io.BytesIO(), "JPEG2000")
    data = out.getvalue()
    at, header = data.index(b"colr") - 4, data.index(b"jp2h") - 4
    old = int.from_bytes(data[at : at + 4], "big")
    box = struct.pack(">I", 11 + len(profile)) + b"colr\2\0\0" + profile
    size = int.from_bytes(data[header : header + 4], "big") + len(box) - old
    data = data[:at] + box + data[at + old :]
    return data[:header] + struct.pack(">I", size) + data[header + 4 :]
