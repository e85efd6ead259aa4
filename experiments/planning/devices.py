"""The peaks of devices, and the predicted time of a training step on them."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lumina_fn.config import ModelConfig
from lumina_fn.costs import cost
from lumina_fn.costs.cost import Setup, Traffic


@dataclass(frozen=True)
class Device:
    """The peaks of one device."""

    flops: float  # of matrix products, per second
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes per second
    link: float  # to the other devices of its node together, bytes per second in one direction
    network: float  # to other nodes, the same
    reached: float = 0.4  # share of those FLOPs in training: 0.15 to 0.64 was published for models of this size on 910B


# Dense bfloat16. 910B: a copy of the datasheet (64 GB HBM2e, HCCS full mesh, RoCE); devices of this name differ in their peak, and
# "910B" is the middle one. A100 and H100: NVIDIA's datasheets of the SXM modules with 80 GB; one direction of NVLink,
# and the InfiniBand of DGX A100 (200 Gb/s a device) and DGX H100 (400 Gb/s).
DEVICES = {
    "910B": Device(295e12, 64e9, 1.6e12, 196e9, 25e9),
    "910B-354": Device(354e12, 64e9, 1.6e12, 196e9, 25e9),
    "910B-246": Device(246e12, 64e9, 1.6e12, 196e9, 25e9),
    "A100": Device(312e12, 80e9, 2.04e12, 300e9, 25e9),
    "H100": Device(989e12, 80e9, 3.35e12, 450e9, 50e9),
}
CPU = "cpu"
BANDWIDTH = 0.7  # share of the peak that transfers reach, in memory and between devices
OPTIMIZER = 10  # reads and writes of each parameter: the norm reads it, scaling reads and writes, the update reads 4 and writes 3
SIDE, LENGTH = 1024, 1 << 24  # of the matrices and the vector that a CPU is measured with


def cpu(dtype: torch.dtype) -> Device:
    """This machine as a device, measured in well under a second."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    source, target = torch.ones(LENGTH), torch.empty(LENGTH)
    flops = 2 * SIDE**3 / _fastest(lambda: a @ b)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Gloo uses TCP: about 1 GB/s, both within a host and over 10 Gb/s Ethernet.
    return Device(flops, memory, bandwidth, 1e9, 1e9, reached=0.7)


def share(device: Device, processes: int) -> Device:
    """The part of a device that each of so many processes gets."""
    return replace(
        device, flops=device.flops / processes, memory=device.memory / processes, bandwidth=device.bandwidth / processes
    )


def seconds(cfg: ModelConfig, setup: Setup, device: Device, per_node: int) -> dict[str, float]:
    """Seconds of a step by activity; a prefetched gather counts only as far as it takes longer than the compute that it overlaps."""
    tokens = setup.micro_batches * setup.micro_batch * setup.tokens
    speed = device.flops * device.reached
    compute = cost.flops(cfg, setup.tokens) * tokens / speed
    again = cost.recomputed_flops(cfg, setup.tokens, setup.recomputed(cfg)) * tokens / speed
    moved = Counter({one.kind: _transfer(one, device, per_node) for one in cost.traffic(cfg, setup)})
    beside = lambda prefetch, moving, computing: max(moving - computing, 0.0) if prefetch else moving
    mesh = setup.mesh
    state = cost.parameters(cfg) / (1 if mesh is None else mesh.shards[1]) * setup.masters.itemsize
    return {
        "compute": compute,
        "recompute": again,
        "gathers": beside(setup.forward_prefetch, moved["gathers forward"], compute / 3)
        + beside(setup.backward_prefetch, moved["gathers backward"], compute * 2 / 3 + again),
        "reductions": moved["reduce-scatters"] + moved["all-reduces"],
        "optimizer": OPTIMIZER * state / (BANDWIDTH * device.bandwidth),
    }


def _transfer(one: Traffic, device: Device, per_node: int) -> float:
    """Seconds of a transfer: each rank sends its share between nodes, and nodes pass it on within themselves."""
    local = min(one.ranks, max(per_node // one.stride, 1))
    nodes = one.ranks // local
    between = (nodes - 1) / (nodes * local) / device.network
    within = (local - 1) / local / device.link
    return (2 if one.kind == "all-reduces" else 1) * one.size * (between + within) / BANDWIDTH


def _fastest(run: Callable[[], object]) -> float:
    """The fastest of three runs, after one that warms up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
