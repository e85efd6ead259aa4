"""N processes over N shards compute what one process computes with vmap over the same shards."""

import itertools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils._pytree as pytree
from torch.func import grad_and_value, vmap

from lumina_fn import checkpoint, loss, model, optim, sharding, train
from lumina_fn.config import ModelConfig

TINY = ModelConfig(vocab=53, width=16, layers=2, heads=2, kv_heads=1, hidden=24)
OPT = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)
A, B, T, STEPS = 2, 2, 13, 4


def batches(size: int) -> list[train.Batch]:
    """[size A B T] for each step: every rank's micro batches."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(STEPS):
        tokens = torch.randint(TINY.vocab, (size, A, B, T), generator=generator)
        labels = tokens.masked_fill(
            torch.rand(tokens.shape, generator=generator) < 0.3, -100
        )  # ranks predict different counts
        result.append(train.Batch(tokens, labels))
    return result


def oracle(size: int):
    """One process: vmap(grad) over the shards, summed, then the optimizer: parameters, losses and norms."""
    state = train.init_state(model.init(TINY, dtype=torch.float64), OPT)
    losses, norms = [], []
    for tokens, labels in batches(size):
        flat = train.Batch(tokens.flatten(1, 2), labels.flatten(1, 2))
        count = loss.predicted(labels, TINY)
        each = vmap(grad_and_value(lambda p, b: train.loss(p, b, TINY, count=count)[0]), in_dims=(None, 0))  # noqa: B023
        grads, total = each(state.params, flat)
        grads = pytree.tree_map(lambda g: g.sum(0), grads)
        norm = optim.global_norm(grads)
        losses.append(float(total.sum()))
        norms.append(float(norm))
        new = optim.update(
            OPT, state.step + 1, torch.tensor(OPT.lr, dtype=torch.float64), norm, torch.tensor(False), state.params, grads,
            state.mu, state.nu, donate=False,
        )  # fmt: skip
        state = state._replace(step=state.step + 1, params=new[0], mu=new[1], nu=new[2])
    return state.params, losses, norms


def worker(rank: int, size: int, cases, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    results = {}
    for case in cases:
        strategy, shard_size, settings = case
        mesh = sharding.Mesh(dist.group.WORLD, rank, size, "cpu", strategy, torch.float64, torch.float64, shard_size)
        step = train.make_train_step(TINY, OPT, mesh, **dict(settings))
        state = train.init_state(model.init(TINY, dtype=torch.float64), OPT, mesh)
        losses, norms = [], []
        for batch in batches(size):
            state, metrics = step(state, train.Batch(batch.tokens[rank], batch.labels[rank]))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        whole = model.over_units(lambda unit: sharding.unshard(unit, mesh), state.params)  # noqa: B023
        results[case] = (whole, losses, norms)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(size: int, cases):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (size, cases, folder), nprocs=size)
        return torch.load(f"{folder}/results.pt", weights_only=False)


def check(size: int, cases) -> None:
    params, losses, norms = oracle(size)
    for case, (got, got_losses, got_norms) in run(size, cases).items():
        assert got_losses == pytest.approx(losses, abs=1e-10), case
        assert got_norms == pytest.approx(norms, abs=1e-10), case
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(params), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0, msg=str(case))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)]
)
def test_every_strategy_equals_one_process(size):
    hybrids = [(s, n) for s in ("hybrid", "hybrid_zero2") for n in (1, 2, size) if size % n == 0]
    strategies = [("fsdp", None), ("sdp", None), ("no", None), *dict.fromkeys(hybrids)]
    remats = [(("remat", True),), (("remat", False),)]
    check(size, [(s, n, r) for (s, n), r in itertools.product(strategies, remats)])


@pytest.mark.parametrize("size", [1, 3])
def test_parts_are_loaded_as_the_whole_would_be_cut(size, tmp_path):
    params = model.init(TINY)
    checkpoint.save_model(tmp_path / "lm", params, TINY)
    for rank in range(size):
        mesh = sharding.Mesh("none", rank, size)
        got, cfg = checkpoint.load_parts(tmp_path / "lm", mesh)
        want = model.over_units(lambda unit: sharding.shard(unit, mesh), params)  # noqa: B023
        assert cfg == TINY
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True))


@pytest.mark.slow
def test_compiled_blocks_equal_one_process():
    check(2, [(s, None, (("compile", "blocks"),)) for s in ("fsdp", "sdp", "no")])


def test_float16_is_refused_with_the_reason():
    for bad in ({"param_dtype": torch.float16}, {"reduce_dtype": torch.float16}):
        with pytest.raises(ValueError, match="loss scaling"):
            sharding.Mesh("none", 0, 1, **bad)
    with pytest.raises(ValueError, match="divisor of the 4 ranks"):
        sharding.Mesh("none", 0, 4, strategy="hybrid", shard_size=3)
