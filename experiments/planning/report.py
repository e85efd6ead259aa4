"""A plan, and the lines that print it."""

from dataclasses import dataclass

import torch

from experiments.planning.devices import BANDWIDTH, CPU, Device
from lumina_fn.config import ModelConfig
from lumina_fn.costs import cost, footprint
from lumina_fn.costs.cost import Setup

GB, MB = 1e9, 1e6
USABLE = 0.9  # of a device's memory: the rest is for the runtime, its communication buffers and fragmentation
MOST = 4096  # samples of a micro batch that are tried
TITLES = {
    footprint.PARAMETERS: "parameters",
    footprint.MOMENTS: "AdamW's moments",
    footprint.GRADIENTS: "gradients",
    footprint.KEPT: "activations",
    footprint.GATHERED: "gathered units",
    footprint.BLOCK: "inside a block",
    footprint.WHOLE: "a unit's gradients",
    footprint.FLAT: "their flat copies",
    footprint.LOSS: "loss chunks",
    footprint.FREED: "freed, not given back",
}


@dataclass(frozen=True)
class Plan:
    """The plan for one device, unless a field says otherwise. Sizes are in bytes, times in seconds."""

    devices: int
    micro_batches: int
    peak: int
    moment: str  # of the peak, by its name
    at_peak: dict[str, int]  # by label, such as gradients
    at_most: dict[str, int]  # the same, each label at its own peak
    of_memory: float  # the peak as a share of the device's memory
    recomputed: int  # blocks that keep only their input for the backward
    kept_by_block: int  # from its forward to its backward
    kept_by_block_with_remat: int
    whole_units: int  # gathered, or cast, at once
    largest_micro_batch: int
    model_flops: int  # per step
    seconds: dict[str, float]
    step_seconds: float
    tokens_per_second: float
    samples_per_second: float  # of all devices
    mfu: float


def facts(cfg: ModelConfig, setup: Setup, device: Device, name: str, per_node: int, seq: int) -> list[str]:
    """Lines that describe the model, the settings and the device of the plans."""
    dtype = lambda kind: str(kind).removeprefix("torch.")
    kinds = [setup.strategy] + ["blocks compiled"] * setup.compiled
    kinds += ["one sum over devices a step"] * (not setup.sync)
    return [
        f"{cost.parameters(cfg):,} parameters: {cfg.layers} layers, width {cfg.width}, {cfg.heads} heads, {cfg.kv_heads} of keys, "
        f"hidden {cfg.hidden}, vocabulary {cfg.vocab}",
        f"{', '.join(kinds)}; compute in {dtype(setup.dtype)}, gathered in {dtype(setup.param_dtype)}, gradients summed in "
        f"{dtype(setup.reduce_dtype)}, AdamW in {dtype(setup.masters)}",
        f"micro batches of {setup.micro_batch} x {setup.tokens} tokens (samples of {seq}, padded)",
        f"{name}: {device.flops / 1e12:.3g} TFLOPS, {device.memory / GB:.0f} GB at {device.bandwidth / GB:.4g} GB/s, "
        f"{device.link / GB:.3g} GB/s within a node of {per_node}, {device.network / GB:.3g} GB/s between nodes",
    ]


def table(plans: list[Plan], layers: int) -> list[str]:
    """An aligned Markdown table with a column for each plan of a model of so many layers."""
    unit, name = (GB, "GB") if max(plan.peak for plan in plans) >= 10 * GB else (MB, "MB")
    size = lambda n: f"{n / unit:.{2 if unit == GB else 1}f}"
    rows = {
        f"{title}, {name}": [f"{size(plan.at_peak[label])} ({size(plan.at_most[label])})" for plan in plans]
        for label, title in TITLES.items()
        if any(plan.at_most[label] for plan in plans)
    }
    rows |= {
        f"**predicted peak, {name}**": [size(plan.peak) for plan in plans],
        "of the device's memory": [f"{plan.of_memory:.0%}" for plan in plans],
        "reached in": [plan.moment for plan in plans],
        f"blocks computed again, of {layers}": [str(plan.recomputed) for plan in plans],
        f"a block keeps, {name}": [size(plan.kept_by_block) for plan in plans],
        f"a block keeps with remat, {name}": [size(plan.kept_by_block_with_remat) for plan in plans],
        "whole units at once": [str(plan.whole_units) for plan in plans],
        "largest micro batch": [_count(plan.largest_micro_batch) for plan in plans],
        "micro batches a step": [str(plan.micro_batches) for plan in plans],
        "model TFLOP a step": [f"{plan.model_flops / 1e12:.4g}" for plan in plans],
    }
    rows |= {f"{part}, s": [f"{plan.seconds[part]:.3g}" for plan in plans] for part in plans[0].seconds}
    rows |= {
        "**predicted step, s**": [f"{plan.step_seconds:.3g}" for plan in plans],
        "tokens/s": [f"{plan.tokens_per_second:.4g}" for plan in plans],
        "samples/s of all devices": [f"{plan.samples_per_second:.3g}" for plan in plans],
        "MFU": [f"{plan.mfu:.1%}" for plan in plans],
    }
    return aligned(
        [["per device, of", *(str(plan.devices) for plan in plans)], *([key, *row] for key, row in rows.items())]
    )


def notes(device: Device, name: str, dtype: torch.dtype) -> list[str]:
    """Lines that explain the numbers."""
    lines = [
        "Memory is that of tensors: at the peak, in brackets at the most that each takes in a step. The largest micro batch leaves "
        f"{1 - USABLE:.0%} of the device to its runtime and to fragmentation.",
        "Model FLOPs: 6 per token and parameter that multiplies (the embedding is looked up), and 6 x layers x width x tokens of "
        "causal attention. Recomputing takes time, and does not count in the MFU.",
        f"Time: {device.reached:.0%} of the peak FLOPs and {BANDWIDTH:.0%} of the bandwidths are reached; only prefetched gathers "
        "run beside compute. Tokens count with their padding.",
    ]
    if name == CPU:
        lines.append(
            "cpu: this machine, measured just now, shared by the processes of a node. What is freed and not given back is what glibc "
            "keeps by itself; with MALLOC_MMAP_THRESHOLD_=131072 it is next to nothing, and steps take 10 to 30 % more CPU time."
        )
    elif dtype != torch.bfloat16:
        lines.append(
            f"{name}: the peak FLOPs are those of bfloat16, which are fewer in {str(dtype).removeprefix('torch.')}."
        )
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """A Markdown table with aligned columns; the first of the rows is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = lambda row: [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
    return [f"| {' | '.join(cells(row))} |" for row in (rows[0], rule, *rows[1:])]


def _count(n: int) -> str:
    return {0: "none fits", MOST: f"{MOST} or more"}.get(n, str(n))
