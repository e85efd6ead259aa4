"""The plan of a training run: memory and time of a step on each device, for every given number of devices."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.planning import devices, report, roofline
from experiments.planning.devices import CPU, DEVICES, Device
from experiments.planning.report import MOST, USABLE, Plan
from lumina_fn import checkpoint, sources
from lumina_fn.config import LATER, LUMINA_7B, ModelConfig
from lumina_fn.costs import cost, footprint
from lumina_fn.costs.cost import Setup
from lumina_fn.errors import InputError
from lumina_fn.features import batches
from lumina_fn.formats import hf_config
from lumina_fn.formats.hf_config import LARGEST
from lumina_fn.process.ranges import blocks
from lumina_fn.state import runs

if TYPE_CHECKING:
    from experiments.plan import Settings

SIZES = ("layers", "width", "heads", "kv_heads", "hidden", "vocab", "max_positions")


def main(run: "Settings") -> int:
    """Print the plan as a table, as JSON or as a roofline; returns the exit code. Raises InputError."""
    _check(run)
    cfg, compute = _config(run), _dtype(run.dtype, torch.float32 if run.device == CPU else torch.bfloat16)
    device = devices.cpu(compute) if run.device == CPU else DEVICES[run.device]
    device = replace(device, reached=run.efficiency or device.reached)
    setups = [_setup(run, cfg, n, compute, _own(run, device, n)) for n in run.devices]
    if run.roofline:
        print("\n".join(roofline.lines(cfg, setups, device, run.devices_per_node)))
        return 0
    plans = [plan(cfg, setup, _own(run, device, setup.devices), run.devices_per_node) for setup in setups]
    if run.json:
        print(json.dumps([asdict(plan) for plan in plans], indent=2))
        return 0
    about = report.facts(cfg, setups[0], device, run.device, run.devices_per_node, run.seq)
    print("\n".join([*about, "", *report.table(plans, cfg.layers), "", *report.notes(device, run.device, compute)]))
    return 0


def plan(cfg: ModelConfig, setup: Setup, device: Device, per_node: int) -> Plan:
    """Memory and time of a training step on one of its devices; a node has `per_node` devices."""
    moments = footprint.memory(cfg, setup)
    moment, at_peak = max(moments.items(), key=lambda item: item[1].total())
    seconds = devices.seconds(cfg, setup, device, per_node)
    step, samples = sum(seconds.values()), setup.micro_batches * setup.micro_batch
    flops = cost.flops(cfg, setup.tokens) * samples * setup.tokens
    return Plan(
        devices=setup.devices,
        micro_batches=setup.micro_batches,
        peak=at_peak.total(),
        moment=moment,
        at_peak={label: at_peak[label] for label in footprint.LABELS},
        at_most={label: max(by_label[label] for by_label in moments.values()) for label in footprint.LABELS},
        of_memory=at_peak.total() / device.memory,
        recomputed=setup.recomputed(cfg),
        kept_by_block=footprint.kept(cfg, replace(setup, remat=False)),
        kept_by_block_with_remat=footprint.kept(cfg, replace(setup, remat=True)),
        whole_units=cost.whole_units(cfg, setup),
        largest_micro_batch=largest(
            lambda n: footprint.peak(cfg, replace(setup, micro_batch=n)), USABLE * device.memory, MOST
        ),
        model_flops=flops,
        seconds=seconds,
        step_seconds=step,
        tokens_per_second=samples * setup.tokens / step,
        samples_per_second=setup.devices * samples / step,
        mfu=flops / step / device.flops,
    )


def largest(size: Callable[[int], int], room: float, most: int) -> int:
    """The largest n up to `most` with size(n) <= room, 0 if there is none; found with secants, since size grows almost linearly."""
    fits, fails, guess, known = 0, most + 1, 1, {}
    while fits + 1 < fails:
        n = min(max(guess, fits + 1), fails - 1)
        known[n] = size(n)
        fits, fails = (n, fails) if known[n] <= room else (fits, n)
        (a, first), (b, last) = min(known.items()), max(known.items())
        guess = a + int((room - first) * (b - a) / max(last - first, 1)) if a < b else 2
    return fits


def _setup(run: "Settings", cfg: ModelConfig, n: int, compute: torch.dtype, device: Device) -> Setup:
    shard_size = run.shard_size or min(run.devices_per_node, n)
    if run.strategy.startswith("hybrid") and n % shard_size:
        raise InputError(f"--shard-size {shard_size}: expected a divisor of the {n} devices")
    if n > run.devices_per_node and n % run.devices_per_node:
        raise InputError(f"--devices {n}: expected whole nodes of --devices-per-node {run.devices_per_node}")
    tokens = min(batches.bucket(min(run.seq, cfg.max_positions)), cfg.max_positions)
    taken = setup_of(run, cfg, tokens, compute, run.device == CPU)
    share = -(-(run.batch or n * run.micro_batch) // n)
    setup = replace(taken, devices=n, shard_size=shard_size, micro_batches=-(-share // run.micro_batch))
    if run.remat == "auto":
        setup = replace(setup, remat=footprint.fewest_recomputed(cfg, setup, int(USABLE * device.memory)))
    return setup


def setup_of(run: Any, cfg: ModelConfig, tokens: int, compute: torch.dtype, cpu: bool) -> Setup:
    """The Setup of these flags, finetune's or plan's, for rows of so many tokens, on one device and in one micro batch."""
    return Setup(
        strategy=run.strategy,
        tokens=tokens,
        micro_batch=run.micro_batch,
        dtype=compute,
        param_dtype=_dtype(run.param_dtype, compute),
        reduce_dtype=_dtype(run.reduce_dtype, torch.promote_types(compute, torch.float32)),
        remat=blocks(run.remat, cfg.layers) or 0,
        compiled=run.compile != "off",
        sync=run.sync,
        forward_prefetch=run.forward_prefetch and not cpu,
        backward_prefetch=run.backward_prefetch and not cpu,
        cpu=cpu,
    )


def _own(run: "Settings", device: Device, n: int) -> Device:
    """The part of the device that one of n processes has."""
    return devices.share(device, min(n, run.devices_per_node)) if run.device == CPU else device


def _config(run: "Settings") -> ModelConfig:
    cfg = LUMINA_7B if run.model is None else read_config(run.model)
    given = {name: value for name in SIZES if (value := getattr(run, name)) is not None}
    if "heads" in given and cfg.kv_heads == cfg.heads:
        given = {"kv_heads": given["heads"]} | given
    cfg = replace(cfg, masked_ids=(), **given)
    if cfg.width % cfg.heads or cfg.head_width % 2:
        raise InputError(
            f"width {cfg.width} / heads {cfg.heads}: expected an even whole number; give --width or --heads"
        )
    if cfg.heads % cfg.kv_heads:
        raise InputError(
            f"kv heads {cfg.kv_heads}: expected a divisor of the {cfg.heads} heads; give --kv-heads or --heads"
        )
    return cfg


def read_config(folder: Path) -> ModelConfig:
    """The sizes in a native or Hugging Face folder's config.json, or of a run's model. Raises InputError for other folders."""
    if runs.checkpoint(folder):
        return checkpoint.read_config(folder)
    where = folder / "config.json"
    config = sources.read_json(where)
    if "format" not in config:
        return hf_config.parse(config, {}, where)[0]
    sizes = config.get("model")
    names = {field.name for field in fields(ModelConfig)} - {"ids"}
    sizes = LATER | sizes if isinstance(sizes, dict) else sizes
    if (
        (config["format"], config.get("kind")) != (sources.FORMAT, "lumina")
        or not isinstance(sizes, dict)
        or sizes.keys() != names
    ):
        raise InputError(f"{where} describes no Lumina transformer: give the language model's folder")
    if wrong := hf_config.problems(sizes):
        raise InputError(f"{where}: {'; '.join(wrong)}")
    return ModelConfig(**{**sizes, "masked_ids": ()})


def _check(run: "Settings") -> None:
    for n in run.devices:
        if not 1 <= n <= LARGEST:
            raise InputError(f"--devices {n}: expected from 1 to {LARGEST}")
    for name in (*SIZES, "seq", "micro_batch", "batch", "devices_per_node", "shard_size"):
        value = getattr(run, name)
        if value is not None and not 1 <= value <= LARGEST:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected from 1 to {LARGEST}")
    if run.device not in (*DEVICES, CPU):
        raise InputError(f"--device {run.device}: expected one of {', '.join((*DEVICES, CPU))}")
    if run.efficiency is not None and not 0 < run.efficiency <= 1:
        raise InputError(f"--efficiency {run.efficiency}: expected a fraction, above 0 and at most 1")


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else getattr(torch, name)
