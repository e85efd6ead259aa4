"""Read every file below a folder as pretokenize would: `python -m tests.odd_pictures DIR [--size 256]`.

Each file is done or refused with a reason. Those that are done are compared with what ImageMagick, an independent reader, makes of
them: upright, in sRGB, over white. A line names each that differs by more than LEVELS of 255 in the mean; exit code 1 if one does.
"""

import io
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from lumina_fn import as_seen, images
from lumina_fn.errors import InputError, printable

LEVELS = 2
# Files of the suites of Pillow, image-rs and libvips (2026-11) that ImageMagick 6.9.11 reads otherwise, and why ours is believed.
KNOWN = {
    "Bretagne2_4": "JPEG 2000 whose picture begins at 150, 300 of its grid: ImageMagick 6 takes that off its size a second time",
    "xmp_tags_orientation": "ImageMagick 6 does not turn a picture by XMP",
    "transparency.avif": "ImageMagick 6 has no alpha of AVIF",
    "avif-orientation-6": "ImageMagick 6 has no profile of AVIF",
    "hopper2I": "white is zero in 2 bits: ImageMagick shows the negative of hopper.ppm",
    "hopper4I": "white is zero in 4 bits: ImageMagick shows the negative of hopper.ppm",
    "old-style-jpeg": "YCbCr that ImageMagick shows as RGB, green all over",
    "ojpeg": "YCbCr that ImageMagick shows as RGB",
    "subsampled.tif": "YCbCr that ImageMagick shows as RGB, green all over",
    "basn6a16": "half transparent: ImageMagick mixes with white before it takes the gamma away",
    "pil123": "half transparent: ImageMagick mixes with white before it takes the gamma away",
    "hopper.Lab.tif": "2.5 levels of L*a*b*, whose white the file does not tell",
    "badrle.bmp": "damaged: the rest of the rows is black here, white there",
    "issue_1455": "a first frame beside its canvas",
    "border_touching_layers": "a first frame smaller than its canvas, around which Pillow shows the background",
    "oob.gif": "a first frame beside its canvas",
    "R5_G5_B5": "a BMP of 16 bits with alpha, which Pillow does not read and image-rs does",
    "rgb32fakealpha": "a BMP whose fourth byte is no alpha, which ImageMagick takes for one",
    "small.bmp": "a BMP whose fourth byte is no alpha, which ImageMagick takes for one",
    "pal8os2v2.bmp": "the palette of OS/2, which ImageMagick misreads: the picture is that of pal8.bmp",
    "issue412.jp2": "a palette in JPEG 2000 whose columns Pillow and ImageMagick assign to other channels",
}
SECONDS = 60


def shown_by_imagemagick(path: Path, srgb: Path) -> Image.Image | None:
    """The first picture of a file, RGB over white; None where ImageMagick cannot read it."""
    command = ["convert", "-background", "white", f"{path}[0]", *(["-coalesce"] if path.suffix == ".gif" else []), "-auto-orient", "-alpha", "remove", "-intent", "relative", "-black-point-compensation",
               "-profile", srgb, "-colorspace", "sRGB", "-depth", "8", "ppm:-"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)
        return Image.open(io.BytesIO(done.stdout)).convert("RGB")
    except (subprocess.SubprocessError, OSError):
        return None


def main(argv: list[str]) -> int:
    """Print what became of each kind of file; the exit code."""
    folder, size = Path(argv[0]), int(argv[argv.index("--size") + 1]) if "--size" in argv else 256
    counts: Counter[str] = Counter()
    differ = 0
    with tempfile.TemporaryDirectory() as own:
        srgb = Path(own, "srgb.icc")
        srgb.write_bytes(as_seen.SRGB.tobytes())
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            try:
                loaded = images.load(path, size)
            except InputError as error:
                counts[f"refused: {error}"[:60]] += 1
                continue
            counts["done"] += 1
            counts.update(loaded.notes)
            theirs = shown_by_imagemagick(path, srgb)
            if theirs is None:
                counts["not read by ImageMagick"] += 1
                continue
            counts["compared"] += 1
            # Before the cut, which resizes a palette's picture by nearest neighbour, as the reference does.
            whole = images.whiten(as_seen.as_seen(images.open_image(path)).image)
            want, got = (np.asarray(image).astype(float) for image in (theirs, whole))
            mean = np.abs(want - got).mean() if want.shape == got.shape else 255.0
            reason = next((why for name, why in KNOWN.items() if name in path.name), None)
            if mean > LEVELS and reason:
                counts[f"otherwise in ImageMagick: {reason}"] += 1
            elif mean > LEVELS:
                differ += 1
                print(printable(f"{path}: differs by {mean:.1f} in the mean ({whole.size}, {theirs.size})"))
    for name, n in counts.most_common():
        print(printable(f"{n:>8}  {name}"))
    print(f"{differ} of {counts['compared']} differ by more than {LEVELS} of 255 in the mean")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
