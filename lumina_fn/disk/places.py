"""Where a result may go: never to a link, and never over what the run reads, by whatever name."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_fn.errors import InputError

LONGEST = 220  # bytes of a result's name: file systems take 255, and what lies beside it meanwhile is named after it


@contextmanager
def writable(dst: str | Path) -> Iterator[None]:
    """An OSError of the block, such as a full disk, is an InputError that names `dst`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {dst}: {error.strerror or error}; give a place that can be written") from error


def place(dst: str | Path, inputs: Iterable[Path] = ()) -> Path:
    """The absolute path of a folder that is to be written; InputError for a link, and for one that holds an input of the run.

    An input lies there too where a link in its folder leads there.
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
    """The links in a folder, to any depth."""
    for root, folders, names in os.walk(path):
        yield from (found for name in (*folders, *names) if (found := Path(root, name)).is_symlink())


def place_of_file(dst: Path, inputs: Iterable[Path]) -> Path:
    """The path of a file that is to be written; InputError for a link, and where it is an input, under whatever name."""
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
