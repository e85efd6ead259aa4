"""Small pictures of every kind that is read, and files that only look like one."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, features


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def colours(width: int = 40, height: int = 33) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6 % 256, y * 7 % 256, (x + y) * 3 % 256], -1).astype(np.uint8))


def rotated(orientation: int = 6) -> bytes:
    """A JPEG whose EXIF asks to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _saved(colours(), "JPEG", exif=exif)


def sixteen_bit(form: str = "PNG") -> bytes:
    y, x = np.mgrid[:33, :40]
    return _saved(Image.fromarray((x * 1600 + y).astype(np.uint16)), form)


def animated(form: str = "GIF") -> bytes:
    """A red picture, then a green and a blue one."""
    first, *others = (Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue"))
    lossless = {"lossless": True} if form == "WEBP" else {}
    return _saved(first, form, save_all=True, append_images=others, duration=50, loop=0, **lossless)


def png(width: int, height: int, depth: int = 8, kind: int = 2, data: bytes = b"") -> bytes:
    """A PNG that says these sizes, whatever data it has."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def seeds() -> dict[str, bytes]:
    rgb = colours()
    with_alpha = rgb.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    found = {f"PNG {mode}": _saved(rgb.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    found |= {
        "PNG alpha": _saved(with_alpha, "PNG"),
        "PNG 16": sixteen_bit(),
        "PNG bomb": png(30_000, 30_000),
        "PNG wide": png(9000, 9000, 1, 0),
    }
    found |= {"PNG transparent": _saved(rgb.convert("P"), "PNG", transparency=3), "APNG": animated("PNG")}
    found |= {f"JPEG {mode}": _saved(rgb.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    found |= {"JPEG progressive": _saved(rgb, "JPEG", progressive=True), "JPEG rotated": rotated()}
    found |= {f"TIFF {mode}": _saved(rgb.convert(mode), "TIFF") for mode in ("1", "RGB", "CMYK", "YCbCr", "F", "I")}
    found |= {
        f"TIFF {how}": _saved(rgb, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    }
    found |= {
        "TIFF LAB": _saved(Image.new("LAB", (40, 40)), "TIFF"),
        "TIFF 16": sixteen_bit("TIFF"),
        "TIFF pages": animated("TIFF"),
    }
    found |= {
        "GIF": animated(),
        "GIF one": _saved(rgb, "GIF"),
        "BMP": _saved(rgb, "BMP"),
        "BMP P": _saved(rgb.convert("P"), "BMP"),
    }
    found |= {f"PPM {mode}": _saved(rgb.convert(mode), "PPM") for mode in ("1", "L", "RGB")} | {
        "PGM 16": sixteen_bit("PPM")
    }
    if features.check("webp"):
        found |= {
            "WEBP": _saved(rgb, "WEBP"),
            "WEBP lossless": _saved(with_alpha, "WEBP", lossless=True),
            "WEBP animated": animated("WEBP"),
        }
    if features.check("jpg_2000"):
        found |= {"JPEG 2000": _saved(rgb, "JPEG2000"), "JPEG 2000 alpha": _saved(with_alpha, "JPEG2000")}
    if features.check("avif"):
        found |= {"AVIF": _saved(rgb, "AVIF")}
    found |= {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) run\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    }
    return found
