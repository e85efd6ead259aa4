"""What MindSpeed-MM's training saves converts bit by bit, or is refused on one line."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lumina_fn import checkpoint, convert, sources
from lumina_fn.errors import InputError
from lumina_fn.formats import mindspeed
from tests.support.folders import SMALL, identical, small_state, write_hf
from tests.support.mindspeed_runs import BESIDE, RNG, native, refused, rewritten, save, tracked
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


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
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, StateDictType
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
from tests.support.folders import small_state
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
dist.barrier()  # a rank that leaves first would break the other's connection
os._exit(0)  # PyTorch's own end of a gloo process aborted once in some hundred (exit code -6)
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
