"""What the demo shows: the sheet of pictures before and after, the loss curve, and how sure the shares are."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIDE, GAP = 4, 112, 10  # pixels
GREEN, RED, INK, FAINT, PAPER = (35, 150, 70), (205, 55, 50), (25, 25, 25), (115, 115, 115), (250, 250, 250)


class Shown(NamedTuple):
    caption: str
    before: Image.Image
    before_right: bool
    after: Image.Image
    after_right: bool


def wilson(right: int, n: int, z: float = 1.96) -> float:
    """The lower end of the 95 % interval of a share of which `right` in n were seen."""
    p = right / n
    return (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def sheet(
    path: Path, title: str, training: Sequence[Image.Image], shown: Sequence[Shown], footer: Sequence[str]
) -> None:
    """A strip of training pictures, each caption with [before | after] framed in the grader's verdict, and the totals."""
    small, normal, large = (ImageFont.load_default(size) for size in (11, 13, 20))
    cell_w, cell_h, strip = 2 * SIDE + 4 * GAP, SIDE + 58, SIDE // 2
    rows = math.ceil(len(shown) / COLUMNS)
    top = 76 + strip + 2 * GAP
    width = COLUMNS * cell_w + 2 * GAP
    page = Image.new("RGB", (width, top + rows * cell_h + 24 * len(footer) + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((2 * GAP, 12), title, INK, large)
    pen.text((2 * GAP, 48), "some of the pictures it was fine-tuned on:", FAINT, normal)
    for i, picture in enumerate(training[: (width - 4 * GAP) // (strip + 6)]):
        page.paste(picture.resize((strip, strip), Image.Resampling.LANCZOS), (2 * GAP + i * (strip + 6), 70))
    for i, item in enumerate(shown):
        x, y = 2 * GAP + i % COLUMNS * cell_w, top + i // COLUMNS * cell_h
        first, _, second = item.caption.partition(" on a ")
        pen.text((x, y), first, INK, small)
        pen.text((x, y + 14), f"on a {second}   [before | after]", FAINT, small)
        for j, (picture, right) in enumerate(((item.before, item.before_right), (item.after, item.after_right))):
            a, b = x + j * (SIDE + GAP), y + 34
            pen.rectangle((a - 3, b - 3, a + SIDE + 2, b + SIDE + 2), GREEN if right else RED)
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (a, b))
    for i, line in enumerate(footer):
        pen.text((2 * GAP, top + rows * cell_h + 24 * i + GAP), line, INK, normal)
    page.save(path)


def loss_curve(path: Path, metrics: Path) -> None:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["ce"] for r in rows], color="#20603c")
    axes.set(
        xlabel="step", ylabel="cross-entropy of a token (nats)", yscale="log", title="Fine-tuning the embedded default"
    )
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
