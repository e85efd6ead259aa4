"""The share of its peak that a device reaches, by strategy and micro batch, and the micro batches that hide communication."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from experiments.planning import devices
from experiments.planning.devices import Device
from experiments.planning.report import GB, USABLE, aligned
from lumina_fn.config import ModelConfig
from lumina_fn.costs import cost, footprint
from lumina_fn.costs.cost import Setup

STRATEGIES = ("fsdp", "sdp", "hybrid", "hybrid_zero2")
MICRO_BATCHES = (1, 2, 4, 8)
MOST = 256  # samples of the largest micro batch that is tried
LITTLE = 0.05  # share of a step up to which reductions, which overlap with nothing, are negligible


def lines(cfg: ModelConfig, setups: Sequence[Setup], device: Device, per_node: int) -> Iterator[str]:
    """Lines of Markdown: the MFU of a step of one micro batch; then the smallest micro batches that hide communication."""
    count = [str(setup.devices) for setup in setups]
    rows = [["MFU (peak memory, GB), of", *count]]
    for strategy in STRATEGIES:
        for n in MICRO_BATCHES:
            cells = (_reached(cfg, _as(setup, strategy, n, per_node), device, per_node) for setup in setups)
            rows.append([f"{strategy}, micro batch {n}", *cells])
    yield from aligned(rows)
    yield ""
    hidden = lambda setup: devices.seconds(cfg, setup, device, per_node)["gathers"] == 0

    def slight(setup: Setup) -> bool:
        seconds = devices.seconds(cfg, setup, device, per_node)
        return seconds["reductions"] <= LITTLE * sum(seconds.values())

    rows = [["smallest micro batch at which, of", *count]]
    for what, holds in (("gathers hide", hidden), (f"reductions are {LITTLE:.0%} of a step", slight)):
        for strategy in STRATEGIES:
            found = (
                _first(lambda n, s=setup, k=strategy, holds=holds: holds(_as(s, k, n, per_node))) for setup in setups
            )
            rows.append([f"{what}, {strategy}", *found])
    yield from aligned(rows)


def _as(setup: Setup, strategy: str, n: int, per_node: int) -> Setup:
    """The setup with another strategy and micro batch, its gathers prefetched."""
    return replace(
        setup, strategy=strategy, shard_size=min(per_node, setup.devices), micro_batch=n, forward_prefetch=True,
        backward_prefetch=True,
    )  # fmt: skip


def _reached(cfg: ModelConfig, setup: Setup, device: Device, per_node: int) -> str:
    peak, step = footprint.peak(cfg, setup), sum(devices.seconds(cfg, setup, device, per_node).values())
    if peak > USABLE * device.memory:
        return f"does not fit ({peak / GB:.0f})"
    flops = cost.flops(cfg, setup.tokens) * setup.tokens * setup.micro_batch
    return f"{flops / step / device.flops:.1%} ({peak / GB:.0f})"


def _first(holds: Callable[[int], bool]) -> str:
    return next((str(n) for n in range(1, MOST + 1) if holds(n)), f"more than {MOST}")
