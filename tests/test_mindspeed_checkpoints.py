"""What MindSpeed-MM's training saves converts bit by bit; what would mislead or attack is refused on one line, nothing run."""

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PosixPath

import pytest
import torch
import torch.distributed.checkpoint as real
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lumina_fn import checkpoint, convert, mindspeed, names, safe_pickle, sources, tensor_files
from lumina_fn.errors import InputError
from tests.folders import SMALL, identical, small_state, write_hf

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

OPTIMIZER = {"state": {"exp_avg": torch.zeros(40, 16), "step": 3}, "param_groups": [{"lr": 2e-5}]}
RNG = [{"random_rng_state": (3, (1, 2), None), "cuda_rng_state": torch.zeros(16, dtype=torch.uint8)}]
BESIDE = {"args": argparse.Namespace(bf16=True, path=Path("/")), "checkpoint_version": 3.0, "iteration": 5,
          "optimizer": OPTIMIZER, "opt_param_scheduler": {"max_lr": 2e-5}, "rng_state": RNG}  # fmt: skip


def tracked(top: Path, iteration: int = 5) -> Path:
    """The folder that holds this iteration, as the newest one of `top`."""
    folder = top / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (top / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    (top / "config.json").write_text(json.dumps(SMALL))
    return folder


def save(folder: Path, state: dict, threads: int = 1) -> Path:
    real.save(state, storage_writer=real.FileSystemWriter(folder, thread_count=threads), no_dist=True)
    return folder


def native(path: Path, to: Path) -> dict[str, Tensor]:
    """The tensors of the native folder that `path` converts to, under Hugging Face's names."""
    convert.convert(path, to, convert.WRITERS["native"])
    tensors = {
        key: tensor_files.read(t, "cpu", t.dtype)
        for file in to.glob("*.safetensors")
        for key, t in tensor_files.safetensors_header(file).items()
    }
    return {names.to_source(key, names.TRANSFORMER): tensor for key, tensor in tensors.items()}


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        sources.open_source(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_iteration_in_one_file_is_read_without_its_optimizer(tmp_path):
    file = tracked(tmp_path / "m") / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir()
    torch.save({"model": small_state()} | BESIDE, file)
    assert identical(native(tmp_path / "m", tmp_path / "n"), small_state())
    (remark,) = sources.open_source(tmp_path / "m").remarks
    assert "optimizer" in remark
    assert "rng_state" in remark
    (file.parents[1] / "config.json").write_text(json.dumps(SMALL))
    assert identical(native(file.parents[1], tmp_path / "n2"), small_state())
    (file.parents[1] / "mp_rank_01").mkdir()
    assert "mp_rank_01" in refused(tmp_path / "m")


def test_tensors_saved_from_an_npu_are_read(tmp_path):
    """torch_npu pickles them under a name of its own, with the storage on the CPU."""

    class FromNPU(torch.Tensor):
        def __reduce_ex__(self, protocol):
            plain = self.as_subclass(torch.Tensor)
            return rebuild, (plain._typed_storage(), 0, tuple(plain.shape), plain.stride(), False, {}, 2)

    def rebuild(*_):
        raise AssertionError("a file's function ran")

    rebuild.__module__, rebuild.__qualname__ = "torch_npu.utils.storage", "_rebuild_npu_tensor"
    module = type(sys)("torch_npu.utils.storage")
    module._rebuild_npu_tensor = rebuild
    file = tracked(tmp_path / "m") / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
            patch.setitem(sys.modules, name, module)
        torch.save({"model": {key: t.as_subclass(FromNPU) for key, t in small_state().items()}}, file)
    assert identical(native(tmp_path / "m", tmp_path / "n"), small_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_torch_dcp_iteration_of_weights_and_optimizer_is_read(tmp_path, dtype):
    state = small_state(dtype)
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous().T  # stored column by column
    folder = save(tracked(tmp_path / "m"), {"model": state} | BESIDE, threads=3)
    assert len(list(folder.glob("*.distcp"))) == 3
    assert identical(native(tmp_path / "m", tmp_path / "n"), small_state(dtype))
    (remark,) = sources.open_source(tmp_path / "m").remarks
    assert "optimizer (3)" in remark
    (folder / "config.json").write_text(json.dumps(SMALL))
    assert identical(native(folder, tmp_path / "n2"), small_state(dtype))


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model.module.model."])
def test_a_torch_dist_iteration_is_read(tmp_path, prefix):
    """The layout of Megatron-LM: sharded tensors' own keys at the top, objects as `NAME/shard_I_N`, the rest in common.pt."""
    folder = tracked(tmp_path / "m")
    wrapped = {
        f"{prefix}{key}".replace("layers.1.", "layers.1._fsdp_wrapped_module."): t for key, t in small_state().items()
    }
    objects = {
        "rng_state/shard_0_1": RNG,
        "optimizer.state.exp_avg.model.x": torch.zeros(3),
        "chained_0.optimizer.y": torch.ones(2),
    }
    save(folder, wrapped | objects, threads=2)
    torch.save({"args": argparse.Namespace(), "iteration": 5}, folder / "common.pt")
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(config))
    assert identical(native(tmp_path / "m", tmp_path / "n"), small_state())
    assert checkpoint.load_model(tmp_path / "m")[1] == checkpoint.load_model(tmp_path / "n")[1]
    (folder / "metadata.json").write_text(json.dumps(config | {"sharded_backend": "zarr"}))
    assert "'zarr'" in refused(tmp_path / "m")


def test_a_norm_that_use_fsdp1_saved_in_part_takes_the_rest_from_its_base_or_is_refused(tmp_path):
    """Rank 1 of 2 wrote its half, into a file with its name."""
    state = {f"module.model.{key}": t for key, t in small_state().items()}
    norm = state["module.model.model.norm.weight"]
    base = write_hf(tmp_path / "base", small_state() | {"model.norm.weight": norm + 1}, SMALL)
    folder = save(tracked(tmp_path / "m"), state | {"module.model.model.norm.weight": norm[8:].clone()})
    (folder / "__0_0.distcp").rename(folder / "__1_0.distcp")

    def by_rank_1(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "__1_0.distcp"

    rewritten(folder, by_rank_1)
    assert "only 8 of the 16 values of model.norm.weight" in refused(tmp_path / "m")
    source = sources.open_source(tmp_path / "m", base)
    assert "values 8 .. 15 are the checkpoint's" in source.remarks[0]
    assert convert.main([*map(str, (tmp_path / "m", tmp_path / "n")), "--to", "native", "--norm-from", str(base)]) == 0
    got = native(tmp_path / "n", tmp_path / "n2")
    assert identical(got, small_state() | {"model.norm.weight": torch.cat([norm[:8] + 1, norm[8:]])})
    with pytest.raises(InputError, match="leave --norm-from out"):
        sources.open_source(save(tmp_path / "whole", {"model": small_state()}), base)
    with pytest.raises(InputError, match="leave --norm-from out"):
        sources.open_source(tmp_path / "n", base)


def test_a_release_folder_may_be_distributed_too(tmp_path):
    save(tmp_path / "m" / "release", {"model": small_state()})
    (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert identical(native(tmp_path / "m", tmp_path / "n"), small_state())


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        ("module.model.model.norm.weight", "model.norm.weight"),
        ("model._fsdp_wrapped_module.model.layers.1._checkpoint_wrapped_module.x", "model.layers.1.x"),
        ("other.model.norm.weight", "other.model.norm.weight"),
        ("model.my_orig_mod.x", "model.my_orig_mod.x"),
    ],
)
def test_what_stands_around_a_name_is_taken_off(key, plain):
    assert mindspeed.plain_key(key) == plain


TWO_RANKS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, StateDictType
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
from tests.folders import small_state
rank, out, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=2)
state = small_state()
if kind == "dtensor":
    mesh = init_device_mesh("cpu", (2,))
    ways = {"up_proj": Shard(1), "lm_head": Shard(1), "q_norm": Shard(0), "down_proj": Replicate()}
    way = lambda key: next((w for name, w in ways.items() if name in key), Shard(0))
    state = {key: distribute_tensor(t, mesh, [way(key)]) for key, t in state.items()}
else:
    root = nn.Module()
    for key, t in state.items():
        at, (*parents, last) = root, key.split(".")
        for name in parents:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.register_parameter(last, nn.Parameter(t))
    for i in "01":
        setattr(root.model.layers, i, FSDP(getattr(root.model.layers, i), device_id=torch.device("cpu"), use_orig_params=True))
    root = FSDP(root, device_id=torch.device("cpu"), use_orig_params=True)
    with FSDP.state_dict_type(root, StateDictType.SHARDED_STATE_DICT):
        state = root.state_dict()
dcp.save({"model": state, "iteration": 5}, storage_writer=dcp.FileSystemWriter(out))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dtensor", "fsdp1"])
def test_chunks_of_two_ranks_are_put_together(tmp_path, kind):
    folder = tracked(tmp_path / "m")
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", TWO_RANKS, str(rank), str(folder), kind], cwd=ROOT)
        for rank in range(2)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert sorted(p.name for p in folder.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert identical(native(tmp_path / "m", tmp_path / "n"), small_state())
    (tmp_path / "m" / folder.name / "__1_0.distcp").unlink()
    assert "__1_0.distcp" in refused(tmp_path / "m")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


Change = Callable[[Metadata], object]
KEY = "model.lm_head.weight"
INDEX = MetadataIndex(KEY, (0, 0))


@pytest.fixture
def there(tmp_path) -> Path:
    """A whole torch_dcp iteration whose config.json lies in it."""
    folder = save(tmp_path / "m", {"model": small_state(), "iteration": 5})
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def rewritten(folder: Path, change: Change) -> Path:
    """`.metadata` as `change` leaves it, or what it returns in its place."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(metadata) or metadata))
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
        convert.convert(there, there.parent / "n", convert.WRITERS["native"])
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


def test_an_iteration_that_is_not_there_is_named(tmp_path):
    top = tracked(tmp_path / "m").parent
    assert "iter_0000005/mp_rank_00 is missing" in refused(top)
    (top / "latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007" in refused(top)
    assert "iter_0000005" in refused(top)
    for text in ("", "-1", "5 6", "../x", "9" * 60, "٣"):
        (top / "latest_checkpointed_iteration.txt").write_text(text)
        assert "expected `release` or an iteration's number" in refused(top)
    shutil.move(save(tmp_path / "away", {"model": small_state()}), tmp_path / "elsewhere")
    (top / "iter_0000008").symlink_to(tmp_path / "elsewhere")
    (top / "latest_checkpointed_iteration.txt").write_text("8")
    assert "link out of it" in refused(top)
    (top / "iter_0000008").unlink()
    shutil.move(tmp_path / "elsewhere", top / "iter_0000008")
    assert sources.open_source(top).what == "iteration 8 of a MindSpeed run"
    (top / "iter_0000008" / ".metadata").rename(tmp_path / "metadata")
    (top / "iter_0000008" / ".metadata").symlink_to(tmp_path / "metadata")
    assert "outside" in refused(top)


def test_the_command_converts_an_iteration_and_says_what_it_ignored(tmp_path, capsys):
    save(tracked(tmp_path / "m"), {"model": small_state()} | BESIDE)
    argv = [str(tmp_path / "m"), str(tmp_path / "n"), "--to", "native"]
    assert convert.main(argv) == 0
    out = capsys.readouterr().out
    assert "entries beside the weights: args, checkpoint_version, iteration, optimizer (3)" in out
    assert "from iteration 5 of a MindSpeed run to native" in out
    (tmp_path / "m" / "iter_0000005" / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(InputError, match="lacks a Metadata"):
        convert.main([*argv, "--overwrite"])
    assert (tmp_path / "n" / "config.json").exists()
