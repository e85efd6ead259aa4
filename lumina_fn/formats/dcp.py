"""Checkpoint folders of torch.distributed.checkpoint (Megatron's torch_dist is one): the places of their tensors. No pickle is executed.

`.metadata` is a pickle with each tensor's shape and chunks, and each chunk's file, offset and length; a chunk is what torch.save
wrote. The pickle is read as inert records, and every number in it is checked against the files.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lumina_fn.disk import reading, untrusted_folder
from lumina_fn.errors import InputError, printable
from lumina_fn.formats import safe_pickle, tensor_files, torch_zip
from lumina_fn.formats.safe_pickle import Global, Record
from lumina_fn.formats.tensor_files import Later, Stored

METADATA = ".metadata"
MAX_BYTES = 64 << 20  # limit of .metadata: a 7.88B model on 8 ranks takes 0.5 MB, with AdamW's state four times that
MAX_OPS = 4_000_000

_WHERE = "torch.distributed.checkpoint."
_METADATA, _TENSOR, _CHUNK, _PROPERTIES, _INDEX = (
    Global(f"{_WHERE}metadata", name)
    for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex")
)
_STORAGE = Global(f"{_WHERE}filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_OLD_PROPERTIES = Global("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties")  # of torch < 2.3
_CLASSES = frozenset({_METADATA, _TENSOR, _CHUNK, _PROPERTIES, _INDEX, _STORAGE, _SIZE, _OLD_PROPERTIES})
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in torch_zip.DTYPES}

Sizes = tuple[int, ...]


class Chunk(NamedTuple):
    """The box of a tensor that begins at `offsets`."""

    offsets: Sizes
    sizes: Sizes


class Described(NamedTuple):
    """A tensor's shape, dtype and chunks, as .metadata describes them."""

    shape: Sizes
    dtype: torch.dtype
    chunks: list[Chunk]


class Place(NamedTuple):
    """Where a chunk's bytes lie: the file's name in the folder, offset and length in bytes."""

    name: str
    offset: int
    length: int


def tensors(
    folder: Path, wanted: Callable[[str], bool], top: Path | None = None
) -> tuple[dict[str, Stored | Later], list[str]]:
    """The wanted tensors of a folder by key, each checked to be complete; and the keys of everything else in it.

    A tensor of several chunks is assembled when it is written, one at a time. Raises InputError for any fault, such as a file
    outside of the folder (or outside of `top`, which contains it).
    """
    path = untrusted_folder.file(folder, METADATA, top)
    try:
        described, places, others = _read(path, wanted)
    except ValueError as error:
        raise InputError(
            printable(
                f"{path} is no metadata of torch.distributed.checkpoint ({error}): it is damaged, or of another kind"
            )
        ) from error
    files: dict[str, tuple[Path, int]] = {}
    used: list[tuple[str, int, int]] = []
    found: dict[str, Stored | Later] = {}
    for key, tensor in described.items():
        parts = []
        for chunk in tensor.chunks:
            place = places.get((key, chunk.offsets))
            if place is None:
                raise InputError(
                    printable(f"{path} does not say where {key} {list(chunk.offsets)} lies: it is damaged")
                )
            if place.name not in files:
                file = untrusted_folder.file(folder, place.name, top)
                files[place.name] = file, file.stat().st_size
            parts.append((chunk, _stored(*files[place.name], place, key, tensor.dtype, chunk)))
            used.append((place.name, place.offset, place.offset + place.length))
        found[key] = _assembled(tensor, parts)
    for (name, _, end), (other, begin, _) in pairwise(sorted(used)):
        if name == other and begin < end:
            raise InputError(
                printable(f"{path}: two chunks of {name} overlap at byte {begin}: it is damaged or a bomb")
            )
    return found, others


def _stored(file: Path, size: int, place: Place, key: str, dtype: torch.dtype, chunk: Chunk) -> Stored:
    if place.offset + place.length > size:
        raise InputError(
            printable(f"{file} has {size} bytes where {key} ends at {place.offset + place.length}: it is truncated")
        )
    stored = torch_zip.tensor(file, place.offset, place.length)
    if (stored.shape, stored.dtype) != (chunk.sizes, dtype):
        has, expected = (f"{d} {list(s)}" for d, s in ((stored.dtype, stored.shape), (dtype, chunk.sizes)))
        raise InputError(printable(f"{file} holds {has} for {key}, {METADATA} says {expected}: one of them is damaged"))
    return stored


def _assembled(tensor: Described, parts: list[tuple[Chunk, Stored]]) -> Stored | Later:
    if len(parts) == 1:
        return parts[0][1]

    def make() -> Tensor:
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        for chunk, stored in parts:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            out[box] = tensor_files.read(stored, "cpu", tensor.dtype)
        return out

    return Later(tensor.shape, tensor.dtype, make)


def _read(
    path: Path, wanted: Callable[[str], bool]
) -> tuple[dict[str, Described], dict[tuple[str, Sizes], Place], list[str]]:
    with reading.opened(path, "the metadata of a distributed checkpoint") as file:
        data = file.read(MAX_BYTES + 1)
    top = _fields(safe_pickle.loads(data, _CLASSES, MAX_BYTES, MAX_OPS), _METADATA)
    entries, storage = top.get("state_dict_metadata"), top.get("storage_data")
    if type(entries) is not dict or type(storage) is not dict:
        raise ValueError("it lists no tensors and places")
    described, others = {}, []
    for key, entry in entries.items():
        if type(key) is not str:
            raise ValueError("a key is no string")
        if type(entry) is Record and entry.kind == _TENSOR and wanted(key):
            described[key] = _described(key, _fields(entry, _TENSOR))
        else:
            others.append(key)
    return described, dict(_places(storage, described)), others


def _described(key: str, fields: Mapping) -> Described:
    properties, chunks = fields.get("properties"), fields.get("chunks")
    if type(properties) is not Record or type(properties.state) is not tuple or type(chunks) is not list:
        raise ValueError(f"{key} has no properties or chunks")
    match properties.state[:1]:
        case (Global("torch", str(name)),) if name in _DTYPES:
            dtype = _DTYPES[name]
        case _:
            raise ValueError(f"{key} has a dtype that is not read here")
    shape = _sizes(fields.get("size"))
    boxes = [Chunk(_sizes(f.get("offsets")), _sizes(f.get("sizes"))) for f in (_fields(c, _CHUNK) for c in chunks)]
    boxes = [box for box in boxes if math.prod(box.sizes)]  # a rank without a part of the tensor has an empty one
    if not _is_grid(shape, boxes):
        raise ValueError(f"the chunks of {key} do not cover its {list(shape)} elements exactly once")
    return Described(shape, dtype, boxes)


def _is_grid(shape: Sizes, chunks: list[Chunk]) -> bool:
    """Whether the chunks are the cells of a grid over the whole tensor, each exactly once, as every sharding makes them."""
    if any(not len(c.offsets) == len(c.sizes) == len(shape) for c in chunks):
        return False
    cells = 1
    for axis, n in enumerate(shape):
        edges = sorted({(c.offsets[axis], c.sizes[axis]) for c in chunks})
        end = 0
        for offset, size in edges:
            if offset != end:
                return False
            end += size
        if end != n:
            return False
        cells *= len(edges)
    return len(chunks) == len({c.offsets for c in chunks}) == cells


def _places(storage: Mapping, described: Mapping[str, Described]) -> Iterator[tuple[tuple[str, Sizes], Place]]:
    for index, info in storage.items():
        at, where = _fields(index, _INDEX), _fields(info, _STORAGE)
        key = at.get("fqn")
        if type(key) is not str or key not in described or "offset" not in at:
            continue
        name, offset, length = (where.get(field) for field in ("relative_path", "offset", "length"))
        if type(name) is not str or type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise ValueError("a place is no name, offset and length")
        if where.get("transform_descriptors"):
            raise ValueError("its chunks are compressed or otherwise transformed: save it without extensions")
        yield (key, _sizes(at["offset"])), Place(name, offset, length)


def _fields(value: object, kind: Global) -> dict:
    """The fields of a record of this kind."""
    if type(value) is not Record or value.kind != kind or type(value.state) is not dict:
        raise ValueError(f"it lacks a {kind.name}")
    return value.state


def _sizes(value: object) -> Sizes:
    match value:
        case Record(kind=kind, args=(tuple(sizes),)) if kind == _SIZE:
            if len(sizes) <= safe_pickle.MAX_RANK and all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
                return sizes
    raise ValueError("a shape or an offset is no tuple of whole numbers")
