"""The operations, the traffic and the time that are told of a training step, against what is counted in real ones."""

import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.launching import processes
from experiments.planning import devices
from lumina_fn.config import LUMINA_7B
from lumina_fn.costs import cost, footprint
from lumina_fn.costs.cost import Setup
from tests.support.planned_steps import STRATEGIES, TINY, step_of

SLOW = pytest.mark.slow
BF16 = torch.bfloat16


def test_flops_are_those_that_are_counted():
    setup = Setup(tokens=96, micro_batch=2)
    arguments = footprint._arguments(TINY, setup)
    pair, _ = footprint._block(TINY, setup, False)
    with FlopCounterMode(display=False) as matrices:  # attention is an op of our own, which it does not know
        _, residuals = pair.forward(*arguments)
        pair.backward(residuals, *arguments, torch.empty_like(arguments[0]))
    scores, head = 6 * TINY.layers * TINY.width * 96, 6 * TINY.vocab * TINY.width
    assert cost.flops(TINY, 96) == TINY.layers * matrices.get_total_flops() // (2 * 96) + scores + head
    assert 3 * cost.recomputed_flops(TINY, 96, TINY.layers) == cost.flops(TINY, 96) - head


def test_the_7b_takes_what_is_known_of_it():
    assert cost.parameters(LUMINA_7B) == 7_880_273_920
    known = {1024: 43.9, 4096: 46.3, 9500: 50.5}  # GFLOP a token
    assert {n: round(cost.flops(LUMINA_7B, n) / 1e9, 1) for n in known} == known


@pytest.mark.parametrize("seed", range(20))
def test_a_step_stays_below_its_bound(seed):
    """By a good part: what is drawn here is not all there is."""
    pick = random.Random(seed).choice
    groups, width = pick((1, 2, 4)), pick((16, 64))
    heads = groups * pick((1, 4))
    cfg = replace(
        TINY, layers=pick((1, 2, 4, 12)), heads=heads, kv_heads=groups, width=heads * width, vocab=pick((300, 70_000)),
        hidden=pick((32, 256, 2048)),
    )  # fmt: skip
    setup = Setup(
        pick((1, 2, 4)), pick(("fsdp", "sdp", "no")), tokens=pick((16, 128, 2048)), micro_batch=pick((1, 8)),
        micro_batches=pick((1, 2)), dtype=pick((torch.float32, BF16, torch.float64)), remat=pick((True, False)),
        sync=pick((True, False)), forward_prefetch=pick((True, False)), cpu=pick((True, False)), compiled=seed % 10 == 0,
    )  # fmt: skip
    assert footprint.peak(cfg, setup) < 0.6 * cost.most_memory(cfg, setup)


class Moved(TorchDispatchMode):
    """Counts the bytes of the whole vectors that collectives join or add up."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "lumina" and func._opname in self.bytes and args[0].numel() > 8:  # no metrics
            whole = out if func._opname == "all_gather" else args[0]
            self.bytes[func._opname] += whole.nbytes
        return out


def moved(rank: int, size: int, setups: list[Setup]) -> list[dict[str, int]]:
    found = []
    for setup in setups:
        step, state, batch = step_of(rank, size, TINY, setup)
        with Moved() as counted:
            step(state, batch)
        found.append(counted.bytes)
    return found


@SLOW
def test_traffic_is_what_a_real_step_moves():
    setups = [Setup(2, *sharded, 16, 1, 2, BF16, BF16, sync=sync) for sharded in STRATEGIES for sync in (True, False)]
    kinds = {"gathers forward": "all_gather", "gathers backward": "all_gather", "reduce-scatters": "reduce_scatter"}
    for setup, found in zip(setups, processes.run(2, moved, setups)[0], strict=True):
        predicted = dict.fromkeys(found, 0)
        for one in cost.traffic(TINY, setup):
            predicted[kinds.get(one.kind, "all_reduce")] += one.size
        assert predicted == found, setup


def test_time_is_work_over_what_the_device_does():
    device = devices.Device(flops=1e12, memory=1e9, bandwidth=1e11, link=1e10, network=1e9)
    seconds = lambda n, **kind: devices.seconds(TINY, Setup(n, tokens=64, **kind), device, 4)
    alone, node, two = seconds(1), seconds(4), seconds(8)
    assert alone["compute"] == cost.flops(TINY, 64) * 64 / (0.4 * 1e12) == two["compute"]
    assert alone["gathers"] == alone["reductions"] == alone["recompute"] == 0
    moved = {one.kind: one.size for one in cost.traffic(TINY, Setup(4, tokens=64))}
    assert node["reductions"] == pytest.approx(moved["reduce-scatters"] * 3 / 4 / 1e10 / 0.7)
    # A quarter of the whole belongs to a device and its twin on the other node, half of it to each.
    assert two["reductions"] == pytest.approx(node["reductions"] + moved["reduce-scatters"] / 8 / 1e9 / 0.7)
    assert node["recompute"] > 0 == seconds(4, compiled=True)["recompute"]
    assert two["optimizer"] == pytest.approx(alone["optimizer"] / 8)
    assert seconds(8, forward_prefetch=True)["gathers"] < two["gathers"]
