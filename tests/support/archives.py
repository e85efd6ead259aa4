"""Datasets in archives: the same pictures and captions as a folder, as tars and as Parquet."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def drawn(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A PNG of noise."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: Sequence[tuple[str, bytes | str]]) -> Path:
    """A tar of these files, in their order; a text is where a link leads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            if isinstance(content, str):
                about.type, about.linkname = tarfile.SYMTYPE, content
            else:
                about.size = len(content)
            archive.addfile(about, io.BytesIO(b"" if isinstance(content, str) else content))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` WebDataset samples."""
    numbers = range(first, first + count)
    return [m for i in numbers for m in ((f"{i:05d}.png", drawn(i)), (f"{i:05d}.txt", f"picture {i}".encode()))]


def parquet(path: Path, columns: dict[str, list], rows_in_group: int = 3) -> Path:
    """A Parquet file of these columns."""
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.table(columns), path, row_group_size=rows_in_group)
    return path


def hub_columns(count: int, first: int = 0) -> dict[str, list]:
    """Columns as Hugging Face's datasets write pictures and captions."""
    numbers = range(first, first + count)
    return {
        "image": [{"bytes": drawn(i), "path": f"{i:05d}.png"} for i in numbers],
        "text": [f"picture {i}" for i in numbers],
    }
