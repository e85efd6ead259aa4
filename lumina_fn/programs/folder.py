"""A folder of exported programs: a .pt2 file for each bucket of sizes, and report.json, which names inputs, outputs and ops."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload

from lumina_fn import checkpoint
from lumina_fn.config import ModelConfig
from lumina_fn.disk import files, places, reading
from lumina_fn.errors import InputError, printable
from lumina_fn.optim import AdamW
from lumina_fn.process.ranges import blocks
from lumina_fn.programs.graphs import CPU, NPU, Exported, Function, decoding, export, forward, step
from lumina_fn.sharding import Mesh

if TYPE_CHECKING:
    from lumina_fn.export import Settings

REPORT = "report.json"


class Program(NamedTuple):
    """A reloaded program."""

    run: Callable[..., Any]  # a function of all inputs' tensors, in order
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        """The outputs by name, for a tree of inputs such as ForwardInputs, StepInputs or DecodeInputs."""
        return dict(zip(self.outputs, self.run(*pytree.tree_leaves(inputs)), strict=True))


def load(out: str | Path, file: str) -> Program:
    """A program from a folder that `lumina export` wrote. torch.export.load is not safe on an untrusted file."""
    (entry,) = (
        p for p in reading.json_object(Path(out) / REPORT, "the report of an export")["programs"] if p["file"] == file
    )
    program = torch.export.load(Path(out) / file)
    return Program(program.module(), *(tuple(x["name"] for x in entry[key]) for key in ("inputs", "outputs")))


def save(exported: Exported, path: Path) -> dict[str, Any]:
    """Write a program; its entry in the report."""
    program = exported.program
    program._example_inputs = None  # fake tensors cannot be written
    torch.export.save(program, path)
    values = {node.name: node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    spec = program.graph_signature
    told = lambda names, nodes: [
        {"name": name, "shape": [str(n) if isinstance(n, torch.SymInt) else n for n in values[node].shape], "dtype": str(values[node].dtype).removeprefix("torch.")}
        for name, node in zip(names, nodes, strict=True)
    ]  # fmt: skip
    counts = Counter(str(node.target) for node in program.graph.nodes if isinstance(node.target, OpOverload))
    return {
        "file": path.name,
        "sizes": {str(name): [int(some.lower), int(some.upper)] for name, some in program.range_constraints.items()},
        "parameters": sum(
            values[node].numel()
            for name, node in zip(exported.inputs, spec.user_inputs, strict=True)
            if "params." in name
        ),
        "ops": dict(sorted(counts.items())),
        "inputs": told(exported.inputs, spec.user_inputs),
        "outputs": told(exported.outputs, spec.user_outputs),
    }


TARGETS = {"cpu": (CPU, torch.float32), "npu": (NPU, torch.bfloat16)}  # and its default dtype


def functions(cfg: ModelConfig, run: "Settings", dtype: torch.dtype) -> dict[str, Callable[[], Function]]:
    """The functions to export by file name, one for each bucket."""
    tokens = run.tokens or (min(4096, cfg.max_positions),)
    if run.what == "forward":
        return {f"forward-b{b}.pt2": partial(forward, cfg, batch=b, dtype=dtype) for b in run.batch}
    if run.what == "decode":
        return {
            f"decode-b{b}-s{t}.pt2": partial(decoding, cfg, batch=b, slots=t, dtype=dtype)
            for b in run.batch
            for t in tokens
        }
    if (remat := blocks(run.remat, cfg.layers)) is None:
        raise InputError(
            f"--remat auto: a program is of one number of blocks; give all, or a number from 0 to {cfg.layers}"
        )
    opt = AdamW(decay=run.weight_decay, clip=run.clip)
    mesh = Mesh("0", 0, run.devices, "meta", run.strategy, param_dtype=dtype) if run.devices > 1 else None
    options = {"z_weight": run.z_weight, "dtype": dtype, "remat": remat, "packed": run.packed}
    return {
        f"step-b{b}-t{t}.pt2": partial(step, cfg, opt, mesh, batch=b, tokens=t, **options)
        for b in run.batch
        for t in tokens
    }


def write(run: "Settings", say: Callable[[str], None]) -> None:
    """Write the new folder `run.out`; `say` receives a line about each program. Raises InputError."""
    cfg, (target, usual) = checkpoint.read_config(run.model), TARGETS[run.target]
    if (longest := max(run.tokens or (1,))) > cfg.max_positions:
        raise InputError(f"--tokens {longest}: {run.model} has {cfg.max_positions} positions; give no more")
    dtype = getattr(torch, run.dtype) if run.dtype else usual
    places.place(run.out, [run.model])
    with files.new_folder(run.out, "programs", run.overwrite) as folder:
        told = []
        for name, function in functions(cfg, run, dtype).items():
            told.append(save(export(function(), target), folder / name))
            total = sum(told[-1]["ops"].values())
            say(printable(f"{name}: {total} ops of {len(told[-1]['ops'])} kinds, {told[-1]['parameters']} parameters"))
        checkpoint.write_json(
            folder / REPORT, {"what": run.what, "target": run.target, "torch": torch.__version__, "programs": told}
        )
