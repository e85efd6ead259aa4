"""A shard's file, read a part at a time after its checksum was verified.

The file is not memory-mapped: if it is truncated while in use, a read raises an error, whereas a mapped page would kill the process by
a signal. It is opened for each read: a set has thousands of shards.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.formats.tensor_files import Stored, safetensors_file

EXPECTED = "a feature set of experiments.pretokenize, whole"
Identity = tuple[int, ...]


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Within the block errors become an InputError that names the file."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise InputError(f"{said}: the feature set is not whole; run experiments.pretokenize again") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file of a feature set. Raises InputError."""
    with whole(path), reading.opened(path, EXPECTED) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Parts:
    """The arrays of a shard, by name. Raises InputError, here and while reading, if the file is damaged or its SHA-256 is not `sha256`
    (None: unknown); the hash is checked once, and again after each change of the file."""

    def __init__(self, path: Path, sha256: str | None = None):
        self.path, self._sha256 = path, sha256
        with whole(path), reading.opened(path, EXPECTED) as file:
            self._as_checked = self._checked(file.fileno())
            self.stored, self.about = safetensors_file(path)

    def count(self, name: str) -> int:
        """The number of elements of a part."""
        return self.stored[name].nbytes // self.stored[name].dtype.itemsize

    def array(self, name: str) -> np.ndarray:
        """A whole part as an array."""
        (flat,) = self.slices({name: slice(0, self.count(name))})
        return flat.reshape(self.stored[name].shape)

    def slices(self, wanted: dict[str, slice]) -> list[np.ndarray]:
        """For each part these elements of it, as if it were flat."""
        with whole(self.path), reading.opened(self.path, EXPECTED) as file:
            if _identity(file.fileno()) != self._as_checked:
                self._as_checked = self._checked(file.fileno())
            return [_read(file.fileno(), self.stored[name], span) for name, span in wanted.items()]

    def _checked(self, fd: int) -> Identity:
        identity = _identity(fd)
        if self._sha256 is not None and digest(self.path) != self._sha256:
            raise ValueError("it is damaged (its checksum is not the one in the set's index)")
        return identity


def _identity(fd: int) -> Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(fd: int, part: Stored, span: slice) -> np.ndarray:
    size, dtype = part.dtype.itemsize, str(part.dtype).removeprefix("torch.")
    data = os.pread(fd, (span.stop - span.start) * size, part.offset + span.start * size)
    if len(data) != (span.stop - span.start) * size:
        raise ValueError("it ends too early")
    return np.frombuffer(data, dtype)
