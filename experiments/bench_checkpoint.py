"""A sharded training state saved and restored, beside torch.distributed.checkpoint (DCP), on two processes: time, disk, memory.

    python -m experiments.bench_checkpoint

All savers write the same tensors in turn in the same fresh processes, after one round that is not counted; both readers' states
are compared with what was saved. Seconds are the slowest rank's, peaks those of the rank that takes the most. Nothing trains
meanwhile. Ours also writes a SHA-256 of every file and checks them before it restores, DCP does not hash; both force their files
onto the disk. Fails where our call takes more than its share of the time until the checkpoint is there, or a state differs.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from experiments import processes
from experiments.settings import parse
from lumina_fn import checkpoint, cost, errors, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.sharding import Mesh
from lumina_fn.train import TrainState

RANKS = 2  # of one thread each
SAVERS, READERS = ("ours", "dcp.save", "dcp.async_save"), ("ours", "dcp.load")
MB = 1e6


@dataclass(frozen=True)
class Settings:
    width: Annotated[int, "of the model whose state is saved"] = 768
    layers: Annotated[int, "of the model"] = 12
    vocab: Annotated[int, "of the model"] = 20_480
    rounds: Annotated[int, "that are measured"] = 3
    share: Annotated[float, "of the time until a checkpoint is there that its call takes, at the most"] = 0.2


class Save(NamedTuple):
    blocked: float  # seconds of the call
    total: float  # seconds until the checkpoint is there
    disk: float  # bytes
    above: float  # bytes at the peak, above those in memory before: the state and what is imported


class Restore(NamedTuple):
    seconds: float
    above: float  # bytes at the peak, above those before and the state restored


def saving(rank: int, size: int, cfg: ModelConfig, folder: Path, rounds: int) -> list[list[tuple]]:
    """What each saver took in each round, as `Save` names it. Their last checkpoints stay."""
    mesh, group = Mesh(dist.group.WORLD, rank, size), dist.new_group(backend="gloo")  # for what savers do in a thread
    state = _state(cfg, mesh)
    tensors = _dtensors(_parts(state))

    def ours(place: Path) -> Callable[[], Any]:
        return checkpoint.save(place, 0, state, {}, mesh, barrier=partial(dist.barrier, group)).wait

    def sync_save(place: Path) -> Callable[[], Any]:
        dcp.save(tensors, checkpoint_id=place, process_group=group)
        return lambda: None

    def async_save(place: Path) -> Callable[[], Any]:
        return dcp.async_save(tensors, checkpoint_id=place, process_group=group).result

    def took(name: str, save: Callable[[Path], Callable[[], Any]]) -> tuple[float, float, int, int]:
        if rank == 0:
            shutil.rmtree(folder / name, ignore_errors=True)  # that of the round before
        before, begin = _settled(), time.perf_counter()
        wait = save(folder / name)
        blocked = time.perf_counter() - begin
        wait()
        total, above = time.perf_counter() - begin, processes.peak() - before
        return blocked, total, sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()), above

    return [list(map(took, SAVERS, (ours, sync_save, async_save))) for _ in range(1 + rounds)][1:]


def restoring(
    rank: int, size: int, cfg: ModelConfig, folder: Path, rounds: int
) -> tuple[list[list[tuple]], list[bool]]:
    """What each reader took in each round, as `Restore` names it, and whether it always gave the state that was saved."""
    mesh = Mesh(dist.group.WORLD, rank, size)
    saved = _parts(_state(cfg, mesh))
    into = [torch.empty_like(part) for part in saved]
    tensors, took, same = _dtensors(into), [], [True for _ in READERS]
    for _ in range(1 + rounds):
        for part in into:
            part.fill_(torch.nan)
        before, begin = _settled(), time.perf_counter()
        restored = _parts(checkpoint.restore(folder / SAVERS[0], mesh=mesh)[0])
        ours = time.perf_counter() - begin, processes.peak() - before - sum(part.nbytes for part in saved)
        same[0] &= all(map(torch.equal, saved, restored))
        del restored
        before, begin = _settled(), time.perf_counter()
        dcp.load(tensors, checkpoint_id=folder / SAVERS[1])
        took.append([ours, (time.perf_counter() - begin, processes.peak() - before)])
        same[1] &= all(map(torch.equal, saved, into))
    return took[1:], same


def _state(cfg: ModelConfig, mesh: Mesh) -> TrainState:
    """A rank's part of a state in which nothing is zero: its memory is really there."""
    state = train.init_state(model.init(cfg), train.AdamW(), mesh)
    generator = torch.Generator().manual_seed(mesh.rank)
    for part in _parts(state):
        part.normal_(generator=generator)
    return state


def _parts(state: TrainState) -> list[Tensor]:
    return pytree.tree_leaves((state.params, state.mu, state.nu))


def _dtensors(parts: list[Tensor]) -> dict[str, DTensor]:
    """The same memory as DCP takes it: each flat vector cut on its only dimension."""
    mesh = init_device_mesh("cpu", (RANKS,))
    return {
        str(i): DTensor.from_local(part, mesh, [Shard(0)], shape=(RANKS * len(part),), stride=(1,))
        for i, part in enumerate(parts)
    }


def _settled() -> int:
    """Bytes in memory, once every rank is here and freed memory is given back."""
    dist.barrier()
    processes.reset_peak()
    before = processes.resident()
    dist.barrier()
    return before


def _over_ranks(ranks: list, kind: type) -> list[list[Any]]:
    """By saver or reader, its rounds: of each number the largest of all ranks."""
    rounds = zip(*ranks, strict=True)
    worst = [[kind(*map(max, zip(*each, strict=True))) for each in zip(*one, strict=True)] for one in rounds]
    return list(zip(*worst, strict=True))


def _spread(values: Iterable[float], digits: int) -> str:
    low, *_, high = values = sorted(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(argv: Sequence[str] | None) -> int:
    run = parse(Settings, __doc__, argv)
    heads, hidden = run.width // 64, run.width * 8 // 3
    cfg = ModelConfig(run.vocab, run.width, run.layers, heads, heads, hidden)
    print(
        f"{12 * cost.parameters(cfg) / MB:.0f} MB of state over {RANKS} processes, median (range) of {run.rounds} saves\n"
    )
    with tempfile.TemporaryDirectory() as root:
        saves = _over_ranks(processes.run(RANKS, saving, cfg, Path(root), run.rounds), Save)
        found = processes.run(RANKS, restoring, cfg, Path(root), run.rounds)
    print("| | blocked s | total s | blocked/total | MB on disk | peak MB above the state |")
    print("|---|---|---|---|---|---|")
    shares = [[save.blocked / save.total for save in rounds] for rounds in saves]
    for name, rounds, share in zip(SAVERS, saves, shares, strict=True):
        blocked, total, disk, above = zip(*rounds, strict=True)
        cells = _spread(blocked, 2), _spread(total, 2), _spread(share, 2), f"{disk[0] / MB:.0f}"
        print(f"| {name} | {' | '.join(cells)} | {_spread((size / MB for size in above), 0)} |")
    restores, same = (list(part) for part in zip(*found, strict=True))
    good = [all(of_ranks) for of_ranks in zip(*same, strict=True)]
    texts = []
    for name, rounds, equal in zip(READERS, _over_ranks(restores, Restore), good, strict=True):
        seconds, above = zip(*rounds, strict=True)
        text = f"{name} {_spread(seconds, 2)} s, peak {_spread((size / MB for size in above), 0)} MB above the state"
        texts.append(f"{text}, {'equal' if equal else 'NOT EQUAL'}")
    print(f"\nrestoring: {'; '.join(texts)}")
    share = statistics.median(shares[0])
    print(f"blocked share: {share:.2f} (target {run.share:.2f})")
    return 0 if share <= run.share and all(good) else 1


if __name__ == "__main__":
    errors.run(main)
