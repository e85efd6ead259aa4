"""A picture is trained on as its viewer shows it: upright, in sRGB, with 8 bits a sample."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from lumina_fn import as_seen, images, picture_files
from lumina_fn.errors import InputError
from tests.support.odd import LOSSY, RAMP, SIZE, colours, near, saved

pytestmark = pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")


# Which way of walking through an array gives the upright picture, by the tag's value (EXIF 2.3: where row 0 and column 0 are seen).
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("tag", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_exif_turns_a_picture_before_it_is_cut(tmp_path, fmt, tag):
    stored = colours(64, 128)  # of about 96 x 96 pixels 64 x 128 is a size, and 128 x 64 too: nothing is cut
    exif = Image.Exif()
    exif[0x112] = tag
    loaded = images.load(saved(tmp_path, Image.fromarray(stored), fmt, exif=exif), 96)
    near(loaded.image, UPRIGHT[tag](stored), LOSSY.get(fmt, 0))
    assert loaded.source == loaded.image.size
    assert loaded.notes == ({"turned"} if fmt != "TIFF" else set())  # Pillow turns a TIFF itself


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description tiff:Orientation="%d" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"/></r:RDF></x:xmpmeta>'


@pytest.mark.parametrize("tag", [3, 6, 7])
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_xmp_turns_it_too(tmp_path, fmt, tag):
    stored, how = colours(64, 128), {"xmp": XMP % tag}
    if fmt == "PNG":
        from PIL.PngImagePlugin import PngInfo

        how = {"pnginfo": PngInfo()}
        how["pnginfo"].add_itxt("XML:com.adobe.xmp", (XMP % tag).decode())
    if fmt == "TIFF":
        how = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()}
        how["tiffinfo"][700] = XMP % tag
        how["tiffinfo"].tagtype[700] = 1
    loaded = images.load(saved(tmp_path, Image.fromarray(stored), fmt, **how), 96)
    near(loaded.image, UPRIGHT[tag](stored), LOSSY.get(fmt, 0))
    assert loaded.source == loaded.image.size


def test_a_large_jpeg_that_is_halved_by_its_decoder_is_turned(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x112] = 6
    path = saved(tmp_path, Image.fromarray(colours(300, 900)), "JPEG", exif=exif)
    whole = images.load(path, 96)
    monkeypatch.setattr(picture_files, "LARGE", 1000)
    decoded, sizes = picture_files.decoded, []
    monkeypatch.setattr(picture_files, "decoded", lambda *args: sizes.append((it := decoded(*args)).size) or it)
    part = images.load(path, 96)
    assert sizes == [(75, 225)]
    assert whole.source == part.source == (900, 300)
    assert whole.image.size == part.image.size
    assert whole.image.width > whole.image.height
    near(part.image, np.asarray(whole.image), 4)


@pytest.mark.parametrize("value", [0, 9, 1])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, value):
    exif = Image.Exif()
    exif[0x112] = value
    stored = colours(*SIZE)
    loaded = images.load(saved(tmp_path, Image.fromarray(stored), "PNG", exif=exif), 64)
    assert not loaded.notes
    assert images.load(tmp_path / "x.png", 64, seen=False).image.tobytes() == loaded.image.tobytes()


def test_tags_that_are_damaged_turn_nothing(tmp_path):
    path = saved(tmp_path, Image.fromarray(colours(*SIZE)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert not images.load(path, 64).notes


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_sixteen_bits_of_gray_are_scaled_to_eight(tmp_path, fmt):
    loaded = images.load(saved(tmp_path, Image.fromarray(RAMP), fmt), 64)
    want = images.fit(Image.fromarray(np.rint(RAMP / 257).astype(np.uint8)), 64)
    assert loaded.image.tobytes() == want.tobytes()
    assert loaded.notes == {"scaled"}
    stored = images.load(tmp_path / f"x.{fmt.lower()}", 64, seen=False)
    assert (np.asarray(stored.image) == 255).mean() > 0.9  # what the reference makes of it
    assert not stored.notes


def tiff(path, values: np.ndarray, order: str = "<", tags: dict[int, tuple[str, object]] = {}) -> None:  # noqa: B006
    """An uncompressed gray TIFF, which Pillow cannot write in all these kinds."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kinds = {"u": 1, "i": 2, "f": 3}
    entries = {
        256: ("H", values.shape[1]), 257: ("H", values.shape[0]), 258: ("H", 8 * values.dtype.itemsize), 259: ("H", 1),
        262: ("H", 1), 273: ("I", 8), 277: ("H", 1), 278: ("H", values.shape[0]), 279: ("I", len(data)),
        339: ("H", kinds[values.dtype.kind]),
    } | tags  # fmt: skip
    body = b"".join(
        struct.pack(order + "HHI", tag, {"H": 3, "I": 4, "f": 11}[kind], 1)
        + struct.pack(order + kind, value).ljust(4, b"\0")
        for tag, (kind, value) in sorted(entries.items())
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(order + "H", len(entries)) + body + bytes(4))


@pytest.mark.parametrize(
    ("order", "black_is_zero"), [("<", True), (">", True), ("<", False)]
)  # Pillow does not know the fourth
def test_a_tiff_says_which_way_its_gray_goes(tmp_path, order, black_is_zero):
    tiff(tmp_path / "x.tif", RAMP, order, {262: ("H", int(black_is_zero))})
    want = RAMP if black_is_zero else 65535 - RAMP
    loaded = images.load(tmp_path / "x.tif", 64)
    assert loaded.image.tobytes() == images.fit(Image.fromarray(np.rint(want / 257).astype(np.uint8)), 64).tobytes()


def test_a_range_that_the_file_tells_is_used(tmp_path):
    tiff(tmp_path / "x.tif", (RAMP / 65535).astype(np.float32) * 3 - 1, tags={340: ("f", -1.0), 341: ("f", 2.0)})
    near(images.load(tmp_path / "x.tif", 64).image.convert("L"), RAMP / 257, 0.6)


def test_the_transparent_colour_of_a_png_shows_white(tmp_path):
    stored = colours(*SIZE)
    stored[:, :32] = (1, 2, 3)
    saved(tmp_path, Image.fromarray(stored), "PNG", transparency=(1, 2, 3))
    assert images.load(tmp_path / "x.png", 64, seen=False).image.getpixel((0, 0)) != (255, 255, 255)
    assert images.load(tmp_path / "x.png", 64).image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("dtype", "says"), [(np.uint32, "32-bit"), (np.int32, "signed"), (np.int16, "signed"), (np.float32, "float")]
)
def test_samples_without_a_range_are_refused(tmp_path, dtype, says):
    tiff(tmp_path / "x.tif", (RAMP // 4).astype(dtype))
    with pytest.raises(InputError, match=f"its {says} samples have no known range"):
        images.load(tmp_path / "x.tif", 64)


def test_a_value_of_sixteen_bits_may_be_transparent(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP), "PNG")
    data = path.read_bytes()
    body = b"tRNS" + struct.pack(">H", int(RAMP[0, 0]))
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + chunk + data[33:])
    loaded = images.load(path, 64)
    assert loaded.image.getpixel((0, 0)) == (255, 255, 255)  # white shows through
    assert loaded.image.getpixel((40, 0)) != (255, 255, 255)


def test_a_plain_picture_stays_to_the_byte():
    from PIL import ImageCms

    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"):
        image = Image.fromarray(colours(*SIZE)).convert(mode)
        assert as_seen.as_seen(image).image is image
    image = Image.fromarray(colours(*SIZE))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seen = as_seen.as_seen(image)
    assert seen.image is image
    assert not seen.notes


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_is_divided_out(mode):
    straight = Image.fromarray(colours(*SIZE)).convert(mode.upper())
    straight.putalpha(128)
    seen = as_seen.as_seen(straight.convert(mode) if mode == "RGBa" else la_premultiplied(straight)).image
    near(images.whiten(seen), np.asarray(images.whiten(straight)).astype(float), 1.5)


def la_premultiplied(straight: Image.Image) -> Image.Image:
    values = np.asarray(straight).astype(int)
    values[..., 0] = values[..., 0] * values[..., 1] // 255
    return Image.frombytes("La", straight.size, values.astype(np.uint8).tobytes())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_of_which_nothing_is_visible_is_refused(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", SIZE, 0)
        image.putpalette([10, 20, 30])
        saved(tmp_path, image, "PNG", transparency=0)
    else:
        image = Image.fromarray(colours(*SIZE)).convert(mode)
        image.putalpha(0)
        saved(tmp_path, image, "PNG")
    with pytest.raises(InputError, match="nothing is visible in it"):
        images.load(tmp_path / "x.png", 64)
    assert images.load(tmp_path / "x.png", 64, seen=False).image.getextrema() == ((255, 255),) * 3


def test_one_colour_and_few_pixels_are_noted(tmp_path):
    note = lambda image: images.load(saved(tmp_path, image, "PNG"), 128).notes
    assert note(Image.new("RGB", (128, 128), (9, 8, 7))) == {"flat"}
    assert note(Image.fromarray(colours(31, 31))) == {"small"}
    assert note(Image.fromarray(colours(32, 32))) == set()


def test_notes_are_bits_and_names():
    for name in as_seen.NOTES:
        assert as_seen.names(as_seen.bits(frozenset([name]))) == [name]
    assert as_seen.SAID.keys() == set(as_seen.NOTES)


def test_heic_is_read_with_the_extra_and_named_without(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif")
    stored = colours(*SIZE)
    path = saved(tmp_path, Image.fromarray(stored), "HEIF")
    near(images.load(path, 64).image, stored, LOSSY["HEIF"])  # libheif itself turns a picture whose `irot` says so
    monkeypatch.delitem(Image.OPEN, "HEIF")
    with pytest.raises(InputError, match=r"a HEIC picture; to read it: pip install 'lumina-fn\[heif\]'"):
        images.load(path, 64)


def test_every_optional_decoder_is_here():
    """Where one is missing, its cases above would not have run."""
    assert features.check("avif")
    assert features.check("webp")
    assert features.check("jpg_2000")
