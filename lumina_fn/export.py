"""The model as programs for a machine that need not have this code: torch.export's .pt2 files, for a CPU or an Ascend NPU.

    python -m lumina_fn.export MODEL OUT --what forward|step|decode --target cpu|npu

OUT holds one .pt2 for each bucket of sizes, and report.json, which names inputs, outputs and ops, and of each size that is not
fixed the least and the largest. Of MODEL only the sizes in
its config.json are read.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload

from lumina_fn import checkpoint, errors
from lumina_fn.config import ModelConfig
from lumina_fn.disk import files, places, reading
from lumina_fn.errors import InputError, printable
from lumina_fn.optim import AdamW
from lumina_fn.process.ranges import CLIP, WEIGHT_DECAY, Z_WEIGHT, Range
from lumina_fn.programs import CPU, NPU, Exported, Function, decoding, export, forward, step
from lumina_fn.sharding import Mesh

REPORT = "report.json"


class Program(NamedTuple):
    """A reloaded program."""

    run: Callable[..., Any]  # of all inputs' tensors, in order
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        """Outputs by name, of a tree of inputs such as ForwardInputs, StepInputs or DecodeInputs."""
        return dict(zip(self.outputs, self.run(*pytree.tree_leaves(inputs)), strict=True))


def load(out: str | Path, file: str) -> Program:
    """One of the programs of a folder that `python -m lumina_fn.export` wrote. torch.export.load trusts its file: so must you."""
    (entry,) = (
        p for p in reading.json_object(Path(out) / REPORT, "the report of an export")["programs"] if p["file"] == file
    )
    program = torch.export.load(Path(out) / file)
    return Program(program.module(), *(tuple(x["name"] for x in entry[key]) for key in ("inputs", "outputs")))


def save(exported: Exported, path: Path) -> dict[str, Any]:
    """Write a program; what the report says of it."""
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


TARGETS = {"cpu": (CPU, torch.float32), "npu": (NPU, torch.bfloat16)}  # and the dtype that is usual there


def functions(cfg: ModelConfig, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[], Function]]:
    """What is asked for, by file name: one for each bucket."""
    tokens = args.tokens or [min(4096, cfg.max_positions)]
    if args.what == "forward":
        return {f"forward-b{b}.pt2": partial(forward, cfg, batch=b, dtype=dtype) for b in args.batch}
    if args.what == "decode":
        return {
            f"decode-b{b}-s{t}.pt2": partial(decoding, cfg, batch=b, slots=t, dtype=dtype)
            for b in args.batch
            for t in tokens
        }
    opt = AdamW(decay=args.weight_decay, clip=args.clip)
    mesh = Mesh("0", 0, args.devices, "meta", args.strategy, param_dtype=dtype) if args.devices > 1 else None
    options = {"z_weight": args.z_weight, "dtype": dtype, "remat": args.remat, "packed": args.packed}
    return {
        f"step-b{b}-t{t}.pt2": partial(step, cfg, opt, mesh, batch=b, tokens=t, **options)
        for b in args.batch
        for t in tokens
    }


ONLY_STEP = ("packed", "remat", "devices", "strategy", "weight_decay", "clip", "z_weight")
IGNORED = {"forward": ("tokens", *ONLY_STEP), "decode": ONLY_STEP, "step": ()}  # flags that a --what has no use for


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(prog="python -m lumina_fn.export", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a model's folder, of which config.json is read and no weights")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--what",
        required=True,
        choices=("forward", "step", "decode"),
        help="logits of whole rows; a training step; one more token over a cache",
    )
    parser.add_argument("--target", required=True, choices=TARGETS, help="where it will run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of compute (default: float32 for cpu, bfloat16 for npu)"
    )
    parser.add_argument(
        "--batch", type=_size, nargs="+", default=[1], metavar="N", help="rows; a program for each (default: 1)"
    )
    parser.add_argument(
        "--tokens",
        type=_size,
        nargs="+",
        metavar="N",
        help="tokens of a row (step) or slots of a cache (decode); a program for each (default: 4096, or the model's own limit)",
    )
    parser.add_argument("--packed", action="store_true", help="step: rows hold several documents")
    parser.add_argument("--remat", action="store_true", help="step: compute blocks again in the backward")
    parser.add_argument("--devices", type=_size, default=1, metavar="N", help="step: ranks that share the state")
    parser.add_argument("--strategy", choices=("fsdp", "sdp", "no"), default="fsdp", help="step: how they share it")
    parser.add_argument(
        "--weight-decay", type=partial(_number, WEIGHT_DECAY), default=AdamW().decay, help="step: AdamW's"
    )
    parser.add_argument(
        "--clip", type=partial(_number, CLIP), default=AdamW().clip, help="step: largest norm of the gradients"
    )
    parser.add_argument("--z-weight", type=partial(_number, Z_WEIGHT), default=1e-5, help="step: weight of the z-loss")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser  # fmt: skip


def _number(within: Range, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number") from error
    if problem := within.problem(value):
        raise argparse.ArgumentTypeError(f"{text}: {problem}")
    return value


def _size(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0 and at most {1 << 20}")
    return int(text)


def main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    for name in IGNORED[args.what]:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')}: --what {args.what} does not take it; leave it out")
    cfg, (target, usual) = checkpoint.read_config(args.model), TARGETS[args.target]
    if max(args.tokens or [1]) > cfg.max_positions:
        raise InputError(f"--tokens {max(args.tokens)}: {args.model} has {cfg.max_positions} positions; give no more")
    dtype = getattr(torch, args.dtype) if args.dtype else usual
    places.place(args.out, [Path(args.model)])
    with files.new_folder(args.out, "programs", args.overwrite) as folder:
        told = []
        for name, function in functions(cfg, args, dtype).items():
            told.append(save(export(function(), target), folder / name))
            total = sum(told[-1]["ops"].values())
            print(
                printable(f"{name}: {total} ops of {len(told[-1]['ops'])} kinds, {told[-1]['parameters']} parameters")
            )
        checkpoint.write_json(
            folder / REPORT, {"what": args.what, "target": args.target, "torch": torch.__version__, "programs": told}
        )
    return 0


if __name__ == "__main__":
    errors.run(main)
