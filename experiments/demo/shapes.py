"""The embedded default's pictures: one object each, drawn from a spec, captioned, and read back from pixels.

A picture is a function of its spec alone. Positions are whole multiples of the tokenizer's 8-pixel cell apart.
"""

import math
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

SIZE = 64
COLOURS = {
    "red": (214, 36, 40), "green": (40, 145, 60), "blue": (45, 85, 215), "yellow": (250, 212, 30),
    "purple": (135, 50, 165), "orange": (250, 128, 20), "cyan": (20, 195, 215), "brown": (120, 70, 30),
}  # fmt: skip
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (22, 22, 22),
    "gray": (135, 135, 135),
    "pink": (250, 180, 200),
    "mint": (165, 230, 180),
}
OLD, NEW = ("circle", "square", "triangle", "cross", "heart"), "star"
SHAPES = (*OLD, NEW)
POSITIONS = {
    "at the top left": (16, 16), "at the top": (32, 16), "at the top right": (48, 16),
    "at the left": (16, 32), "in the middle": (32, 32), "at the right": (48, 32),
    "at the bottom left": (16, 48), "at the bottom": (32, 48), "at the bottom right": (48, 48),
}  # fmt: skip
RADIUS = 14
FINE = 8  # pixels are averages of FINE x FINE samples


class Spec(NamedTuple):
    shape: str
    colour: str
    background: str
    position: str


def specs(shape: str) -> list[Spec]:
    """All 360 pictures of a shape."""
    return [Spec(shape, *rest) for rest in product(COLOURS, BACKGROUNDS, POSITIONS)]


def caption(spec: Spec) -> str:
    article = "an" if spec.colour[0] in "aeiou" else "a"
    return f"{article} {spec.colour} {spec.shape} {spec.position} on a {spec.background} background"


def outline(shape: str) -> list[list[tuple[float, float]]]:
    """Polygons whose union is the shape, in units of the radius, y downwards."""
    turn = lambda i, n: 2 * math.pi * i / n - math.pi / 2
    box = lambda w, h: [(-w, -h), (w, -h), (w, h), (-w, h)]
    match shape:
        case "circle":
            return [[(math.cos(turn(i, 90)), math.sin(turn(i, 90))) for i in range(90)]]
        case "square":
            return [box(0.88, 0.88)]
        case "triangle":
            return [[(0, -1), (1, 0.9), (-1, 0.9)]]
        case "cross":
            return [box(1, 0.34), box(0.34, 1)]
        case "heart":
            wave = lambda t: 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5
            angles = [2 * math.pi * i / 90 for i in range(90)]
            return [[(math.sin(t) ** 3, -wave(t) / 15) for t in angles]]
        case "star":
            radii = [1.08 if i % 2 == 0 else 0.46 for i in range(10)]
            return [[(r * math.cos(turn(i, 10)), r * math.sin(turn(i, 10)) + 0.06) for i, r in enumerate(radii)]]
    raise ValueError(f"no shape called {shape}")


@cache
def coverage(shape: str, position: str) -> Float[np.ndarray, "64 64"]:
    """How much of each pixel the object covers, 0..1."""
    canvas = Image.new("L", (SIZE * FINE, SIZE * FINE))
    cx, cy = POSITIONS[position]
    for polygon in outline(shape):
        ImageDraw.Draw(canvas).polygon(
            [((cx + RADIUS * x) * FINE - 0.5, (cy + RADIUS * y) * FINE - 0.5) for x, y in polygon], fill=255
        )
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255


def draw(spec: Spec) -> UInt8[np.ndarray, "64 64 3"]:
    part = coverage(spec.shape, spec.position)[..., None]
    colour, ground = (np.array(c, np.float32) for c in (COLOURS[spec.colour], BACKGROUNDS[spec.background]))
    return (colour * part + ground * (1 - part)).round().astype(np.uint8)
