"""What every definition in ops must keep, whoever adds one: its fake is the real thing, its vmap is a loop that does not unroll."""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from experiments.launching import processes
from kernels import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
lumina = torch.ops.lumina
B, T, S, H, G, K, D, V = 2, 5, 6, 4, 2, 8, 32, 11
EPS, HYPER = 1e-5, (0.9, 0.95, 1e-8, 0.1)


def arguments(dtype: torch.dtype) -> dict[Any, tuple[Any, ...]]:
    """Arguments for each op, of tensors in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    narrow = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    scalar = lambda x: torch.tensor(x, dtype=torch.promote_types(dtype, torch.float32))
    x, dy, gain, head_gain, qk, angles = narrow(B, T, D), narrow(B, T, D), narrow(D), narrow(1, K), narrow(B, T, H, K), narrow(T, 2, K // 2).float()  # fmt: skip
    rstd, stats = reference.rms_norm_fwd(x, gain, EPS)[1], reference.qk_norm_rotary_fwd(qk, head_gain, head_gain, angles, EPS)[1:]  # fmt: skip
    qkv, dout = (qk, narrow(B, T, G, K), narrow(B, T, G, K)), narrow(B, T, H, K)
    first = torch.tensor([[0, 0, 2, 2, 2], [0] * T])
    whole, packed = reference.attention_fwd(*qkv), reference.packed_attention_fwd(*qkv, first)
    cache, positions = narrow(B, S, G, K), torch.tensor([[3, 4], [1, 2]])
    leaves = lambda: [narrow(3, 4), narrow(5)]
    state = (leaves(), leaves(), leaves(), [y.square() for y in leaves()])
    scalars = (torch.tensor(2), scalar(0.1), scalar(0.5), torch.tensor(False), *HYPER)
    head = (narrow(T, D), narrow(V, D), torch.tensor([3, -100, 0, 10, 7]), torch.tensor(4), 0.1, [2, 9])
    return {
        lumina.rms_norm_fwd.default: (x, gain, EPS),
        lumina.rms_norm_bwd.default: (dy, x, gain, rstd),
        lumina.add_rms_norm_fwd.default: (x, dy, gain, EPS),
        lumina.add_rms_norm_bwd.default: (narrow(B, T, D), dy, x, gain, rstd),
        lumina.qk_norm_rotary_fwd.default: (qk, head_gain, narrow(1, K), angles, EPS),
        lumina.qk_norm_rotary_bwd.default: (dout, qk, head_gain, angles, *stats),
        lumina.swiglu_fwd.default: (x, dy),
        lumina.swiglu_bwd.default: (narrow(B, T, D), x, dy),
        lumina.attention_fwd.default: qkv,
        lumina.attention_bwd.default: (dout, *qkv, *whole),
        lumina.packed_attention_fwd.default: (*qkv, first),
        lumina.packed_attention_bwd.default: (dout, *qkv, first, *packed),
        lumina.cached_attention.default: (narrow(B, 2, H, K), cache, narrow(B, S, G, K), torch.arange(S) <= positions[..., None]),
        lumina.write_cache.default: (cache, positions, narrow(B, 2, G, K)),
        lumina.write_cache_.default: (cache, positions, narrow(B, 2, G, K)),
        lumina.linear_cross_entropy_pass.default: head,
        lumina.adamw.default: (*state, *scalars),
        lumina.adamw_.default: (*state, *scalars),
        lumina.join.default: (leaves(), 20, torch.float32),
    }  # fmt: skip


OPS = list(arguments(torch.float64))
COLLECTIVES = {lumina.all_gather.default, lumina.reduce_scatter.default, lumina.all_reduce.default}
IN_PLACE = {lumina.write_cache_.default, lumina.adamw_.default}
UNBATCHED = {lumina.join.default, *IN_PLACE}  # nobody maps over a unit's layout
FUNCTIONAL, BATCHED = ([op for op in OPS if op not in others] for others in (IN_PLACE, UNBATCHED))
named = pytest.mark.parametrize("op", OPS, ids=lambda op: op._opname)


def test_none_is_forgotten():
    assert {*OPS, *COLLECTIVES} == {*ops.ASCEND, *IN_PLACE}
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lumina::")}
    on_cpus = {ops.conv.winograd_op}  # nothing else calls it; its laws are in test_conv.py
    assert {f"lumina::{op._opname}" for op in (*OPS, *COLLECTIVES, *on_cpus)} == defined


def outline(result: Any) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.stride(), x.storage_offset()) for x in pytree.tree_leaves(result) if x is not None]


def of_tensors(change: Callable[..., Tensor], *trees: Any) -> Any:
    """`change` of every tensor of a tree (or of several alike); anything else as the first has it."""
    return pytree.tree_map(lambda x, *others: change(x, *others) if isinstance(x, Tensor) else x, *trees)


in_order = partial(torch.clone, memory_format=torch.contiguous_format)
LAID = {
    "in order": in_order,
    "turned": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "a part": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.ndim else x,
    "one for all": lambda x: x[:1].expand_as(x) if x.ndim else x,  # as the gradient of a sum is
}


def by_layout(among: list[Any]) -> Any:
    """Every op with every layout."""
    cases = [pytest.param(op, laid, id=f"{op._opname}-{laid}") for op in among for laid in LAID]
    return pytest.mark.parametrize(("op", "laid"), cases)


@by_layout(FUNCTIONAL)
def test_fake_is_real(op, laid):
    """Shapes, dtypes and strides, however the arguments lie in memory."""
    for dtype in DTYPES:
        args = of_tensors(LAID[laid], arguments(dtype)[op])
        with FakeTensorMode() as mode:
            faked = op(*of_tensors(mode.from_tensor, args))
        assert outline(faked) == outline(op(*args)), dtype


@named
def test_schema_is_true(op):
    """What is not marked is not written to, results are memory of their own, and sizes may be symbols."""
    opcheck(
        op, arguments(torch.float32)[op], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def variant(x: Tensor, n: int) -> Tensor:
    """Another tensor for each n, that will do wherever x does: its rows in another order, or another number."""
    if x.ndim:
        return x.roll(n, 0)
    return x ^ bool(n % 2) if x.dtype == torch.bool else x + n


def axes(x: Any, last: bool) -> Any:
    """Where tensors have the axis that vmap maps over."""
    return pytree.tree_map(lambda y: y.ndim * last if isinstance(y, Tensor) else None, x)


class Calls(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def mapped(op: Any, args: tuple[Any, ...], chosen: tuple[int, ...], size: int, last: bool) -> tuple[Any, Any, Counter]:
    """vmap of op over `size` variants of the chosen arguments, a loop over them, and what vmap called."""
    items = [[of_tensors(partial(variant, n=n), x) if i in chosen else x for i, x in enumerate(args)] for n in range(size)]  # fmt: skip
    dims = [axes(x, last and i % 2) if i in chosen else pytree.tree_map(lambda _: None, x) for i, x in enumerate(args)]
    stacked = lambda d, *xs: xs[0] if d is None else torch.stack(xs, d)
    many = [pytree.tree_map(stacked, d, *xs, is_leaf=lambda d: d is None) for d, *xs in zip(dims, *items, strict=True)]
    with Calls() as calls:
        got = vmap(op, tuple(dims))(*many)
    return got, pytree.tree_map(lambda *xs: torch.stack(xs), *(op(*item) for item in items)), calls.counts


def choices(args: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """One argument of tensors, any two, all but one, all."""
    tensors = [i for i, x in enumerate(args) if any(isinstance(y, Tensor) for y in pytree.tree_leaves(x))]
    counts = sorted({1, min(2, len(tensors)), max(1, len(tensors) - 1), len(tensors)})
    return [chosen for n in counts for chosen in itertools.combinations(tensors, n)]


@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("op", BATCHED, ids=lambda op: op._opname)
def test_vmap_is_a_loop_that_does_not_unroll(op, last):
    """Whichever arguments have the axis; as many calls for five items as for two."""
    args = arguments(torch.float64)[op]
    for chosen in choices(args):
        got, want, calls = mapped(op, args, chosen, 5, last)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        assert calls == mapped(op, args, chosen, 2, last)[2]


@pytest.mark.parametrize("dim", [0, 1, 4])
@pytest.mark.parametrize("others", [True, False], ids=["each", "shared"])
def test_caches_are_written_in_place_by_one_call(dim, others):
    """Wherever the axis lies; what is written may be one for all, but not the cache."""
    cache, positions, new = arguments(torch.float64)[lumina.write_cache_.default]

    def write(into, *given):
        lumina.write_cache_.default(into, *given)
        return into  # vmap wants a result

    many = [of_tensors(partial(variant, n=n), (cache, positions, new) if others else (cache,)) for n in range(5)]
    want = [cache.clone() for cache, *_ in many]
    for into, (_, *given) in zip(want, many, strict=True):
        write(into, *(given or (positions, new)))
    into, *given = (torch.stack(xs, d) for xs, d in zip(zip(*many, strict=True), (dim, 0, 0), strict=False))
    with Calls() as calls:
        vmap(write, (dim, 0, 0) if others else (dim, None, None))(into, *(given or (positions, new)))
    assert torch.equal(into, torch.stack(want, dim))
    assert calls.counts[lumina.write_cache_.default] == 1
    with pytest.raises(ValueError, match="a cache that all items share"):
        vmap(write, (None, None, 0))(cache, positions, torch.stack([new, new]))


# The CPU's flash attention and _fused_adamw_ take numbers for neighbours in memory that need not be.
@by_layout(FUNCTIONAL)
def test_layout_is_no_matter(op, laid):
    """One argument at a time lies elsewhere in memory: the same numbers come out."""
    args = arguments(torch.float64)[op]
    for i in range(len(args)):
        moved = [of_tensors(LAID[laid], x) if i == n else x for n, x in enumerate(args)]
        torch.testing.assert_close(op(*moved), op(*of_tensors(in_order, moved)), atol=1e-12, rtol=1e-12)


def collectives_faults(rank: int, size: int) -> list[str]:
    """Which laws the collectives break, told by a rank."""
    faults, group = [], dist.group.WORLD.group_name
    for op in sorted(COLLECTIVES, key=str):
        x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        items = x.unbind()
        with FakeTensorMode() as mode:
            faked = op(mode.from_tensor(items[0]), group, size)
        real = [op(item, group, size) for item in items]
        if outline(faked) != outline(real[0]):
            faults.append(f"{op}: the fake is not the real thing")
        want = torch.stack(real)
        for dim, many in ((0, x), (1, x.t())):
            with Calls() as calls:
                got = vmap(op, (dim, None, None))(many, group, size)
            if not torch.equal(got, want):
                faults.append(f"{op}: vmap is no loop")
            if calls.counts[op] != 1:
                faults.append(f"{op}: vmap unrolls")
    return faults


@pytest.mark.slow
def test_collectives_too():
    assert processes.run(2, collectives_faults) == [[], []]
