"""torch's zip files (.pt, .ckpt): read without executing their pickle or loading their tensors, written a chunk at a time."""

import collections
import errno
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch._utils import _rebuild_tensor_v2

from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.formats import safe_pickle
from lumina_fn.formats.tensor_files import Source, Stored, chunks, size_of

ALIGN = 64  # bytes, as torch does
_KINDS = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
DTYPES = frozenset(_KINDS.values())
_CLASSES = {dtype: getattr(torch, name) for name, dtype in _KINDS.items()}


class _Bounded(io.FileIO):
    """Bytes begin .. begin + length of a file, as a file; it refuses a read of more than a bounded size, such as a huge list of members."""

    def __init__(self, path: Path, begin: int = 0, length: int | None = None) -> None:
        super().__init__(reading.descriptor(path), "r")
        self.begin = begin
        self.end = super().seek(0, io.SEEK_END) if length is None else begin + length
        self.seek(0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: self.begin, io.SEEK_CUR: super().tell(), io.SEEK_END: self.end}[whence]
        if place < self.begin:
            raise OSError(errno.EINVAL, "a place before the beginning")
        return super().seek(place) - self.begin

    def tell(self) -> int:
        return super().tell() - self.begin

    def read(self, size: int = -1) -> bytes:
        if size > safe_pickle.MAX_BYTES:
            raise zipfile.BadZipFile(f"it asks for {size} bytes at once")
        size = safe_pickle.MAX_BYTES if size < 0 else size
        return super().read(min(size, max(self.end - super().tell(), 0)))


def state_dict(path: Path, *keys: str) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of the first of `keys` that is a dict in the file, else those of the file itself; and the names of all other entries.

    Nothing in the file is executed. Raises InputError for a damaged file, a compressed member, or tensors that claim more bytes
    than the file has.
    """
    with _archive(path) as (file, members, root):
        if not isinstance(root, dict):
            raise ValueError("it holds no dict of tensors")
        key = next((key for key in keys if isinstance(root.get(key), dict)), None)
        entries = root if key is None else root[key]
        refs = {name: ref for name, ref in entries.items() if type(ref) is safe_pickle.TensorRef}
        located = {}
        found = {name: _stored(path, file, members, located, ref) for name, ref in refs.items()}
    if sum(size_of(t) for t in found.values()) > 2 * path.stat().st_size:  # twice its size: weights may be tied
        raise InputError(f"{path}: its tensors claim more bytes than the file has: it is damaged or a bomb")
    beside = [] if key is None else [name for name in root if name != key]
    return found, [name for name in entries if name not in refs] + beside


def tensor(path: Path, begin: int, length: int) -> Stored:
    """The one tensor that torch.save wrote into bytes begin .. begin + length of a file; nothing is executed."""
    with _archive(path, begin, length) as (file, members, root):
        if type(root) is not safe_pickle.TensorRef:
            raise ValueError(f"byte {begin} begins something that is no tensor")
        return _stored(path, file, members, {}, root)


@contextmanager
def _archive(path: Path, begin: int = 0, length: int | None = None) -> Iterator[tuple[_Bounded, dict, object]]:
    """The file, its members and the value of its pickle. Raises InputError for any fault."""
    try:
        with _Bounded(path, begin, length) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            root = safe_pickle.loads(_bytes(file, members["data.pkl"]))
            if "byteorder" in members and _bytes(file, members["byteorder"]) != b"little":
                raise ValueError("its numbers are not little endian")
            yield file, members, root
    except InputError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        old = "; files of torch < 1.6 must be saved again by a current torch"
        raise InputError(f"{path} cannot be read as a torch file ({error}): it is damaged, or not one{old}") from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by their names below the archive's single folder."""
    infos = archive.infolist()
    pickles = [i.filename for i in infos if i.filename.endswith("/data.pkl") and i.filename.count("/") == 1]
    if len(pickles) != 1:
        raise zipfile.BadZipFile("it has no data.pkl, or several")
    prefix = pickles[0].removesuffix("data.pkl")
    members = {i.filename.removeprefix(prefix): i for i in infos}
    if len(members) != len(infos):
        raise zipfile.BadZipFile("a member's name occurs twice")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise zipfile.BadZipFile(f"{info.filename} is compressed or encrypted, torch's files are not")
    return members


def _bytes(file: _Bounded, info: zipfile.ZipInfo) -> bytes:
    file.seek(_data_offset(file, info))
    data = file.read(info.file_size)
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is damaged")
    return data


def _stored(
    path: Path, file: _Bounded, members: Mapping, located: dict[str, int], ref: safe_pickle.TensorRef
) -> Stored:
    storage, info = ref.storage, members.get(f"data/{ref.storage.key}")
    if storage.kind not in _KINDS or info is None:
        raise ValueError(f"a tensor's storage {storage.kind} {storage.key} is unknown or missing")
    dtype = _KINDS[storage.kind]
    extent = 1 + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True)) if math.prod(ref.shape) else 0
    if (
        storage.numel * dtype.itemsize > info.file_size
        or ref.offset + max(extent, math.prod(ref.shape)) > storage.numel
    ):
        raise ValueError("a tensor is larger than its storage")
    if storage.key not in located:
        located[storage.key] = _data_offset(file, info)
    strided = math.prod(ref.shape) and not _row_major(ref.shape, ref.stride)
    nbytes = extent * dtype.itemsize
    whole = nbytes == info.file_size
    begin = file.begin + located[storage.key] + ref.offset * dtype.itemsize
    return Stored(path, begin, nbytes, ref.shape, dtype, ref.stride if strided else None, info.CRC if whole else None)


def _row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True


def _data_offset(file: _Bounded, info: zipfile.ZipInfo) -> int:
    end = file.seek(0, io.SEEK_END)
    file.seek(min(max(info.header_offset, 0), end))
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"{info.filename} has no header")
    begin = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if begin + info.file_size > end:
        raise zipfile.BadZipFile(f"{info.filename} is truncated")
    return begin


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Tensor:
    """Is pickled as torch's record of a contiguous tensor."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple:
        stride = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if type(value) is not _Storage:
            return None
        return "storage", _CLASSES[value.dtype], value.key, "cpu", value.numel


def write(
    path: Path, key: str, tensors: Mapping[str, Source], progress: Callable[[int], None] = lambda n: None
) -> None:
    """Write `{key: tensors}` in torch.save's format, a chunk at a time; `progress` is called with the number of bytes of each chunk."""
    records = {
        name: _Tensor(_Storage(t.dtype, str(i), math.prod(t.shape)), tuple(t.shape))
        for i, (name, t) in enumerate(tensors.items())
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({key: records})
    with zipfile.ZipFile(path, "x") as archive:
        _member(archive, "data.pkl", len(buffer.getvalue()), [buffer.getvalue()], lambda n: None)
        _member(archive, "byteorder", 6, [b"little"], lambda n: None)
        for i, tensor in enumerate(tensors.values()):
            _member(archive, f"data/{i}", size_of(tensor), chunks(tensor), progress)
        _member(archive, "version", 2, [b"3\n"], lambda n: None)


def _member(archive: zipfile.ZipFile, name: str, size: int, data, progress: Callable[[int], None]) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    zip64 = size >= 1 << 31
    assert archive.fp is not None, "the archive is open"
    header = archive.fp.tell() + 30 + len(info.filename) + 4 + 20 * zip64
    padding = -header % ALIGN
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as file:
        for part in data:
            file.write(part)
            progress(len(part))
