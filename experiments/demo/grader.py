"""Reads a picture back into the spec it shows, from pixels alone; a picture is right only if every part of the spec is."""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from experiments.demo.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Spec, coverage

COLOUR_TOLERANCE = 45.0  # RGB distance of a region's median from the palette
SPECK = 10  # pixels: a smaller spot is no second object
LEAST_OVERLAP = 0.82  # intersection over union with the shape's template
WORST_CELL = 16  # pixels of an 8 x 8 cell that may lie on the wrong side of the outline or have some third colour

Picture = UInt8[np.ndarray, "64 64 3"]
Mask = Bool[np.ndarray, "64 64"]


def distance(picture: Picture, colour) -> Float[np.ndarray, "64 64"]:
    return np.linalg.norm(picture.astype(np.float32) - np.array(colour, np.float32), axis=-1)


def name(colour, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The palette's nearest name, or None where it is further than COLOUR_TOLERANCE."""
    off = {n: np.linalg.norm(np.subtract(colour, c)) for n, c in palette.items()}
    best = min(off, key=off.get)
    return best if off[best] <= COLOUR_TOLERANCE else None


def grow(mask: Mask) -> Mask:
    wide = np.pad(mask, 1)
    return mask | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def along_rows(part: Mask, mask: Mask) -> Mask:
    """`part` spread over every horizontal run of `mask` that it touches."""
    run = np.cumsum(~np.pad(mask, ((0, 0), (0, 1)))).reshape(len(mask), -1)[:, :-1]
    touched = np.zeros(run.max() + 1, bool)
    touched[run[part]] = True
    return touched[run] & mask


def objects(mask: Mask) -> list[Mask]:
    """The 4-connected parts of a mask that have at least SPECK pixels."""
    found, mask = [], mask.copy()
    while mask.any():
        part = np.zeros_like(mask)
        part.flat[mask.argmax()] = True
        size = 0
        while part.sum() > size:
            size = part.sum()
            part = along_rows(along_rows(part, mask).T, mask.T).T
        mask &= ~part
        if size >= SPECK:
            found.append(part)
    return found


def read(picture: Picture) -> Spec | None:
    """The spec this picture shows, or None where it shows no clean single object of a known shape, colour and place."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    background = name(np.median(edge, 0), BACKGROUNDS)
    if background is None:
        return None
    off_ground = distance(picture, BACKGROUNDS[background])
    found = objects(off_ground > COLOUR_TOLERANCE)
    if len(found) != 1:
        return None
    core = found[0] & ~grow(~found[0])
    colour = name(np.median(picture[core], 0), COLOURS) if core.any() else None
    if colour is None:
        return None
    off_object = distance(picture, COLOURS[colour])
    seen = off_object < off_ground
    if len(objects(seen)) != 1:
        return None
    rows, columns = np.nonzero(seen)
    centre = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    position = min(POSITIONS, key=lambda p: np.hypot(*np.subtract(POSITIONS[p], centre)))
    templates = {shape: coverage(shape, position) >= 0.5 for shape in SHAPES}
    overlap = {shape: (seen & t).sum() / (seen | t).sum() for shape, t in templates.items()}
    shape = max(overlap, key=overlap.get)
    inside = templates[shape]
    away = (inside & ~grow(~inside) & (off_object > 1.5 * COLOUR_TOLERANCE)) | (
        ~grow(inside) & (off_ground > 1.5 * COLOUR_TOLERANCE)
    )
    worst = ((seen != inside) | away).reshape(8, 8, 8, 8).sum((1, 3)).max()
    if overlap[shape] < LEAST_OVERLAP or worst > WORST_CELL:
        return None
    return Spec(shape, colour, background, position)


def grade(picture: Picture, spec: Spec) -> bool:
    return read(picture) == spec
