"""Metadata and chunks of a distributed checkpoint that mislead or attack are refused on one line, nothing run."""

import argparse
import io
import json
import os
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path, PosixPath

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lumina_fn import conversion, sources
from lumina_fn.errors import InputError
from lumina_fn.formats import names, safe_pickle, tensor_files
from tests.support.folders import SMALL, identical, small_state
from tests.support.mindspeed_runs import Change, native, refused, rewritten, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


KEY = "model.lm_head.weight"
INDEX = MetadataIndex(KEY, (0, 0))


@pytest.fixture
def there(tmp_path) -> Path:
    """A whole torch_dcp iteration whose config.json lies in it."""
    folder = save(tmp_path / "m", {"model": small_state(), "iteration": 5})
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def moved(**fields: object) -> Change:
    """The storage of one chunk with other fields."""

    def change(metadata: Metadata) -> None:
        info = metadata.storage_data[INDEX]
        for name, value in fields.items():
            setattr(info, name, value(getattr(info, name)) if callable(value) else value)

    return change


def cut(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Change:
    """One tensor with another shape and other chunks (offsets, sizes), all stored where the first one is."""

    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[KEY]
        entry.size = torch.Size(shape)
        entry.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in boxes]
        for offset, _ in boxes:
            metadata.storage_data[MetadataIndex(KEY, offset)] = metadata.storage_data[INDEX]

    return change


def stored_twice(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("model.model.embed_tokens.weight", (0, 0))] = metadata.storage_data[INDEX]


def placeless(metadata: Metadata) -> None:
    del metadata.storage_data[INDEX]


def of_dtype(dtype: object) -> Change:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[KEY].properties = TensorProperties(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (moved(relative_path="../secret"), "outside"),
        (moved(relative_path="/etc/passwd"), "outside"),
        (moved(relative_path="sub/__0_0.distcp"), "outside"),
        (moved(relative_path="link"), "outside"),
        (moved(relative_path="fifo"), "not a regular file"),
        (moved(relative_path="."), "outside"),
        (moved(relative_path=""), "not a regular file"),
        (moved(relative_path="a\nb\x1b[31m"), "outside"),
        (moved(relative_path=None), "a place is no name"),
        (moved(relative_path="__9_0.distcp"), "__9_0.distcp is missing"),
        (moved(offset=1 << 40), "truncated"),
        (moved(offset=-1), "a place is no name"),
        (moved(offset=True), "a place is no name"),
        (moved(offset=lambda n: n - 1), "cannot be read as a torch file"),
        (moved(offset=0, length=100), "cannot be read as a torch file"),
        (moved(length=0), "cannot be read as a torch file"),
        (moved(length=lambda n: n - 30), "cannot be read as a torch file"),
        (moved(length=1 << 62), "truncated"),
        (moved(transform_descriptors=["zstd"]), "transformed"),
        (placeless, "does not say where"),
        (stored_twice, "overlap"),
        (of_dtype(torch.float32), "one of them is damaged"),
        (of_dtype(torch.complex64), "dtype"),
        (of_dtype(3), "dtype"),
        (cut((40, 16)), "exactly once"),
        (cut((40, 16), ((0, 0), (20, 16))), "exactly once"),
        (cut((40, 16), ((0, 0), (20, 16)), ((10, 0), (30, 16))), "exactly once"),
        (cut((40, 16), ((0, 0), (20, 16)), ((21, 0), (19, 16))), "exactly once"),
        (cut((40, 16), ((0, 0), (20, 8)), ((20, 0), (20, 8)), ((0, 8), (20, 8))), "exactly once"),
        (cut((40, 16), ((0, 0), (40, 16)), ((0, 0), (40, 16))), "exactly once"),
        (cut((40, 16), ((0,), (40,))), "exactly once"),
        (cut((20, 16), ((0, 0), (20, 16))), "one of them is damaged"),
        (cut((40, 16), ((0, 0), (20, 16)), ((20, 0), (20, 16))), "one of them is damaged"),
        (cut((1 << 40, 1 << 20), ((0, 0), (1 << 40, 1 << 20))), "one of them is damaged"),
        (cut((1,) * 9, ((0,) * 9, (1,) * 9)), "no tuple of whole numbers"),
        (lambda m: m.state_dict_metadata.update({KEY: BytesStorageMetadata()}), "missing: lm_head.weight"),
        (lambda m: m.state_dict_metadata.update({KEY: TensorStorageMetadata(None, None, None)}), "no properties"),
        (lambda m: m.state_dict_metadata.update({KEY: 7}), "missing: lm_head.weight"),
        (lambda m: m.state_dict_metadata.update({"lm_head.weight": m.state_dict_metadata[KEY]}), "lm_head.weight"),
        (lambda m: setattr(m, "storage_data", None), "no tensors and places"),
        (lambda m: setattr(m, "storage_data", {INDEX: 3}), "_StorageInfo"),
        (lambda m: object.__setattr__(next(i for i in m.storage_data if i == INDEX), "fqn", {}), "does not say where"),
        (lambda m: {"state_dict_metadata": {}}, "lacks a Metadata"),
        (lambda m: [m], "lacks a Metadata"),
    ],
)  # fmt: skip
def test_metadata_that_misleads_is_refused(there, change, says):
    (there.parent / "secret").write_text("secret")
    (there / "link").symlink_to(there.parent / "secret")
    (there / "sub").mkdir()
    shutil.copy(there / "__0_0.distcp", there / "sub")
    os.mkfifo(there / "fifo")
    assert says in refused(rewritten(there, change))


def test_a_large_shape_takes_no_memory_and_a_cut_file_no_time(there):
    data = (there / "__0_0.distcp").read_bytes()
    for left in (0, 10, len(data) // 2, len(data) - 1):
        (there / "__0_0.distcp").write_bytes(data[:left])
        assert "truncated" in refused(there)
    flipped = bytearray(data)
    flipped[data.index(small_state()[KEY.removeprefix("model.")].view(torch.uint8).numpy().tobytes()) + 5] ^= 1
    (there / "__0_0.distcp").write_bytes(flipped)
    with pytest.raises(InputError, match="checksum"):
        conversion.convert(there, there.parent / "n", conversion.WRITERS["native"])
    assert not (there.parent / "n").exists()


def spoil_state(metadata: Metadata, evil: Evil) -> None:
    metadata.planner_data = {"a": evil, "b": [evil]}
    metadata.storage_meta = evil


def spoil_tensor(metadata: Metadata, evil: Evil) -> None:
    metadata.state_dict_metadata[KEY] = evil


def spoil_path(metadata: Metadata, evil: Evil) -> None:
    metadata.storage_data[INDEX].relative_path = evil


def spoil_dtype(metadata: Metadata, evil: Evil) -> None:
    metadata.state_dict_metadata[KEY].properties.dtype = evil


@pytest.mark.parametrize("spoil", [spoil_state, spoil_tensor, spoil_path, spoil_dtype, lambda _, evil: evil])
def test_nothing_that_metadata_asks_for_is_run(there, spoil):
    before, mark = set(sys.modules), there.parent / "ran"
    rewritten(there, lambda metadata: spoil(metadata, Evil(mark)))
    if spoil is spoil_state:
        assert identical(native(there, there.parent / "n"), small_state())
    else:
        refused(there)
    assert not mark.exists()
    assert set(sys.modules) == before


def test_nothing_that_a_chunk_asks_for_is_run(there):
    mark = there.parent / "ran"
    for value in (Evil(mark), {"t": torch.zeros(40, 16)}, [Evil(mark)]):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        (there / "__7_0.distcp").write_bytes(buffer.getvalue())
        rewritten(there, moved(relative_path="__7_0.distcp", offset=0, length=len(buffer.getvalue())))
        assert "no tensor" in refused(there)
    assert not mark.exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".metadata", "__0_0.distcp"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 10**6) | st.none(),
)
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_a_damaged_folder_is_read_right_or_refused(there, name, changes, length):
    """Never a traceback, never a wrong weight in silence."""
    whole = (there / name).read_bytes()
    data = bytearray(whole)
    for place, byte in changes:
        data[place % len(data)] = byte
    (there / name).write_bytes(data if length is None else data[: length % len(data)])
    with suppress(InputError):
        source = sources.open_source(there)
        read = {path: tensor_files.read(t, "cpu", t.dtype) for path, t in source.tensors.items()}
        assert identical({names.to_source(path, names.TRANSFORMER): t for path, t in read.items()}, small_state())
    (there / name).write_bytes(whole)


def test_only_the_named_classes_become_records_and_none_is_imported():
    size, path = safe_pickle.Global("torch", "Size"), pickle.dumps(PosixPath("/a"))
    data = pickle.dumps([torch.Size((2, 3)), argparse.Namespace(a=1)])
    record, other = safe_pickle.loads(data, frozenset({size}))
    assert (record.kind, record.args) == (size, ((2, 3),))
    assert type(other) is safe_pickle.Inert
    assert [type(v) for v in safe_pickle.loads(data)] == [safe_pickle.Inert] * 2
    assert type(safe_pickle.loads(path, frozenset({size}))) is safe_pickle.Inert
