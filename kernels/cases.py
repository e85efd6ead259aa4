"""Every op at a size, as data: its inputs, the kernels that make its results, and what those must compute and move.

An implementation is any object whose functions have the names of kernels.reference's: a module, torch.ops.lumina, a namespace. The
error of its results is the distance to the reference in float64; it is reported beside the error of eager PyTorch, which is the
reference in the same precision. Both are computed on the CPU, so that every device is compared with the same numbers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from kernels import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS, Z_WEIGHT = 1e-5, 1e-2
Values = dict[str, Any]  # inputs and results by name: tensors, lists of them, numbers


class Call(NamedTuple):
    """A kernel with the names of its arguments and of its results; a kernel that works in place returns some of its arguments."""

    kernel: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    flops: int = 0  # of matrix products; 0 where memory is what bounds it
    part: str = "forward"
    moves: tuple[str, ...] | None = None  # the tensors that must be read or written; None: all that it takes and gives

    def __call__(self, kernels: Any, values: Mapping[str, Any]) -> Values:
        """The kernel's results by name."""
        made = getattr(kernels, self.kernel)(*(values[name] for name in self.takes))
        if made is None:
            return {name: values[name] for name in self.gives}
        return dict(zip(self.gives, made if isinstance(made, tuple) else (made,), strict=True))

    def bytes(self, values: Mapping[str, Any]) -> int:
        """The least number of bytes to move: each argument and each result once."""
        names = self.takes + self.gives if self.moves is None else self.moves
        leaves = pytree.tree_leaves([values[name] for name in names])
        return sum(x.nbytes for x in leaves if isinstance(x, Tensor))


class Case(NamedTuple):
    """An op at a size: its forward call, followed by its backward call if it has one."""

    make: Callable[
        [Callable[..., Tensor]], Values
    ]  # inputs, given a function that makes random tensors in the dtype under test
    calls: tuple[Call, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Values:
        """The arguments, with the same values on every device."""
        generator = torch.Generator().manual_seed(0)
        randn = lambda *shape, scale=1.0: (torch.randn(shape, generator=generator) * scale).to(dtype)
        return pytree.tree_map_only(Tensor, lambda x: x.to(device), self.make(randn))

    def run(self, kernels: Any, inputs: Values) -> list[Values]:
        """The results of each call."""
        results: list[Values] = []
        for call in self.calls:
            results.append(call(kernels, {**inputs, **{name: x for made in results for name, x in made.items()}}))
        return results


class Sizes(NamedTuple):
    """The sizes of the tensors of every op."""

    rows: int  # B
    tokens: int  # T
    width: int  # D
    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    hidden: int  # F
    vocab: int  # V
    slots: int  # S, of a cache
    new: int  # tokens of a row that are decoded at once


SIZES = {
    "7b": Sizes(1, 4096, 4096, 32, 32, 128, 11_008, 171_385, 4096, 1),
    "tiny": Sizes(2, 48, 128, 4, 2, 64, 96, 520, 24, 3),
}


def cases(sizes: Sizes) -> dict[str, Case]:
    """The case of each op at these sizes, by name."""
    B, T, D, H, G, K, F, V, S, new = sizes
    q, kv = (B, T, H, K), (B, T, G, K)
    starts = [0, T // 8, T // 2]  # of a packed row's documents
    lengths = [end - start for start, end in zip(starts, [*starts[1:], T], strict=True)]
    # Two products of [T K] by [K T] in the forward, five in the backward, of which causal attention needs half.
    products = lambda *of: [B * H * K * sum(n * n for n in of) * count for count in (2, 5)]
    return {
        "rms_norm": Case(
            lambda randn: {"x": randn(B, T, D), "gain": randn(D), "dy": randn(B, T, D), "eps": EPS},
            _pair("rms_norm", "x gain eps", "y rstd", "dy x gain rstd", "dx dgain"),
        ),
        "add_rms_norm": Case(
            lambda randn: {
                **{name: randn(B, T, D) for name in ("x", "residual", "dtotal", "dy")}, "gain": randn(D), "eps": EPS,
            },
            _pair("add_rms_norm", "x residual gain eps", "total y rstd", "dtotal dy total gain rstd", "d dgain"),
        ),
        "qk_norm_rotary": Case(
            lambda randn: {
                "x": randn(*q), "gain": randn(1, K), "bias": randn(1, K), "dy": randn(*q), "angles": _angles(T, K), "eps": EPS,
            },
            _pair("qk_norm_rotary", "x gain bias angles eps", "y mean rstd", "dy x gain angles mean rstd", "dx dgain dbias"),
        ),
        "swiglu": Case(
            lambda randn: {name: randn(B, T, F) for name in ("gate", "up", "dy")},
            _pair("swiglu", "gate up", "y", "dy gate up", "dgate dup"),
        ),
        "attention": Case(
            lambda randn: {"q": randn(*q), "k": randn(*kv), "v": randn(*kv), "dout": randn(*q)},
            _pair("attention", "q k v", "out lse", "dout q k v out lse", "dq dk dv", products(T)),
        ),
        "packed_attention": Case(
            lambda randn: {
                "q": randn(*q), "k": randn(*kv), "v": randn(*kv), "dout": randn(*q),
                "first": torch.tensor(starts).repeat_interleave(torch.tensor(lengths)).repeat(B, 1),
            },
            _pair("packed_attention", "q k v first", "out lse", "dout q k v first out lse", "dq dk dv", products(*lengths)),
        ),
        "cached_attention": Case(
            lambda randn: {
                "q": randn(B, new, H, K), "keys": randn(B, S, G, K), "values": randn(B, S, G, K),
                "seen": (torch.arange(S) <= _last(S, new)[:, None]).repeat(B, 1, 1),
            },
            (_call("cached_attention", "q keys values seen", "out", 4 * B * new * S * H * K),),
        ),
        "write_cache": Case(
            lambda randn: {"cache": randn(B, S, G, K), "positions": _last(S, new).repeat(B, 1), "new": randn(B, new, G, K)},
            (_call("write_cache_", "cache positions new", "cache", part="in place", moves=("positions", "new", "new")),),
        ),
        "linear_cross_entropy": Case(
            lambda randn: {
                "x": randn(B * T, D), "weight": randn(V, D, scale=D**-0.5), "target": (target := _targets(B * T, V)),
                "count": (target >= 0).sum(), "z_weight": Z_WEIGHT, "masked": MASKED,
            },
            (
                _call(
                    "linear_cross_entropy_pass", "x weight target count z_weight masked", "ce z dx dweight", 6 * B * T * V * D,
                    part="both in one",
                ),
            ),
        ),
        "adamw": Case(
            lambda randn: _adamw(randn, ((F, D), (D, D), (D,))),
            (
                _call(
                    "adamw_", "params grads mu nu count lr scale skip b1 b2 eps decay", "params mu nu", part="in place"
                ),
            ),
            (torch.float32,),  # masters and moments are never narrower
        ),
    }  # fmt: skip


def _call(kernel: str, takes: str, gives: str, flops: int = 0, **others: Any) -> Call:
    return Call(kernel, tuple(takes.split()), tuple(gives.split()), flops, **others)


def _pair(op: str, takes: str, gives: str, back_takes: str, back_gives: str, flops: list[int] | None = None):
    forward, backward = flops or (0, 0)
    return (
        _call(f"{op}_fwd", takes, gives, forward),
        _call(f"{op}_bwd", back_takes, back_gives, backward, part="backward"),
    )


def _angles(T: int, K: int) -> Tensor:
    angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, K, 2) / K)
    return torch.stack([angle.cos(), angle.sin()], -2)


def _last(slots: int, new: int) -> Tensor:
    """The positions of the last tokens of a cache."""
    return torch.arange(slots - new, slots)


MASKED = [5, 77]


def _targets(N: int, V: int) -> Tensor:
    """Target ids that are not masked; every seventh is negative, so its row is not predicted."""
    target = torch.arange(N) * 37 % V
    target[torch.isin(target, torch.tensor(MASKED))] = V - 1
    target[::7] = -1
    return target


def _adamw(randn: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> Values:
    leaves = lambda scale: [randn(*shape, scale=scale) for shape in shapes]
    scalar = lambda x: torch.tensor(x, dtype=torch.float32)
    return {
        "params": leaves(1.0), "grads": leaves(1.0), "mu": leaves(0.1), "nu": [x.square() for x in leaves(0.1)],
        "count": torch.tensor(3), "lr": scalar(1e-3), "scale": scalar(1.0), "skip": scalar(0.0),
        "b1": 0.9, "b2": 0.95, "eps": 1e-8, "decay": 0.1,
    }  # fmt: skip


class Expected(NamedTuple):
    """A call's results in float64; the error, shapes, dtypes and strides of eager PyTorch's results."""

    exact: Values
    eager: dict[str, float]
    outlines: dict[str, list[str]]


class Error(NamedTuple):
    """The largest difference from float64, as a part of the largest number there."""

    output: str
    found: float
    eager: float
    bound: float  # twice eager's, and the output's own precision


def expected(case: Case, dtype: torch.dtype) -> list[Expected]:
    """The expected results of each call."""
    double = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, case.inputs(dtype))
    of_calls = zip(case.run(reference, double), case.run(reference, case.inputs(dtype)), strict=True)
    return [
        Expected(
            exact,
            {name: _distance(x, exact[name]) for name, x in eager.items()},
            {name: _outline(x) for name, x in eager.items()},
        )
        for exact, eager in of_calls
    ]


def errors(results: Values, wanted: Expected) -> list[Error]:
    """The error of each output of a call. Raises ValueError for one whose shape, dtype or strides are not the reference's."""
    found = []
    for name, x in results.items():
        outline = _outline(x)
        if outline != wanted.outlines[name]:
            raise ValueError(f"{name} is {', '.join(outline)}, expected {', '.join(wanted.outlines[name])}")
        eager = wanted.eager[name]
        bound = 2 * eager + torch.finfo(pytree.tree_leaves(x)[0].dtype).eps
        found.append(Error(name, _distance(x, wanted.exact[name]), eager, bound))
    return found


def _outline(x: Any) -> list[str]:
    return [
        f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)} by {list(leaf.stride())}"
        for leaf in pytree.tree_leaves(x)
    ]


def _distance(x: Any, exact: Any) -> float:
    """The error over all leaves together; infinite where one is NaN."""
    pairs = [(a.detach().cpu().double(), b) for a, b in zip(*map(pytree.tree_leaves, (x, exact)), strict=True)]
    far, most = (max(t.abs().max().item() for t in some) for some in ([a - b for a, b in pairs], [b for _, b in pairs]))
    return far / most if math.isfinite(far) else math.inf
