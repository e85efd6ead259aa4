"""Where a result may be written: never through a link, and never over an input of the run, under any of its names."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_fn.errors import InputError

LONGEST = 220  # bytes of a result's name: file systems allow 255, and temporary files beside it have longer names


@contextmanager
def writable(dst: str | Path) -> Iterator[None]:
    """Within the block an OSError, such as a full disk, becomes an InputError that names `dst`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {dst}: {error.strerror or error}; give a place that can be written") from error


def place(dst: str | Path, inputs: Iterable[Path] = ()) -> Path:
    """The absolute path of a folder to write. Raises InputError for a link, and for a folder that contains an input of the run.

    That includes inputs whose folder has a link into it.
    """
    with writable(dst):
        if Path(dst).is_symlink():
            raise InputError(f"{dst} is a link: name the folder itself, or remove the link")
        place = Path(os.path.realpath(dst))
        if len(os.fsencode(place.name)) > LONGEST:
            raise InputError(f"{dst}: its name is longer than {LONGEST} bytes: give a shorter one")
        for path in inputs:
            if Path(os.path.realpath(path)).is_relative_to(place):
                raise InputError(f"{dst} holds {path}, which this run reads: give another place")
            for link in _links(path) if place.exists() else ():
                if Path(os.path.realpath(link)).is_relative_to(place):
                    raise InputError(f"{dst} holds what {link} leads to, which this run reads: give another place")
    return place


def _links(path: Path) -> Iterator[Path]:
    """All links below a folder."""
    for root, folders, names in os.walk(path):
        yield from (found for name in (*folders, *names) if (found := Path(root, name)).is_symlink())


def place_of_file(dst: Path, inputs: Iterable[Path]) -> Path:
    """The path of a file to write. Raises InputError for a link, and for a file that is an input, under any of its names."""
    with writable(dst):
        if dst.is_symlink() or (dst.exists() and not dst.is_file()):
            raise InputError(f"{dst} is a link, a folder or a device: name a new file")
        for path in inputs:
            inside = (
                path.is_dir() and dst.exists() and Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(path))
            )
            if inside or (dst.exists() and path.exists() and dst.samefile(path)):
                raise InputError(f"{dst} is {path}, or lies in it, which this run reads: give another place")
    return dst
