"""Functions of the model as programs: graphs over tensors alone, with ops that a target can run.

A program takes every tensor as an input, parameters too: it is small, is made from a model's sizes in seconds, and serves any
weights. The report (lumina_fn.export) names inputs and outputs by their tree paths.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, default_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from kernels import npu_fakes, vendored
from lumina_fn import decode, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.optim import AdamW
from lumina_fn.sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]


class Function(NamedTuple):
    """A function to export: fn of `inputs`, a tree of fake tensors; axes of variable size, by input name."""

    fn: Callable[..., Any]
    inputs: Any
    dynamic: Mapping[str, Mapping[int, Dim]] = {}


class ForwardInputs(NamedTuple):
    """The inputs of the program that `forward` makes."""

    tokens: Tensor
    params: model.Params


class StepInputs(NamedTuple):
    """The inputs of the program that `step` makes."""

    state: train.TrainState
    batch: train.Batch | train.Packed
    lr: Tensor


class DecodeInputs(NamedTuple):
    """The inputs of the program that `decoding` makes."""

    tokens: Tensor  # the newest token of each row
    lengths: Tensor  # number of tokens in each row before it
    cache: decode.Cache
    params: model.Params


class Exported(NamedTuple):
    """A program, and the names of its inputs and outputs in order."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def fake(device: torch.device | str, like: Any) -> Any:
    """The tree's tensors as fake ones on `device`."""
    with FakeTensorMode():
        return pytree.tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), like)


def forward(cfg: ModelConfig, *, batch: int, dtype: torch.dtype) -> Function:
    """Logits [B T V] of tokens [B T] of any length T."""
    inputs = ForwardInputs(_ids(batch, 8), model.init(cfg, device="meta", dtype=dtype))
    fn = lambda tokens, params: {"logits": model.forward(params, tokens, cfg)}
    return Function(fn, inputs, {"tokens": {1: Dim("T", min=2, max=cfg.max_positions)}})


def step(
    cfg: ModelConfig,
    opt: AdamW,
    mesh: Mesh | None = None,
    *,
    batch: int,
    tokens: int,
    packed: bool = False,
    **options: Any,
) -> Function:
    """One training step (train.make_update with these options) over rows [B T]; masters in float32."""
    state = train.init_state(model.init(cfg, device="meta"), opt, mesh)
    ids = [_ids(batch, tokens) for _ in range(3 if packed else 2)]
    update = train.make_update(cfg, opt, mesh, train.Options(**options))

    def fn(state, batch, lr):
        state, metrics = update(state, batch, lr)
        return {"state": state, "metrics": metrics}

    return Function(
        fn, StepInputs(state, (train.Packed if packed else train.Batch)(*ids), torch.empty((), device="meta"))
    )


def decoding(cfg: ModelConfig, *, batch: int, slots: int, dtype: torch.dtype) -> Function:
    """Logits [B V] after one more token in each row of a cache of `slots`, and the new cache."""
    params = model.init(cfg, device="meta", dtype=dtype)
    cache = decode.empty_cache(params, cfg, batch, slots)

    def fn(tokens, lengths, cache, params):
        logits, cache = decode.step(params, tokens, lengths, cache, cfg)
        return {"logits": logits, "cache": cache}

    return Function(fn, DecodeInputs(_ids(batch), _ids(batch), cache, params))


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


class Target(NamedTuple):
    """Where a program runs."""

    device: Callable[[], torch.device]
    kernels: Mapping[Any, Callable[..., Any]]  # replacements of our ops on the target
    ops: frozenset[str] | None  # the ops that it can run; None: all of torch's


def npu_device() -> torch.device:
    """The device npu for fake tensors; torch_npu's ops are declared if it is not loaded."""
    npu_fakes.declare()
    return npu_fakes.declare_device()


def converters() -> frozenset[str]:
    """The ops that torch_npu can convert for Ascend's graph engine."""
    lines = (resources.files(vendored) / "ge_converters.txt").read_text().splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


aten = torch.ops.aten
# torch_npu has eager kernels for these, so torch does not decompose them if it is loaded; none has a converter.
COMPOSITES = {
    aten.contiguous.default: lambda x: x.clone(memory_format=torch.contiguous_format),
    aten.isfinite.default: lambda x: (x == x) & (x.abs() != float("inf")),
    aten.softmax.int: lambda x, dim: aten._softmax(x, dim, False),
}
CPU = Target(lambda: torch.device("cpu"), {}, None)
NPU = Target(npu_device, {**ops.ASCEND, **COMPOSITES}, converters())


def export(function: Function, target: Target) -> Exported:
    """The function as a program for a target. Raises InputError for an op that the target cannot run.

    A function that differentiates is traced by make_fx first: torch.export alone would keep torch.func's wrappers.
    """
    inputs = fake(target.device(), function.inputs)
    paths, spec = pytree.tree_flatten_with_path(inputs)
    names, leaves = tuple(_name(path) for path, _ in paths), tuple(leaf for _, leaf in paths)
    outputs: tuple[str, ...] = ()

    def flat(*xs: Tensor) -> list[Tensor]:
        nonlocal outputs
        results, _ = pytree.tree_flatten_with_path(function.fn(*pytree.tree_unflatten(list(xs), spec)))
        outputs = tuple(_name(path) for path, _ in results)
        return [leaf for _, leaf in results]

    with torch.no_grad():
        if function.dynamic:
            shapes = (tuple(function.dynamic.get(name) for name in names),)
            program = torch.export.export(_Flat(flat), leaves, strict=False, dynamic_shapes=shapes)
            program = program.run_decompositions({**_composites(program), **target.kernels})
            _drop_assertions(program)
        else:
            graph = make_fx(flat, decomposition_table=target.kernels, tracing_mode="fake")(*leaves)
            graph.graph.eliminate_dead_code()
            program = torch.export.export(graph, leaves, strict=False)
    _check(program, target, lambda: flat(*leaves), leaves[0].fake_mode)
    return Exported(program, names, outputs)


def _composites(program: ExportedProgram) -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions of the program's composite ops, which make_fx has not decomposed."""
    known, used = default_decompositions(), {node.target for node in program.graph.nodes}
    return {op: known[op] for op in used if isinstance(op, OpOverload) and op._can_decompose() and op in known}


def _drop_assertions(program: ExportedProgram) -> None:
    """Remove torch.export's assertions on dtypes: no device has a kernel for them."""
    for node in list(program.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _check(program: ExportedProgram, target: Target, again: Callable[[], Any], mode: FakeTensorMode) -> None:
    used = {node.target for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    if target.ops is None or not (refused := {op for op in used if str(op) not in target.ops}):
        return
    places = _Places(refused, target.kernels)
    with torch.no_grad(), mode, places:
        again()
    each = "; ".join(
        f"{op} ({', '.join(sorted(places.found[op])) or 'place unknown'})" for op in sorted(refused, key=str)
    )
    raise InputError(f"no program for this target: it cannot run {each}; write these with ops that it has")


class _Places(TorchDispatchMode):
    """While active, records the source line of this project that calls certain ops."""

    def __init__(self, wanted: Set[OpOverload], kernels: Mapping[Any, Callable[..., Any]]):
        super().__init__()
        self.wanted, self.kernels = wanted, kernels
        self.found: dict[OpOverload, set[str]] = {op: set() for op in wanted}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.wanted:
            self.found[func].add(_place())
        if func in self.kernels:
            with self:
                return self.kernels[func](*args)
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of this project in the call stack; a line in kernels or ops only if there is no other."""
    ours = [
        (path.relative_to(ROOT), frame)
        for frame in traceback.extract_stack()[:-2]
        if (path := Path(frame.filename)).is_relative_to(ROOT)
        and "site-packages" not in path.parts
        and path != Path(__file__)
    ]
    of_model = [(path, frame) for path, frame in ours if path.parts[0] not in ("kernels", "ops")]
    if not ours:
        return "outside of this project"
    path, frame = (of_model or ours)[-1]
    return f"{path}:{frame.lineno} in {frame.name}"


class _Flat(torch.nn.Module):
    """A function of tensors as a module, which torch.export needs."""

    def __init__(self, fn: Callable[..., Any]):
        super().__init__()
        self.fn = fn

    def forward(self, *xs: Tensor) -> Any:
        return self.fn(*xs)


def _name(path: Iterable[Any]) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
