"""Our sharding against torch's own FullyShardedDataParallel around the same functions: losses and gradient norms."""

import itertools
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench import fsdp_peer
from lumina_fn import model, sharding, train
from lumina_fn.config import ModelConfig

TINY = ModelConfig(vocab=53, width=16, layers=3, heads=2, kv_heads=1, hidden=24)
OPT = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)
SIZE, A, B, T, STEPS = 2, 2, 2, 13, 4
CASES = list(itertools.product(fsdp_peer.STRATEGIES, (True, False), (True, False)))  # strategy, remat, sync


def batches(rank: int) -> list[train.Batch]:
    """This rank's [A B T] of each step; ranks predict different counts."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(TINY.vocab, (STEPS, A, B, T), generator=generator)
    ignored = torch.rand(tokens.shape, generator=generator) < (0.2, 0.5)[rank]
    return [train.Batch(*b) for b in zip(tokens, tokens.masked_fill(ignored, -100), strict=True)]


def ours(rank: int, strategy: str, remat: bool, sync: bool):
    mesh = sharding.Mesh(dist.group.WORLD, rank, SIZE, "cpu", strategy)
    step = train.make_train_step(TINY, OPT, mesh, remat=remat, sync=sync, donate=True)
    state = train.init_state(model.init(TINY), OPT, mesh)
    for batch in batches(rank):
        state, metrics = step(state, batch)
        yield float(metrics["loss"]), float(metrics["grad_norm"])


def theirs(rank: int, strategy: str, remat: bool, sync: bool):
    step = fsdp_peer.make_step(model.init(TINY), TINY, OPT, strategy, remat=remat, sync=sync)
    for batch in batches(rank):
        yield tuple(map(float, step(batch)))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
    results = {case: (list(ours(rank, *case)), list(theirs(rank, *case))) for case in CASES}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=SIZE)
        return torch.load(f"{folder}/results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_steps_equal_those_of_the_real_class(results, case):
    ours, theirs = results[case]
    for (loss, norm), (their_loss, their_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(their_loss, abs=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-4)
    assert all(norm > OPT.clip for _, norm in ours)  # clipping is active
