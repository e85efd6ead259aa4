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
SECONDS = 60


def shown_by_imagemagick(path: Path, srgb: Path) -> Image.Image | None:
    """The first picture of a file, RGB over white; None where ImageMagick cannot read it."""
    command = ["convert", "-background", "white", f"{path}[0]", "-auto-orient", "-intent", "relative", "-black-point-compensation",
               "-profile", srgb, "-colorspace", "sRGB", "-flatten", "-depth", "8", "ppm:-"]  # fmt: skip
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
            counts.update(as_seen.named(loaded.notes))
            theirs = shown_by_imagemagick(path, srgb)
            if theirs is None:
                counts["not read by ImageMagick"] += 1
                continue
            counts["compared"] += 1
            want, got = (np.asarray(image).astype(float) for image in (images.fit(theirs, size), loaded.image))
            mean = np.abs(want - got).mean() if want.shape == got.shape else 255.0
            if mean > LEVELS:
                differ += 1
                print(printable(f"{path}: differs by {mean:.1f} in the mean ({loaded.image.size}, {theirs.size})"))
    for name, n in counts.most_common():
        print(printable(f"{n:>8}  {name}"))
    print(f"{differ} of {counts['compared']} differ by more than {LEVELS} of 255 in the mean")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
