"""The model as programs for a machine that need not have this code: torch.export's .pt2 files, for a CPU or an Ascend NPU.

    python -m lumina_fn.export MODEL OUT --what forward|step|decode --target cpu|npu

A program takes every tensor as an input, parameters too: it is small, is made from the sizes in MODEL's config.json in
seconds, and serves any weights. OUT holds one .pt2 for each bucket of sizes and report.json, which names inputs, outputs and ops.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

import ops
from lumina_fn import checkpoint, decode, errors, files, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError, printable
from lumina_fn.optim import AdamW
from lumina_fn.sharding import Mesh


class Function(NamedTuple):
    """What is exported: fn of `inputs`, a tree of fake tensors; axes that may have any size, by input name."""

    fn: Callable[..., Any]
    inputs: Any
    dynamic: Mapping[str, Mapping[int, Dim]] = {}


class ForwardInputs(NamedTuple):
    tokens: Tensor
    params: model.Params


class StepInputs(NamedTuple):
    state: train.TrainState
    batch: train.Batch | train.Packed
    lr: Tensor


class DecodeInputs(NamedTuple):
    tokens: Tensor  # the newest of each row
    lengths: Tensor  # how many each row holds before them
    cache: decode.Cache
    params: model.Params


class Exported(NamedTuple):
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
    cfg: ModelConfig, opt: AdamW, mesh: Mesh | None = None, *, batch: int, tokens: int, packed: bool = False, **options: Any
) -> Function:  # fmt: skip
    """One training step (train.make_update with these options) over rows [B T]; masters in float32."""
    state = train.init_state(model.init(cfg, device="meta"), opt, mesh)
    rows = [_ids(batch, tokens) for _ in range(3 if packed else 2)]
    update = train.make_update(cfg, opt, mesh, **options)

    def fn(state, batch, lr):
        state, metrics = update(state, batch, lr)
        return {"state": state, "metrics": metrics}

    return Function(fn, StepInputs(state, (train.Packed if packed else train.Batch)(*rows), torch.empty((), device="meta")))


def decoding(cfg: ModelConfig, *, batch: int, slots: int, dtype: torch.dtype) -> Function:
    """Logits [B V] after one more token in each row of a cache of `slots`, and the new cache."""
    params = model.init(cfg, device="meta", dtype=dtype)
    cache = decode.empty_cache(params, cfg, batch, slots)
    ids = [torch.empty(batch, dtype=torch.int64, device="meta") for _ in range(2)]

    def fn(tokens, lengths, cache, params):
        logits, cache = decode.step(params, tokens, lengths, cache, cfg)
        return {"logits": logits, "cache": cache}

    return Function(fn, DecodeInputs(*ids, cache, params))


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def export(function: Function, target: "Target") -> Exported:
    """The function as a program for a target; InputError where an op of it cannot run there.

    make_fx comes first: torch.export alone would keep torch.func's wrappers, and torch.compile would drop custom backwards.
    """
    inputs = fake(target.device(), function.inputs)
    paths, spec = pytree.tree_flatten_with_path(inputs)
    names, leaves = tuple(_name(path) for path, _ in paths), [leaf for _, leaf in paths]
    outputs: tuple[str, ...] = ()

    def flat(*xs: Tensor) -> list[Tensor]:
        nonlocal outputs
        results, _ = pytree.tree_flatten_with_path(function.fn(*pytree.tree_unflatten(list(xs), spec)))
        outputs = tuple(_name(path) for path, _ in results)
        return [leaf for _, leaf in results]

    with torch.no_grad():
        if function.dynamic:
            shapes = (tuple(function.dynamic.get(name) for name in names),)
            program = torch.export.export(_Flat(flat), tuple(leaves), strict=False, dynamic_shapes=shapes)
            program = program.run_decompositions(dict(target.kernels))
        else:
            graph = make_fx(flat, decomposition_table=target.kernels, tracing_mode="fake")(*leaves)
            graph.graph.eliminate_dead_code()
            program = torch.export.export(graph, tuple(leaves), strict=False)
    return Exported(program, names, outputs)


class _Flat(torch.nn.Module):
    """A function of tensors as torch.export takes it."""

    def __init__(self, fn: Callable[..., Any]):
        super().__init__()
        self.fn = fn

    def forward(self, *xs: Tensor) -> Any:
        return self.fn(*xs)


def _name(path: Iterable[Any]) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
