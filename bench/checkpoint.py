"""A sharded training state saved and restored, beside torch.distributed.checkpoint (DCP), on two processes: time, disk, memory.

All savers write the same tensors in turn in the same fresh processes, after one round that is not counted; both readers' states
are compared with what was saved. Seconds are the slowest rank's, peaks those of the rank that takes the most. Nothing trains
meanwhile. Ours also writes a SHA-256 of every file and checks them before it restores, DCP does not hash; both force their files
onto the disk.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.harness import GB, Ratios, Row, ratio, row
from experiments.launching import processes
from lumina_fn import checkpoint, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.sharding import Mesh

RANKS = 2  # of one thread each
CFG = ModelConfig(vocab=20_480, width=768, layers=12, heads=12, kv_heads=12, hidden=2048)
SAVERS, READERS = ("ours", "dcp.save", "dcp.async_save"), ("ours", "dcp.load")
SLACK = 32e6  # bytes: files' buffers and what malloc keeps

Waiting = Callable[[], object]  # returns once the checkpoint is there


def saving(rank: int, size: int, cfg: ModelConfig, folder: Path, rounds: int) -> list[list[list[float]]]:
    """By round and saver: seconds of the call, seconds in all, bytes on disk, bytes at the peak above those before.

    The last checkpoint of each stays.
    """
    mesh, group = Mesh(dist.group.WORLD, rank, size), dist.new_group(backend="gloo")  # for what savers do in a thread
    state = _state(cfg, mesh)
    tensors = _dtensors(_parts(state))

    barrier = partial(dist.barrier, group)
    ours = lambda place: checkpoint.save(place, state, {}, mesh, barrier=barrier).wait
    async_save = lambda place: dcp.async_save(tensors, checkpoint_id=place, process_group=group).result

    def sync_save(place: Path) -> Waiting:
        dcp.save(tensors, checkpoint_id=place, process_group=group)
        return lambda: None

    def one(place: Path, save: Callable[[Path], Waiting]) -> list[float]:
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)  # that of the round before
        before, begin = _settled(), time.perf_counter()
        wait = save(place)
        blocked = time.perf_counter() - begin
        wait()
        total, above = time.perf_counter() - begin, processes.peak() - before
        return _largest(blocked, total, sum(path.stat().st_size for path in place.rglob("*") if path.is_file()), above)

    places = [folder / name for name in SAVERS]
    return [list(map(one, places, (ours, sync_save, async_save))) for _ in range(1 + rounds)][1:]


def restoring(rank: int, size: int, cfg: ModelConfig, folder: Path, rounds: int) -> list[list[list[float]]]:
    """By round and reader: seconds, bytes at the peak above those before and the state, 1 where it is not what was saved."""
    mesh = Mesh(dist.group.WORLD, rank, size)
    saved = _parts(_state(cfg, mesh))
    into = [torch.empty_like(part) for part in saved]
    tensors = _dtensors(into)
    ours = lambda: _parts(checkpoint.restore(folder / SAVERS[0], mesh=mesh)[0])

    def load() -> list[Tensor]:
        dcp.load(tensors, checkpoint_id=folder / SAVERS[1])
        return into

    def one(read: Callable[[], list[Tensor]]) -> list[float]:
        for part in into:
            part.fill_(torch.nan)
        before, begin = _settled(), time.perf_counter()
        parts = read()
        seconds, above = time.perf_counter() - begin, processes.peak() - before
        made = 0 if parts is into else sum(part.nbytes for part in parts)
        return _largest(seconds, above - made, not all(map(torch.equal, saved, parts)))

    return [list(map(one, (ours, load))) for _ in range(1 + rounds)][1:]


def _state(cfg: ModelConfig, mesh: Mesh) -> train.TrainState:
    """A rank's part of a state of random numbers: zeros would take no memory."""
    state = train.init_state(model.init(cfg), train.AdamW(), mesh)
    generator = torch.Generator().manual_seed(mesh.rank)
    for part in _parts(state):
        part.normal_(generator=generator)
    return state


def _parts(state: train.TrainState) -> list[Tensor]:
    return pytree.tree_leaves((state.params, state.mu, state.nu))


def _dtensors(parts: list[Tensor]) -> dict[str, DTensor]:
    """The same memory as DCP takes it: flat vectors cut along their only dimension."""
    cut = {"device_mesh": init_device_mesh("cpu", (RANKS,)), "placements": [Shard(0)], "stride": (1,)}
    return {f"{i}": DTensor.from_local(part, shape=(RANKS * len(part),), **cut) for i, part in enumerate(parts)}


def _settled() -> int:
    """Bytes in memory, once every rank is here and has given freed memory back."""
    processes.reset_peak()
    before = processes.resident()
    dist.barrier()
    return before


def _largest(*numbers: float) -> list[float]:
    """Each number of the rank where it is the largest."""
    found = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def rows(quick: bool) -> Iterator[Row]:
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as root:
        saves, restores = (processes.run(RANKS, of, CFG, Path(root), rounds)[0] for of in (saving, restoring))
    found = {name: list(zip(*took, strict=True)) for name, took in zip(SAVERS, zip(*saves, strict=True), strict=True)}
    read = {
        name: list(zip(*took, strict=True)) for name, took in zip(READERS, zip(*restores, strict=True), strict=True)
    }
    leaves = lambda tree: sum(leaf.nbytes for leaf in pytree.tree_leaves(tree))
    whole = model.init(CFG, device="meta")
    state, unit = 3 * leaves(whole), max(map(leaves, (whole.embed, *whole.blocks, whole.head)))
    blocked, total, _, above = found["ours"]
    share = ratio(blocked, total)
    others = {
        name: {
            "blocked_s": statistics.median(took[0]), "total_s": statistics.median(took[1]), "disk_gb": max(took[2]) / GB,
            "peak_above_state_gb": max(took[3]) / GB,
        }
        for name, took in found.items()
    }  # fmt: skip
    readers = {
        name: {"restoring_s": statistics.median(took[0]), "peak_above_state_gb": max(took[1]) / GB}
        for name, took in read.items()
    }
    yield row(
        "checkpoint_1g4", "time until a checkpoint is there and peak memory above the state, dcp.async_save / ours",
        {
            "blocked_share": "<= 0.2", "differing": "<= 0", "peak_of_allowed": "<= 1", "restoring_peak_of_allowed": "<= 1",
        },
        Ratios(wall=ratio(found["dcp.async_save"][1], total).median, rss=max(found["dcp.async_save"][3]) / max(above)),
        measured={
            "blocked_share": share.median, "blocked_spread": share[1:], "state_gb": state / GB, **others, "restoring": readers,
            "differing": sum(map(sum, (took[2] for took in read.values()))),
            # Saving may hold a rank's copy of the state and a unit, restoring a unit.
            "peak_of_allowed": statistics.median(above) / (state / RANKS + unit + SLACK),
            "restoring_peak_of_allowed": statistics.median(read["ours"][1]) / (unit + SLACK),
        },
    )  # fmt: skip
