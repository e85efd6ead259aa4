"""A saved training state is restored to the bit, on any mesh; what is kept of those, and how it comes onto the disk."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from experiments.launching import processes
from lumina_fn import checkpoint, convert, model, sharding, train
from lumina_fn.disk import files
from lumina_fn.state import manifest
from tests.support.resumed_runs import OPT, TINY, assert_same_bits, cut, random_state

SLOW = pytest.mark.slow


def moved(rank: int, size: int, folder: Path, strategy: str, shard_size: int | None, step: int) -> None:
    """Restore the step before, compare, and save the same values as this one."""
    mesh = sharding.Mesh(dist.group.WORLD, rank, size, "cpu", strategy, shard_size=shard_size)
    want = cut(random_state(step=step), mesh)
    if manifest.steps(folder):
        state, meta = checkpoint.restore(folder, mesh=mesh)
        assert meta == {"step": step - 1}
        assert_same_bits(state, want._replace(step=torch.tensor(step - 1)))
    barrier = dist.new_group(backend="gloo")
    checkpoint.save(folder, want, {"step": step}, mesh, barrier=lambda: dist.barrier(barrier)).wait()
    dist.barrier()


def test_one_mesh_restores_what_another_saved(tmp_path):
    for step, (size, strategy) in enumerate([(2, "fsdp"), (1, "fsdp")]):
        processes.run(size, moved, tmp_path, strategy, None, step)
    assert_same_bits(checkpoint.restore(tmp_path)[0], random_state(step=1))


@SLOW
def test_any_mesh_restores_what_any_other_saved(tmp_path):
    meshes = [
        (4, "fsdp", None),
        (2, "hybrid", 1),
        (3, "sdp", None),
        (4, "hybrid_zero2", 2),
        (1, "fsdp", None),
        (2, "no", None),
    ]
    for step, (size, strategy, shard_size) in enumerate(meshes):
        processes.run(size, moved, tmp_path, strategy, shard_size, step)
    state, _ = checkpoint.restore(tmp_path)
    assert_same_bits(state, random_state(step=5))
    checkpoint.save(tmp_path, state._replace(step=torch.tensor(98)), {"step": 98}).wait()
    processes.run(3, moved, tmp_path, "fsdp", None, 99)


def test_a_save_is_of_the_moment_it_began(tmp_path):
    state = random_state()
    want = pytree.tree_map(torch.clone, state)
    saving = checkpoint.save(tmp_path, state, {})
    for leaf in pytree.tree_leaves(state):
        leaf.zero_()  # as the next step does
    saving.wait()
    assert_same_bits(checkpoint.restore(tmp_path)[0], want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(tmp_path, dtype):
    state = train.init_state(model.init(TINY, dtype=dtype), OPT)
    checkpoint.save(tmp_path, state, {}).wait()
    assert_same_bits(checkpoint.restore(tmp_path, 0)[0], state)


def test_what_is_kept(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, random_state(step=step), {}, keep=manifest.Keep(2, every=3)).wait()
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "7"]
    assert checkpoint.verify(tmp_path) == dict.fromkeys([3, 6, 7])


def test_a_step_that_is_saved_again_is_exchanged(tmp_path, monkeypatch):
    """At no moment there is neither."""
    checkpoint.save(tmp_path, random_state(), {}).wait()
    monkeypatch.delattr(Path, "rename")
    checkpoint.save(tmp_path, random_state(1), {}).wait()
    assert [p.name for p in tmp_path.iterdir()] == ["9"]
    assert_same_bits(checkpoint.restore(tmp_path)[0], random_state(1))


def test_the_folder_of_checkpoints_is_forced_onto_the_disk(tmp_path, monkeypatch):
    synced, sync = [], files.sync_one
    monkeypatch.setattr(files, "sync_one", lambda path: (synced.append(path), sync(path)))
    checkpoint.save(tmp_path / "checkpoints", random_state(), {}).wait()
    assert {tmp_path, tmp_path / "checkpoints"} <= set(synced)


def converting(rank: int, size: int, run: str, to: str) -> tuple[int, int]:
    """Bytes at the peak above those before, and of the model."""
    convert.main([run, f"{to}/once", "--to", "native"])  # imports jax
    processes.reset_peak()
    before = processes.resident()
    convert.main([run, f"{to}/again", "--to", "native"])
    return processes.peak() - before, (Path(to) / "again/model.safetensors").stat().st_size


@SLOW
def test_a_run_s_folder_is_converted_a_unit_at_a_time(tmp_path):
    cfg = replace(TINY, width=512, layers=16, heads=8, kv_heads=8, hidden=1024)
    meta = {"model": asdict(cfg), "stored_dtype": "float32"}
    state = train.init_state(model.init(cfg), OPT)._replace(step=torch.tensor(1))
    checkpoint.save(tmp_path / "run/checkpoints", state, meta).wait()
    [(above, whole)] = processes.run(1, converting, str(tmp_path / "run"), str(tmp_path))
    assert whole > 160e6
    assert above < 64e6  # of 160: four units of 10 MB: what is read, a view of it, and Orbax's own
