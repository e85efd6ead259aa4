"""The JSON content of a checkpoint's manifest: every field with its type and range."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

Natural = Annotated[int, Meta(ge=0, le=1 << 53)]
Hashes = dict[str, tuple[Natural, Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]]]  # size and SHA-256, by file


@dataclass(frozen=True)
class Scalars:
    """The counters of a training state."""

    step: Natural
    skipped: Natural
    streak: Natural


@dataclass(frozen=True)
class Content:
    """The content of a manifest."""

    format: str
    step: Natural
    parts: Annotated[int, Meta(ge=1, le=1 << 20)]
    flat: bool
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    shapes: dict[str, list[Natural]]  # by tree path
    scalars: Scalars
    meta: dict[str, Any]
    indices: Hashes
