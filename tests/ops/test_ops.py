"""Each op: its value and gradients are those of the obvious formula in float64, and no worse than plain PyTorch's in any dtype."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def randn(*shape: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(*rows: int) -> Tensor:
    turns = randn(*rows, 4, seed=4)
    return torch.stack([turns.cos(), turns.sin()], -2)


def exact_rms_norm(x, gain):
    return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def exact_attention(q, k, v):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def plain_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def by_document(attend):
    """Each document of the rows by itself."""

    def whole(q, k, v):
        of = lambda row, a, b: attend(*(t[row : row + 1, a:b] for t in (q, k, v)))
        return torch.cat([torch.cat([of(0, 0, 3), of(0, 3, 7), of(0, 7, 9)], 1), of(1, 0, 9)])

    return whole


def exact_qk_norm_rotary(angles):
    """Pairs of channels as complex numbers, turned."""

    def turned(x, gain, bias):
        y = F.layer_norm(x, x.shape[-1:], eps=EPS) * gain + bias
        pairs = torch.view_as_complex(torch.stack(y.chunk(2, -1), -1))
        turned = pairs * torch.complex(*angles.double().unbind(-2))[..., None, :]
        return torch.cat(torch.view_as_real(turned).unbind(-1), -1)

    return turned


def plain_qk_norm_rotary(angles):
    def turned(x, gain, bias):
        y = F.layer_norm(x, x.shape[-1:], eps=EPS) * gain + bias
        cos, sin = (torch.cat([a, a], -1)[..., None, :].to(x.dtype) for a in angles.unbind(-2))
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    return turned


def loss_of(target, logits_of):
    """Loss, cross-entropy and z of rows of which some predict nothing, with ids that never occur, over twice as many as they are."""

    def terms(x, weight):
        logits = logits_of(x, weight).index_fill(-1, torch.tensor(HIDDEN), torch.finfo(torch.float32).min)
        count = 2 * len(target)
        ce = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / count
        z = (logits.logsumexp(-1).square() * (target >= 0)).sum() / count
        return ce + 0.1 * z, ce.detach(), z.detach()

    return terms


class Case(NamedTuple):
    """An op, the obvious formula of it, and plain PyTorch's for any dtype; each of `args`, all differentiable, to one or several tensors."""

    fused: Callable[..., Tensor | tuple[Tensor, ...]]
    exact: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    args: tuple[Tensor, ...]


def rms_norm(*shape: int) -> Case:
    plain = lambda x, gain: F.rms_norm(x, x.shape[-1:], gain, EPS)
    return Case(
        lambda x, gain: ops.rms_norm(x, gain, EPS), exact_rms_norm, plain, (randn(*shape), randn(shape[-1], seed=1))
    )


def qk_norm_rotary(angles: Tensor, gains: int = 1) -> Case:
    fused = lambda x, gain, bias: ops.qk_norm_rotary(x, gain, bias, angles, EPS)
    args = (QKV[0], randn(gains, 8), randn(gains, 8, seed=1))
    return Case(fused, exact_qk_norm_rotary(angles), plain_qk_norm_rotary(angles), args)


def linear_cross_entropy(target: Tensor, weight: Tensor) -> Case:
    count = torch.tensor(2 * len(target))
    fused = lambda x, w: ops.linear_cross_entropy(x, w, target, count, z_weight=0.1, masked=HIDDEN)
    exact, plain = loss_of(target, lambda x, w: x @ w.t()), loss_of(target, lambda x, w: (x @ w.t()).float())
    return Case(fused, exact, plain, (randn(len(target), weight.shape[1]), weight))


def qkv(batch: int, time: int, heads: int, of_keys: int, width: int) -> tuple[Tensor, ...]:
    return tuple(randn(batch, time, h, width, seed=i) for i, h in enumerate((heads, of_keys, of_keys), 1))


X, RESIDUAL = randn(2, 5, 32), randn(2, 5, 32, seed=3)
QKV = qkv(2, 9, 4, 2, 8)
FIRST = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7], [0] * 9])  # documents of 3, 4 and 2 tokens, and one of 9
HIDDEN = (2, 9)
CASES = {
    "rms_norm": rms_norm(2, 5, 32),
    "add_rms_norm": Case(
        lambda x, residual, gain: ops.add_rms_norm(x, residual, gain, EPS),
        lambda x, residual, gain: (x + residual, exact_rms_norm(x + residual, gain)),
        lambda x, residual, gain: (x + residual, F.rms_norm(x + residual, x.shape[-1:], gain, EPS)),
        (X, RESIDUAL, randn(32, seed=1)),
    ),
    "qk_norm_rotary": qk_norm_rotary(angles(9).float()),
    "qk_norm_rotary of packed rows": qk_norm_rotary(angles(2, 9).float()),
    "qk_norm_rotary with gains of heads": qk_norm_rotary(angles(9).float(), gains=4),
    "swiglu": Case(
        ops.swiglu,
        lambda gate, up: gate * torch.sigmoid(gate) * up,
        lambda gate, up: F.silu(gate) * up,
        (X, RESIDUAL),
    ),
    "attention": Case(ops.attention, exact_attention, plain_attention, QKV),
    "packed_attention": Case(
        lambda q, k, v: ops.packed_attention(q, k, v, FIRST),
        by_document(exact_attention),
        by_document(plain_attention),
        QKV,
    ),
    "linear_cross_entropy": linear_cross_entropy(torch.tensor([3, -100, 0, 10, 7, -100, 3]), randn(11, 8, seed=1)),
}
# Where a sum is long, or made in parts.
LONG = {
    "rms_norm of wide rows": rms_norm(2, 65, 4096),
    "attention of long rows": CASES["attention"]._replace(args=qkv(1, 200, 2, 1, 32)),
    "linear_cross_entropy in chunks": linear_cross_entropy(torch.arange(700) % 450 + 10, randn(460, 64, seed=1) / 8),
}
named = pytest.mark.parametrize("name", CASES)


def outcome(fn, args, dtype=torch.float64) -> tuple[Tensor, ...]:
    """fn's outputs, and the gradients of its arguments under cotangents of `dtype`'s values."""
    outputs, pull = vjp(lambda *xs: y if isinstance(y := fn(*xs), tuple) else (y,), *args)
    cotangents = (randn(*y.shape, dtype=dtype, seed=9 + i).to(y.dtype) for i, y in enumerate(outputs))
    return *outputs, *pull(tuple(cotangents))


@named
def test_value_and_gradients(name):
    fused, exact, _, args = CASES[name]
    torch.testing.assert_close(outcome(fused, args), outcome(exact, args), atol=1e-12, rtol=1e-12)


@named
def test_gradients_are_differences(name):
    fused, *_, args = CASES[name]
    assert torch.autograd.gradcheck(fused, [x.clone().requires_grad_() for x in args], fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", {**CASES, **LONG})
def test_no_worse_than_plain_pytorch(name, dtype):
    """Outputs and gradients, each against the formula in float64 of the same narrow numbers."""
    fused, exact, plain, args = {**CASES, **LONG}[name]
    narrow = [x.to(dtype) for x in args]
    truth = outcome(exact, [x.double() for x in narrow], dtype)
    for got, eager, true in zip(outcome(fused, narrow, dtype), outcome(plain, narrow, dtype), truth, strict=True):
        assert got.dtype == eager.dtype
        error = lambda y: (y.double() - true).abs().max()  # noqa: B023
        assert error(got) <= 2 * error(eager) + torch.finfo(dtype).eps * true.abs().max()


def plain_cached_attention(q, keys, values, seen):
    """Scores and their softmax, written out."""
    keys, values = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (keys, values))
    scores = torch.einsum("bthk,bshk->bhts", q, keys) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), values)


def plain_adamw(p, g, m, v):
    """The third update as its paper has it, after half the gradient."""
    m, v = 0.9 * m + 0.1 * (0.5 * g), 0.95 * v + 0.05 * (0.5 * g).square()
    return p - 0.1 * (m / (1 - 0.9**3) / ((v / (1 - 0.95**3)).sqrt() + 1e-8) + 0.1 * p), m, v


def fused_adamw(donate: bool):
    def updated(*leaf):
        scalar = lambda x: torch.tensor(x, dtype=reference.wide(leaf[0]).dtype)
        scalars = torch.tensor(3), scalar(0.1), scalar(0.5), torch.tensor(False)
        keys = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "decay": 0.1}
        new = ops.adamw(*([x.clone()] for x in leaf), *scalars, **keys, donate=donate)
        return tuple(leaf for (leaf,) in new)

    return updated


def cached_attention(slots: int, tokens: int, head_width: int) -> tuple[Callable[..., Tensor], ...]:
    seen = torch.arange(slots) <= torch.arange(slots - tokens, slots)[:, None]
    args = (randn(2, tokens, 4, head_width), *(randn(2, slots, 2, head_width, seed=i) for i in (1, 2)))
    of = lambda fn: lambda *qkv: fn(*qkv, seen.expand(2, -1, -1))
    return of(ops.cached_attention), of(plain_cached_attention), args


LEAF = randn(64, 48), randn(64, 48, seed=1), randn(64, 48, seed=2), randn(64, 48, seed=3).square()
UNDIFFERENTIABLE = {
    "adamw": (fused_adamw(donate=False), plain_adamw, LEAF),
    "adamw, donated": (fused_adamw(donate=True), plain_adamw, LEAF),
    "cached_attention": cached_attention(6, 3, 8),
    "cached_attention of many slots": cached_attention(300, 1, 32),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNDIFFERENTIABLE)
def test_no_worse_than_plain_pytorch_where_nothing_is_differentiated(name, dtype):
    fused, plain, args = UNDIFFERENTIABLE[name]
    narrow = [x.to(dtype) for x in args]
    results = fused(*narrow), plain(*narrow), plain(*(x.double() for x in narrow))
    for got, eager, true in zip(*(y if isinstance(y, tuple) else (y,) for y in results), strict=True):
        assert got.dtype == dtype
        error = lambda y: (y.double() - true).abs().max()  # noqa: B023
        assert error(got) <= 2 * error(eager) + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_attention_written_out_is_the_cpus(dtype):
    """What a GPU runs, run here: the CPU's fused kernel has no name there."""
    q, k, v, dout = (x.to(dtype) for x in (*qkv(2, 9, 4, 2, 8), randn(2, 9, 4, 8, seed=7)))
    out, lse = reference.attention_fwd(q, k, v)
    forward = reference.written_out_attention_fwd(q, k, v), (out, lse)
    given = dout, q, k, v, out, lse
    backward = reference.written_out_attention_bwd(*given), reference.attention_bwd(*given)
    for got, want in (*zip(*forward, strict=True), *zip(*backward, strict=True)):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        torch.testing.assert_close(got, want, atol=8 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


class Names(TorchDispatchMode):
    """Of what is called."""

    def __init__(self):
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_elsewhere_attention_calls_no_kernel_of_the_cpus(packed, monkeypatch):
    """Shown of meta tensors, so that no GPU is needed."""
    monkeypatch.setattr(reference, "CPU_KERNELS", ("cpu",))
    with Names() as names:
        q, k, v = (torch.empty(x.shape, device="meta") for x in QKV)
        first = (FIRST,) if packed else ()
        kind = "packed_attention" if packed else "attention"
        out, lse = getattr(reference, f"{kind}_fwd")(q, k, v, *first)
        grads = getattr(reference, f"{kind}_bwd")(out, q, k, v, *first, out, lse)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert "aten::exp" in names.called
    assert not [name for name in names.called if "cpu" in name]


@named
def test_vmap_is_a_loop(name):
    """Whichever arguments have the axis, and wherever; what is shared gets a gradient for each item."""
    fused, *_, args = CASES[name]
    both = partial(outcome, fused)
    for chosen in itertools.product((False, True), repeat=len(args)):
        if any(chosen):
            dims = tuple(i % 2 if has else None for i, has in enumerate(chosen))
            many = [torch.stack([x, 0.7 * x + 0.1], d) if d is not None else x for x, d in zip(args, dims, strict=True)]
            item = lambda i: [x.select(d, i) if d is not None else x for x, d in zip(many, dims, strict=True)]  # noqa: B023
            want = tuple(torch.stack(pair) for pair in zip(both(item(0)), both(item(1)), strict=True))
            torch.testing.assert_close(
                vmap(lambda *xs: both(xs), dims, randomness="same")(*many), want, atol=1e-12, rtol=1e-12
            )


def test_loss_in_chunks_is_the_loss(monkeypatch):
    fused, *_, args = CASES["linear_cross_entropy"]
    want = outcome(fused, args)
    monkeypatch.setattr(reference, "CHUNK", 3)  # of 7 rows
    torch.testing.assert_close(outcome(fused, args), want, atol=1e-12, rtol=1e-12)


def test_rows_that_predict_nothing_have_no_gradient():
    fused, *_, (x, w) = CASES["linear_cross_entropy"]
    dx = grad(lambda x: fused(x, w)[0])(x)
    assert (dx.abs().amax(1) == 0).tolist() == [False, True, False, False, False, True, False]


def test_a_cache_is_written_and_read():
    cache, positions, new = randn(2, 6, 1, 8), torch.tensor([[3], [1]]), randn(2, 1, 1, 8, seed=1)
    want = cache.clone()
    want[0, 3], want[1, 1] = new[0, 0], new[1, 0]
    written = ops.write_cache(cache, positions, new, donate=False)
    assert torch.equal(written, want)
    assert not torch.equal(cache, want)
    assert torch.equal(ops.write_cache(cache, positions, new, donate=True), want)
    assert torch.equal(cache, want)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_queries_see_the_slots_that_they_may(dtype):
    """Several tokens at once, each of which sees the slots up to its own; two heads of queries to one of keys."""
    q, keys, values = (x.to(dtype) for x in qkv(2, 6, 4, 2, 8))
    positions = torch.tensor([[3, 4], [1, 5]])
    got = ops.cached_attention(q[:, :2], keys, values, torch.arange(6) <= positions[..., None])
    assert got.dtype == dtype
    for row, at in itertools.product(range(2), range(2)):
        n = positions[row, at] + 1
        row_of = lambda x, n=n, row=row: x[row : row + 1, :n].double()
        last = torch.cat([row_of(q, n - 1), q[row : row + 1, at : at + 1].double()], 1)
        want = exact_attention(last, row_of(keys), row_of(values))[0, -1]
        torch.testing.assert_close(got[row, at].double(), want, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_adamw_is_torchs():
    mine = [randn(3, 4), randn(5)]
    theirs = [p.clone().requires_grad_() for p in mine]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mu, nu = ([torch.zeros_like(p) for p in mine] for _ in range(2))
    for n in (1, 2, 3):
        grads = [randn(3, 4, seed=n), randn(5, seed=n)]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = 0.5 * g
        optimizer.step()
        scalars = (torch.tensor(n), torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5), torch.tensor(False))
        mine, mu, nu = ops.adamw(mine, grads, mu, nu, *scalars, b1=0.9, b2=0.95, eps=1e-8, decay=0.1, donate=False)
    torch.testing.assert_close(mine, [p.detach() for p in theirs], atol=1e-12, rtol=0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_adamw_in_place_and_leaf_by_leaf(n, skip):
    """What donates, what does not, and the formula of one leaf: the same update."""
    params, grads, mu = ([randn(3, 4, seed=i), randn(5, seed=i + 1)] for i in (0, 2, 4))
    nu, hyper = [x.square() for x in mu], (0.9, 0.95, 1e-8, 0.1)
    scalars = (torch.tensor(n), *torch.tensor([0.1, 0.5], dtype=torch.float64), torch.tensor(skip))
    keys = dict(zip(("b1", "b2", "eps", "decay"), hyper, strict=True))
    before = [x.clone() for x in (*params, *mu, *nu)]
    new = ops.adamw(params, grads, mu, nu, *scalars, **keys, donate=False)
    assert all(map(torch.equal, (*params, *mu, *nu), before))
    leaves = [reference.adamw_of_leaf(*leaf, *scalars, *hyper) for leaf in zip(params, grads, mu, nu, strict=True)]
    for got, want in zip(new, zip(*leaves, strict=True), strict=True):
        torch.testing.assert_close(tuple(got), want, atol=1e-12, rtol=0)
    assert all(map(torch.equal, [x for leaves in new for x in leaves], before)) == skip
    ops.adamw(params, grads, mu, nu, *scalars, **keys, donate=True)
    for mine, donated in zip(new, (params, mu, nu), strict=True):
        torch.testing.assert_close(mine, donated, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leaves_joined(dtype):
    leaves = [randn(2, 3), randn(4, 3, seed=1).t(), randn(1)[0], randn(0)]
    want = torch.cat([leaf.flatten() for leaf in leaves]).to(dtype)
    for rest in (0, 3):
        torch.testing.assert_close(ops.join(leaves, 19 + rest, dtype), F.pad(want, (0, rest)), atol=0, rtol=0)
