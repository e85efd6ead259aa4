"""Tensors in files: the place of each one's bytes, and copies of them to a file or to memory, a chunk at a time."""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lumina_fn.disk import reading
from lumina_fn.errors import InputError, printable

INDEX = "model.safetensors.index.json"
MAX_HEADER = 16 << 20  # bytes; the 7.88B model's headers take 50 KB
MAX_RANK = 8
SHARD = 5_000_000_000  # bytes, Hugging Face's usual bound
CHUNK = 8 << 20

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U16": torch.uint16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """A tensor as bytes `offset .. offset + nbytes` of a file, little endian, in row-major order unless `stride` says otherwise."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    crc: int | None = None  # checksum of those bytes, if the file has one


class Later(NamedTuple):
    """A tensor that is made when it is written, and freed afterwards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


Source = Stored | Tensor | Later


def chunks(source: Source) -> Iterator[bytes | memoryview]:
    """The tensor's elements as bytes in row-major order, at most CHUNK bytes at a time if they are stored in that order."""
    if isinstance(source, Later):
        yield from chunks(source.make())
    elif isinstance(source, Tensor):
        flat = source.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        yield from (flat[i : i + CHUNK].data for i in range(0, flat.size, CHUNK))
    elif source.stride is not None:
        raw = torch.frombuffer(bytearray(b"".join(_raw(source))), dtype=source.dtype)
        yield from chunks(raw.as_strided(source.shape, source.stride).contiguous())
    else:
        yield from _raw(source)


def _raw(source: Stored) -> Iterator[bytes]:
    left, crc = source.nbytes, 0
    with reading.opened(source.file, "a file of tensors") as file:
        file.seek(source.offset)
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                raise InputError(f"{source.file} ends too early: it is truncated, get it again")
            left -= len(data)
            crc = zlib.crc32(data, crc) if source.crc is not None else 0
            yield data
    if source.crc is not None and crc != source.crc:
        raise InputError(f"{source.file} is damaged (a checksum differs): get it again")


def read(source: Stored | Later, device: str | torch.device, dtype: torch.dtype, name: str | None = None) -> Tensor:
    """The tensor in memory, read a chunk at a time. With `name`, raises InputError, which names it, for a number that is not finite."""
    out = torch.empty(math.prod(source.shape), device=device, dtype=dtype)
    _fill(out, source, name)
    return out.reshape(source.shape)


def read_range(source: Stored | Later, begin: int, end: int, out: Tensor, name: str | None = None) -> None:
    """Read elements begin .. end of the tensor, in row-major order, into `out`; the rest is not read."""
    if isinstance(source, Later) or source.stride is not None:  # rare: a .pt file may store a transposed tensor
        out.copy_(read(source, out.device, out.dtype, name).reshape(-1)[begin:end])
        return
    size = source.dtype.itemsize
    part = source._replace(
        offset=source.offset + begin * size, nbytes=(end - begin) * size, shape=(end - begin,), crc=None
    )
    _fill(out, part, name)


def _fill(out: Tensor, source: Source, name: str | None) -> None:
    begin = 0
    for data in chunks(source):
        part = torch.frombuffer(bytearray(data), dtype=source.dtype)
        # While the part is in the CPU's cache: 1/50 of the time of reading it. With NaN, minimum and maximum are NaN.
        if name is not None and not all(map(math.isfinite, torch.aminmax(part))):
            where = f"{source.file}: " if isinstance(source, Stored) else ""
            raise InputError(f"{where}{printable(name)} holds NaN or infinity: its weights are damaged, get them again")
        out[begin : begin + len(part)] = part.to(out.device)
        begin += len(part)


def safetensors_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name. Raises InputError if the file is truncated or its header is inconsistent."""
    return safetensors_file(path)[0]


def safetensors_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """`safetensors_header`, and the file's metadata."""
    with reading.opened(path, "a safetensors file") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(
                f"{path} is not a whole safetensors file ({size} bytes): it is truncated or something else, get it again"
            )
        if length > MAX_HEADER:
            raise InputError(f"{path} has a header of {length} bytes, more than {MAX_HEADER}: not a model's")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        about = dict(header.pop("__metadata__", None) or {})
        found = {name: _located(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} has a damaged safetensors header ({type(error).__name__}): get it again") from error
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise InputError(f"{path} has a damaged safetensors header (tensors overlap or leave gaps): get it again")
        end += tensor.nbytes
    if end != size:
        raise InputError(
            f"{path} has {size} bytes where its header says {end}: it is truncated or damaged, get it again"
        )
    return found, about


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _located(path: Path, data: int, entry: Mapping) -> Stored:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    if (
        len(shape) > MAX_RANK  # the product of millions of sizes takes hours
        or any(type(n) is not int or not 0 <= n < 1 << 62 for n in (begin, end, *shape))
        or math.prod(shape) * dtype.itemsize != end - begin
    ):
        raise ValueError("sizes and offsets do not match")
    return Stored(path, data + begin, end - begin, shape, dtype)


def write_safetensors(path: Path, tensors: Mapping[str, Source], progress: Callable[[int], None]) -> None:
    """Write one file, a chunk at a time; `progress` is called with the number of bytes of each chunk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + size_of(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for data in chunks(tensor):
                file.write(data)
                progress(len(data))


def write_shards(folder: Path, tensors: Mapping[str, Source], progress: Callable[[int], None] = lambda n: None) -> None:
    """Write safetensors files of at most SHARD bytes (more only for a single larger tensor) and their index, with Hugging Face's names."""
    shards = list(_shards(tensors.items()))
    where = {}
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, progress)
        where |= dict.fromkeys(shard, name)
    total = sum(size_of(t) for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")


def _shards(items: Iterable[tuple[str, Source]]) -> Iterator[dict[str, Source]]:
    shard, size = {}, 0
    for name, tensor in items:
        if shard and size + size_of(tensor) > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += size_of(tensor)
    yield shard


def size_of(tensor: Source) -> int:
    """The number of bytes of the tensor's elements."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
