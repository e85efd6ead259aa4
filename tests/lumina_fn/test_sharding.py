"""N processes over N shards compute what one process computes with vmap over the same shards."""

import itertools
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.launching import processes
from lumina_fn import checkpoint, convert, gradient_noise, loss, model, optim, sharding, train
from lumina_fn.config import ModelConfig
from lumina_fn.formats import tensor_files

TINY = ModelConfig(vocab=53, width=16, layers=2, heads=2, kv_heads=1, hidden=24)
OPT = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)
A, B, T, STEPS = 2, 2, 13, 4
SLOW = pytest.mark.slow


def batches(size: int) -> list[train.Batch]:
    """[size A B T] for each step: every rank's micro batches, which predict different counts."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(TINY.vocab, (STEPS, size, A, B, T), generator=generator)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, -100)
    labels[:, -1, -1] = -100  # a rank's last micro batch may be empty
    return [train.Batch(*pair) for pair in zip(tokens, labels, strict=True)]


def oracle(size: int):
    """One process: vmap(grad) over the shards, summed, then the optimizer: parameters and each step's loss, norm, noise, signal."""
    state, metrics = train.init_state(model.init(TINY, dtype=torch.float64), OPT), []
    for tokens, labels in batches(size):
        shards = train.Batch(tokens.flatten(0, 1), labels.flatten(0, 1))
        count = loss.predicted(labels, TINY)
        each, total = gradient_noise.shard_gradients(state.params, shards, TINY, count=count)
        grads = pytree.tree_map(lambda g: g.sum(0), each)
        norm = optim.global_norm(grads)
        shares = torch.stack([loss.predicted(x, TINY) for x in shards.labels]) / count
        of = lambda i: pytree.tree_map(lambda g: g[i], each)  # noqa: B023
        squares = torch.stack([gradient_noise.square(of(i)) for i in range(len(shares))])
        some = shares > 0
        both = gradient_noise.noise_and_signal((squares[some] / shares[some]).sum(), some.sum().double(), norm.square())
        metrics.append([float(total.sum()), float(norm), *map(float, both)])
        now = optim.Now(state.step + 1, torch.tensor(OPT.lr, dtype=torch.float64), norm, torch.tensor(False))
        new = optim.update(OPT, now, state.params, grads, (state.mu, state.nu), donate=False)
        state = state._replace(step=state.step + 1, params=new[0], mu=new[1], nu=new[2])
    return state.params, metrics


class Calls(TorchDispatchMode):
    """Counts the ops of the house that really run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lumina":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def trained(rank: int, size: int, cases):
    """Each case's whole parameters, the metrics of each step, and how often the last one gathered and reduced."""
    results = {}
    for strategy, shard_size, settings in cases:
        mesh = sharding.Mesh(dist.group.WORLD, rank, size, "cpu", strategy, torch.float64, torch.float64, shard_size)
        step = train.make_train_step(TINY, OPT, mesh, noise=True, **dict(settings))
        state = train.init_state(model.init(TINY, dtype=torch.float64), OPT, mesh)
        metrics = []
        for batch in batches(size):
            with Calls() as calls:
                state, values = step(state, train.Batch(batch.tokens[rank], batch.labels[rank]))
            metrics.append([float(values[name]) for name in ("loss", "grad_norm", "noise", "signal")])
        whole = model.over_units(lambda unit: sharding.unshard(unit, mesh), state.params)  # noqa: B023
        counts = (calls.counts["all_gather"], calls.counts["reduce_scatter"])
        results[strategy, shard_size, settings] = (pytree.tree_leaves(whole), metrics, counts)
    return results


def check(size: int, cases, atol: float = 1e-10) -> None:
    params, metrics = oracle(size)
    assert all(norm > OPT.clip for _, norm, *_ in metrics)  # clipping is active
    for result in processes.run(size, trained, cases):
        for case, (got, values, counts) in result.items():
            assert counts == expected_counts(size, *case), case
            for a, b in zip(values, metrics, strict=True):
                assert a == pytest.approx(b, abs=atol, nan_ok=True), case  # one piece says nothing about noise
            for a, b in zip(got, pytree.tree_leaves(params), strict=True):
                torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=str(case))


def expected_counts(size: int, strategy: str, shard_size: int | None, settings) -> tuple[int, int]:
    """Gathers and reduce-scatters of a step: a block is gathered once, and again for its backward under fsdp and hybrid.

    The embedding's and the head's backward use no parameters.
    """
    if strategy == "no" or (shard_size or size) == 1:
        return 0, 0
    units = TINY.layers + 2
    gathers = units + TINY.layers if strategy in ("fsdp", "hybrid") else units
    return A * gathers, A * units if dict(settings).get("sync", True) else units


def strategies(size: int):
    hybrids = [(s, n) for s in ("hybrid", "hybrid_zero2") for n in (1, 2, size) if size % n == 0]
    return [("fsdp", None), ("sdp", None), ("no", None), *dict.fromkeys(hybrids)]


def settings(**choices) -> list[tuple]:
    return [tuple(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@SLOW
def test_two_processes_equal_one():
    kinds = settings(remat=[False], sync=[True, False])
    check(2, [(s, n, kind) for (s, n), kind in itertools.product(strategies(2), kinds)])


@SLOW
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_strategy_equals_one_process(size):
    kinds = settings(compile=["off", "blocks"], remat=[False, True], sync=[True])
    kinds += settings(compile=["blocks"], remat=[False], sync=[False], donate=[True])
    check(size, [(s, n, kind) for (s, n), kind in itertools.product(strategies(size), kinds)])


@SLOW
def test_the_whole_step_compiled_equals_one_process():
    """Its gathers are not merged. The rotary angles, in float32, differ in the last bit where Inductor computes them."""
    check(2, [("fsdp", None, kind) for kind in settings(compile=["step"], remat=[False, True])], atol=1e-5)


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


@pytest.mark.parametrize("form", ["native", "mindspeed"])
def test_a_rank_reads_no_more_than_its_part(form, tmp_path, monkeypatch):
    """Of tensors, that is; headers are read by all."""
    checkpoint.save_model(tmp_path / "native", model.init(TINY), TINY)
    convert.main([str(tmp_path / "native"), str(tmp_path / "mindspeed"), "--to", "mindspeed"])
    read, chunks = Counter(), tensor_files.chunks

    def counted(source):
        for data in chunks(source):
            read[rank] += len(data)
            yield data

    monkeypatch.setattr(tensor_files, "chunks", counted)
    for rank in range(3):
        params, _ = checkpoint.load_parts(tmp_path / form, sharding.Mesh("none", rank, 3))
        assert 0 < read[rank] <= sum(part.nbytes for part in pytree.tree_leaves(params))
    assert read.total() == sum(leaf.nbytes for leaf in pytree.tree_leaves(model.init(TINY)))


class FakeLeaf:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_stream(self, stream):
        self.log.append(f"{stream.name} records {self.name}")


class FakeStream:
    """Writes down what is asked of it, and what is asked while it is the current one."""

    def __init__(self, name, log):
        self.name, self.log, self.current = name, log, False

    def __enter__(self):
        self.current = True

    def __exit__(self, *_):
        self.current = False

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return f"event after {self.log[-1]}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_the_next_unit_is_under_way_while_one_computes(monkeypatch):
    log: list[str] = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch, "Stream", lambda device: side)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)

    def gather(unit):
        log.append(f"{'side' if side.current else 'main'} gathers {unit}")
        return [FakeLeaf(f"{unit}{i}", log) for i in range(2)]

    for tree in sharding.ahead(gather, "abc", device="cuda", prefetch=True):
        assert not side.current
        log.append(f"main computes {tree[0].name[0]}")
    assert log == [
        "side waits for main", "side gathers a",
        "side gathers b", "main waits for event after side gathers a", "main records a0", "main records a1", "main computes a",
        "side gathers c", "main waits for event after side gathers b", "main records b0", "main records b1", "main computes b",
        "main waits for event after side gathers c", "main records c0", "main records c1", "main computes c",
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "prefetch"), [("cpu", True), ("cuda", False)])
def test_without_streams_or_prefetch_units_are_gathered_one_after_the_other(device, prefetch, monkeypatch):
    monkeypatch.setattr(torch, "Stream", None)
    log: list[str] = []
    for unit in sharding.ahead(
        lambda unit: log.append(f"gather {unit}") or unit, "ab", device=device, prefetch=prefetch
    ):
        log.append(f"compute {unit}")
    assert log == ["gather a", "compute a", "gather b", "compute b"]


def saved(rank: int, size: int, folder) -> None:
    mesh = sharding.Mesh(dist.group.WORLD, rank, size)
    params = train.init_state(model.init(TINY), OPT, mesh).params
    checkpoint.save_model(folder / "parts", params, TINY, mesh=mesh, dtype=torch.bfloat16)


@SLOW
def test_a_model_saved_from_its_parts_is_the_whole_one(tmp_path):
    processes.run(3, saved, tmp_path)
    checkpoint.save_model(tmp_path / "whole", model.init(TINY), TINY, dtype=torch.bfloat16)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_parts_of_another_model_are_not_saved(tmp_path):
    mesh = sharding.Mesh("none", 0, 1)
    params = train.init_state(model.init(TINY), OPT, mesh).params._replace(blocks=())
    with pytest.raises(ValueError, match="shorter"):
        checkpoint.save_model(tmp_path / "lm", params, TINY, mesh=mesh)


def test_float16_is_refused_with_the_reason():
    for bad in ({"param_dtype": torch.float16}, {"reduce_dtype": torch.float16}):
        with pytest.raises(ValueError, match="loss scaling"):
            sharding.Mesh("none", 0, 1, **bad)
    with pytest.raises(ValueError, match="divisor of the 4 ranks"):
        sharding.Mesh("none", 0, 4, strategy="hybrid", shard_size=3)
