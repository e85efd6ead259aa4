"""Cuts, whitening and values against the reference's, and files that are no pictures."""

import hashlib
import json
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina_fn import images, picture_files, vq
from lumina_fn.errors import InputError
from tests.support import paths

GOLDENS = paths.GOLDENS / "crop"
MODES = json.loads((GOLDENS / "modes.json").read_text())["cases"]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def test_crop_lists():
    lists = json.loads((GOLDENS / "crop_size_lists.json").read_text())["lists"]
    for target, sizes in lists.items():
        assert images.crop_sizes(int(target)) == [tuple(s) for s in sizes]


def test_cuts_of_900_sizes():
    targets = json.loads((GOLDENS / "sizes.json").read_text())["targets"]
    seen = 0
    for target, rows in targets.items():
        for size, crop, calls in rows["rows"]:
            seen += 1
            how = images.cut(tuple(size), int(target))
            if how is None:
                assert (size, []) == (crop, calls)
                continue
            (left, top), (width, height) = how.corner, how.size
            mine = [["resize", list(s), "BOX"] for s in how.halved]
            mine += [["resize", list(how.cover), "BICUBIC"], ["crop", [left, top, left + width, top + height]]]
            assert [list(how.size), mine] == [crop, calls]
            assert how.cover[0] * how.cover[1] <= images.MAX_COVER_PIXELS
    assert seen == 900


@pytest.mark.parametrize("case", MODES, ids=lambda c: c["case"])
def test_modes(case):
    for target, expected in case["targets"].items():
        image = images.open_image(GOLDENS / case["file"])
        assert image.mode == case["mode"]
        crop = images.crop(image, int(target))
        assert (list(crop.size), crop.mode) == (expected["crop_wh"], expected["crop_mode"])
        assert sha(crop.tobytes()) == expected["crop_sha256"]
        white = images.fit(image, int(target))
        assert white.mode == "RGB"
        assert sha(white.tobytes()) == expected["white_sha256"]
        assert sha(images.to_tensor(white).numpy().tobytes()) == expected["tensor_f32_sha256"]
        if "expected_png" in expected:
            assert white.tobytes() == Image.open(GOLDENS / expected["expected_png"]).tobytes()


def test_values_come_back_as_the_bytes_they_were():
    every = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    x = images.to_tensor(Image.fromarray(every))
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert (vq.pixels(x[None])[0].numpy() == every).all()


@pytest.mark.parametrize("target", [0, -32, 16, 100])
def test_targets_are_multiples_of_32(target):
    with pytest.raises(InputError, match="multiple of 32"):
        images.crop_sizes(target)


def test_a_sliver_is_refused_before_it_is_resized():
    with pytest.raises(InputError, match="too long and thin"):
        images.fit(Image.new("L", (1, 10_000)), 768)


def test_a_mode_pillow_cannot_convert_is_an_input_error():
    with pytest.raises(InputError, match="mode La"):
        images.fit(Image.new("La", (64, 64)), 64)


def png(width, height, data=b""):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def truncated():
    return (GOLDENS / "img" / "modes_rgb_300x200.png").read_bytes()[:500]


BAD = {
    "empty": (b"", "zero size"),
    "text": (b"hello, I am no picture", "not a picture"),
    "truncated": (truncated(), "cannot be read"),
    "bomb": (png(30_000, 30_000), "bomb"),
    "small bomb": (png(10_000, 10_000), "bomb"),
    "no width": (png(0, 5), r"zero size|not a picture|cannot be read"),
    "no data": (png(8, 8), "cannot be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_pictures(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        images.open_image(tmp_path / "x.png")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            images.open_image(path)
    with pytest.raises(InputError, match="No such file"):
        images.open_image(tmp_path / "nothing")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "P", "F"])
@pytest.mark.parametrize("size", [(64, 64), (131, 98), (97, 264), (514, 33)])
def test_halving_by_strips_is_halving(monkeypatch, mode, size):
    """To a level or two of 255, since a strip may be wider than high: Pillow then takes rows and columns in the other order."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(noise, "RGBA").convert(mode)
    half = (size[0] // 2, size[1] // 2)
    whole = image.crop((0, 0, size[0], 2 * half[1])).resize(half, Image.Resampling.BOX)  # an odd last row is left out
    monkeypatch.setattr(picture_files, "LARGE", size[0] * 8 * 3)  # three rows a strip
    strips = images._halved(image, half)
    assert strips.mode == mode
    seen = lambda picture: np.asarray(picture.convert("RGBA").convert("RGBa") if "A" in mode else picture).astype(float)
    assert np.abs(seen(strips) - seen(whole)).max() <= 2


def test_a_large_jpeg_is_cut_where_the_whole_one_is(tmp_path, monkeypatch):
    """Decoded at a fourth: the same place of the picture, a few levels beside it."""
    y, x = np.mgrid[:1003, :1501] / 1503
    picture = np.stack([x, y, (np.sin(9 * x) + np.cos(7 * y) + 2) / 4], -1)
    Image.fromarray((picture * 255).astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    whole = images.load(tmp_path / "x.jpg", 96)
    monkeypatch.setattr(picture_files, "LARGE", 1000)
    part = images.load(tmp_path / "x.jpg", 96)
    assert (part.source, part.sha256, part.image.size) == (whole.source, whole.sha256, whole.image.size)
    assert np.abs(np.asarray(part.image, int) - np.asarray(whole.image, int)).max() <= 6
    with Image.open(tmp_path / "x.jpg") as image, picture_files.opened(tmp_path / "x.jpg") as (file, opened):
        assert (
            picture_files.decoded(file, opened, images.cut(opened.size, 96).halved[-1]).size == (188, 126) < image.size
        )


def test_pictures_that_are_decoded_at_once_are_bounded():
    room, held, most = picture_files.Room(100), [], []

    def held_for_a_while(pixels):
        with room.entered() as take:
            take(pixels)
            held.append(min(pixels, 100))
            most.append(sum(held))
            time.sleep(0.002)
            held.remove(min(pixels, 100))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(held_for_a_while, [30, 80, 500, 10, 60, 40, 30, 100] * 5))
    assert 60 <= max(most) <= 100


def test_a_format_whose_decoder_takes_more_takes_more_of_the_room(tmp_path, monkeypatch):
    room, taken = picture_files.Room(10**6), []
    monkeypatch.setattr(picture_files, "room", room)
    monkeypatch.setattr(
        picture_files, "decoded", lambda *_: taken.append(room._whole - room._free) or Image.new("RGB", (64, 64))
    )
    for name in ("x.png", "x.webp"):
        Image.new("RGB", (96, 64)).save(tmp_path / name)
        images.load(tmp_path / name, 64)
    assert taken == [96 * 64, 96 * 64 * picture_files.MAX_PIXELS // picture_files.MAX_PIXELS_OF["WEBP"]]
    assert room._free == room._whole


def test_a_target_without_end_is_refused_at_once():
    for target in (3_200_000, 10**12, 8224):
        with pytest.raises(InputError, match="from 32 to 8192"):
            images.crop_sizes(target)
