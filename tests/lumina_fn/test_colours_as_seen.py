"""Colours of another space, or of another gamma, are sRGB once they are trained on; the right values come from the space's own numbers."""

import io
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from lumina_fn import as_seen, images
from lumina_fn.errors import InputError
from tests.support import colour_profiles, odd
from tests.support.odd import LOSSY, RAMP, SIZE, colours, near, saved


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "I;16"])
def test_a_png_s_gamma_is_taken_away_unless_it_is_srgb_s(tmp_path, mode):
    stored = colours(*SIZE)
    image = Image.fromarray(RAMP) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    eight = np.rint(RAMP / 257).astype(np.uint8) if mode == "I;16" else np.asarray(image.convert("RGB"))
    data = saved(tmp_path, image, "PNG").read_bytes()

    def with_gamma(gamma: int, *more: bytes) -> images.Loaded:
        body = b"gAMA" + struct.pack(">I", gamma)
        chunks = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body)) + b"".join(more)
        (tmp_path / "g.png").write_bytes(data[:33] + chunks + data[33:])
        return images.load(tmp_path / "g.png", 64)

    plain = images.load(tmp_path / "x.png", 64)
    for same in (
        with_gamma(45455),
        with_gamma(0),
        with_gamma(100000, struct.pack(">I", 1) + b"sRGB\0" + struct.pack(">I", zlib.crc32(b"sRGB\0"))),
    ):
        assert same.image.tobytes() == plain.image.tobytes()
    want = Image.fromarray(np.rint(colour_profiles.gray_in_srgb(eight, 1.0)).astype(np.uint8))
    linear = with_gamma(100000)
    near(linear.image.convert("RGB"), np.asarray(images.fit(want, 64)), 1)
    assert "converted" in linear.notes


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize(("primaries", "gamma"), [(colour_profiles.ADOBE, 2.19921875), (colour_profiles.P3, 2.2)])
def test_another_colour_space_is_converted(tmp_path, fmt, primaries, gamma):
    stored = colours(*SIZE) // 2 + 64  # within sRGB
    path = saved(tmp_path, Image.fromarray(stored), fmt, icc_profile=colour_profiles.rgb(primaries, gamma))
    loaded = images.load(path, 64)
    want = colour_profiles.rgb_in_srgb(stored, primaries, gamma)
    assert np.abs(want - stored).mean() > 3
    near(
        images.load(path, 64).image,
        np.asarray(images.fit(Image.fromarray(np.rint(want).astype(np.uint8)), 64)),
        1 + LOSSY.get(fmt, 0) / 2,
    )
    assert loaded.notes == {"converted"}


@pytest.mark.parametrize("make", [odd.bmp_with_profile, odd.jp2_with_profile])
def test_a_profile_that_pillow_does_not_find_is_used_too(tmp_path, make):
    stored = colours(*SIZE) // 2 + 64
    data = make(Image.fromarray(stored), colour_profiles.rgb(colour_profiles.ADOBE, 2.2))
    (tmp_path / "x").write_bytes(data)
    loaded = images.load(tmp_path / "x", 64)
    want = np.rint(colour_profiles.rgb_in_srgb(stored, colour_profiles.ADOBE, 2.2)).astype(np.uint8)
    near(loaded.image, np.asarray(images.fit(Image.fromarray(want), 64)), 1)
    assert loaded.notes == {"converted"}
    assert (
        images.load(tmp_path / "x", 64, seen=False).image.tobytes() == images.fit(Image.fromarray(stored), 64).tobytes()
    )
    for n in range(8, 250):  # a header that ends, or whose lengths lie, is a picture without a profile or no picture
        harmed = bytearray(data)
        harmed[n : n + 4] = b"\xff\xff\xff\xff"
        (tmp_path / "y").write_bytes(harmed)
        try:
            images.load(tmp_path / "y", 64)
        except InputError:
            continue


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "RGB with a transparent colour"])
def test_every_mode_is_converted_and_keeps_its_transparency(mode):
    profile = (
        colour_profiles.gray(1.0)
        if mode in ("L", "LA", "I;16", "1")
        else colour_profiles.rgb(colour_profiles.ADOBE, 2.2)
    )
    base = Image.fromarray(colours(*SIZE) // 2 + 64)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    elif mode == "RGB with a transparent colour":
        image = base.copy()
        image.info["transparency"] = base.getpixel((0, 0))
    else:
        image = base.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(SIZE))
    plain = images.whiten(image.convert("RGBA") if "transparency" in image.info else as_seen.as_seen(image).image)
    image.info["icc_profile"] = profile
    seen = as_seen.as_seen(image)
    got = np.asarray(images.whiten(seen.image)).astype(float)
    if mode == "1":
        assert (got == np.asarray(plain)).all()  # black and white are the same in both
        return
    assert "converted" in seen.notes
    if mode in ("L", "I;16"):
        gray = np.asarray(base.convert("L"))
        assert np.abs(got[..., 0] - colour_profiles.gray_in_srgb(gray, 1.0)).mean() < 1
    if mode in ("LA", "RGBA"):
        assert seen.image.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    if mode == "RGB with a transparent colour":
        assert tuple(got[0, 0]) == (255, 255, 255)
    assert np.abs(got - np.asarray(plain)).mean() > 2


def test_the_white_of_yellow_paper_is_white():
    """Relative colorimetric: a scan's paper is what the eye adapts to."""
    image = Image.linear_gradient("L")
    image.info["icc_profile"] = colour_profiles.gray(1.0, white=(0.8, 0.8, 0.5))
    seen = as_seen.as_seen(image).image
    assert seen.getpixel((0, 255)) == (255, 255, 255)
    assert seen.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "profile", [b"no profile", b"", colour_profiles.gray(2.0), colour_profiles.rgb(colour_profiles.P3, 2)[:300]]
)
def test_a_profile_that_does_not_fit_is_ignored_and_counted(profile):
    image = Image.fromarray(colours(*SIZE))
    image.info["icc_profile"] = profile
    seen = as_seen.as_seen(image)
    assert seen.image.tobytes() == Image.fromarray(colours(*SIZE)).tobytes()
    assert seen.notes == ({"profile ignored"} if profile else set())


def test_lab_colours_are_converted():
    lab = np.zeros((32, 64, 3), np.uint8)
    lab[..., 0] = np.linspace(0, 255, 64)  # from black to white
    seen = as_seen.as_seen(Image.frombytes("LAB", SIZE, lab.tobytes()))
    got = np.asarray(seen.image).astype(int)
    assert got[0, 0].max() <= 2
    assert got[0, -1].min() >= 250
    assert (np.ptp(got, axis=-1) <= 3).all()  # a = b = 0 is gray


@pytest.mark.skipif(
    not shutil.which("identify"), reason="SKIPPED: ImageMagick, the independent reader, is not installed"
)
@pytest.mark.parametrize("fmt", ["JPEG", "TIFF"])  # ImageMagick 6 does not turn a PNG
def test_imagemagick_sees_the_same(tmp_path, fmt):
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(colours(64, 128) // 2 + 64)
    path = saved(tmp_path, image, fmt, exif=exif, icc_profile=colour_profiles.rgb(colour_profiles.P3, 2.2))
    srgb = tmp_path / "srgb.icc"
    srgb.write_bytes(as_seen.SRGB.tobytes())
    command = [
        "convert",
        path,
        "-auto-orient",
        "-intent",
        "relative",
        "-black-point-compensation",
        "-profile",
        srgb,
        "ppm:-",
    ]
    shown = Image.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout))
    near(images.load(path, 96).image, np.asarray(shown).astype(float), 1)
