"""Each op: its formula against autograd over the obvious one, its fake against the real thing, fused no worse than eager."""

import pytest
import torch
from torch.func import grad, vmap
from torch.library import opcheck
from torch.nn import functional as F

import ops
from kernels import reference
from ops.adamw import adamw_op
from ops.cross_entropy import linear_cross_entropy_pass

DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_rms_norm(x, gain):
    return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def plain_attention(q, k, v):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(later, -torch.inf).softmax(-1), v)


QKV = (randn(2, 9, 4, 8, seed=1), randn(2, 9, 2, 8, seed=2), randn(2, 9, 2, 8, seed=3))


def test_rms_norm_gradients():
    x, gain, weight = randn(2, 5, 32), randn(32, seed=1), randn(2, 5, 32, seed=2)
    fused = lambda x, gain: (ops.rms_norm(x, gain, 1e-5) * weight).sum()
    plain = lambda x, gain: (plain_rms_norm(x, gain) * weight).sum()
    torch.testing.assert_close(grad(fused, (0, 1))(x, gain), grad(plain, (0, 1))(x, gain), atol=1e-12, rtol=0)


def test_attention_and_its_gradients():
    torch.testing.assert_close(ops.attention(*QKV), plain_attention(*QKV), atol=1e-12, rtol=0)
    fused = lambda *qkv: ops.attention(*qkv).sin().sum()
    plain = lambda *qkv: plain_attention(*qkv).sin().sum()
    torch.testing.assert_close(grad(fused, (0, 1, 2))(*QKV), grad(plain, (0, 1, 2))(*QKV), atol=1e-12, rtol=0)


X, RESIDUAL, GAIN = randn(2, 5, 32), randn(2, 5, 32, seed=3), randn(32, seed=1)
FIRST = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7], [0] * 9])  # documents of 3, 4 and 2 tokens, and one of 9


def angles(*rows: int, dtype=torch.float64) -> torch.Tensor:
    turns = randn(*rows, 4, seed=4)
    return torch.stack([turns.cos(), turns.sin()], -2).to(dtype)


ONE_SET, SET_PER_ROW = angles(9), angles(2, 9)


def plain_qk_norm_rotary(x, gain, bias, angles):
    y = F.layer_norm(x, x.shape[-1:], eps=1e-5) * gain + bias
    turned = torch.view_as_complex(torch.stack(y.chunk(2, -1), -1)) * torch.complex(*angles.unbind(-2))[..., None, :]
    return torch.cat(torch.view_as_real(turned).unbind(-1), -1)


# Each op and the obvious formula, of the same differentiable arguments.
PAIRS = {
    "add_rms_norm": (
        lambda x, r, g: sum(y.sin().sum() * (i + 1) for i, y in enumerate(ops.add_rms_norm(x, r, g, 1e-5))),
        lambda x, r, g: (x + r).sin().sum() + 2 * plain_rms_norm(x + r, g).sin().sum(),
        (X, RESIDUAL, GAIN),
    ),
    "qk_norm_rotary": (
        lambda x, g, b: ops.qk_norm_rotary(x, g, b, ONE_SET, 1e-5).sin().sum(),
        lambda x, g, b: plain_qk_norm_rotary(x, g, b, ONE_SET).sin().sum(),
        (QKV[0], randn(1, 8), randn(1, 8, seed=1)),
    ),
    "qk_norm_rotary of packed rows": (
        lambda x, g, b: ops.qk_norm_rotary(x, g, b, SET_PER_ROW, 1e-5).sin().sum(),
        lambda x, g, b: plain_qk_norm_rotary(x, g, b, SET_PER_ROW).sin().sum(),
        (QKV[0], randn(1, 8), randn(1, 8, seed=1)),
    ),
    "swiglu": (
        lambda gate, up: ops.swiglu(gate, up).sin().sum(),
        lambda gate, up: (gate * torch.sigmoid(gate) * up).sin().sum(),
        (X, RESIDUAL),
    ),
    "packed_attention": (
        lambda q, k, v: ops.packed_attention(q, k, v, FIRST).sin().sum(),
        lambda q, k, v: sum(
            plain_attention(*(t[row : row + 1, a:b] for t in (q, k, v))).sin().sum()
            for row, a, b in ((0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 9))
        ),
        QKV,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradients(name):
    fused, plain, args = PAIRS[name]
    torch.testing.assert_close(fused(*args), plain(*args), atol=1e-11, rtol=0)
    every = tuple(range(len(args)))
    torch.testing.assert_close(grad(fused, every)(*args), grad(plain, every)(*args), atol=1e-11, rtol=0)
    assert torch.autograd.gradcheck(fused, [x.clone().requires_grad_() for x in args])


@pytest.mark.parametrize("name", PAIRS)
def test_vmap_is_a_loop(name):
    """Over all arguments, and over the first alone, with gradients of what is shared for each item."""
    fused, _, args = PAIRS[name]
    many = [torch.stack([x, x * 0.7 + 0.1, x.flip(0)]) for x in args]
    gradients = grad(fused, tuple(range(len(args))))
    for dims in ((0,) * len(args), (0,) + (None,) * (len(args) - 1)):
        got = vmap(gradients, dims)(*(m if d == 0 else x for m, x, d in zip(many, args, dims, strict=True)))
        want = [gradients(*(m[i] if d == 0 else x for m, x, d in zip(many, args, dims, strict=True))) for i in range(3)]
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*want, strict=True))), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_no_worse_than_eager(name, dtype):
    """Gradients too; both against the formula in float64."""
    fused, plain, args = PAIRS[name]
    narrow, every = [x.to(dtype) for x in args], tuple(range(len(args)))
    truth = grad(plain, every)(*(x.double() for x in narrow))
    eager = grad(lambda *xs: plain(*xs).to(dtype), every)
    if "rotary" in name:  # complex numbers know no bfloat16: eager is the reference's own formula under autograd
        eager = grad(
            lambda x, g, b: (
                reference.rotate(
                    F.layer_norm(x, (8,), eps=1e-5) * g + b, SET_PER_ROW if "packed" in name else ONE_SET
                ).sin().sum()
            ),
            every,
        )  # fmt: skip
    for got, want, exact in zip(grad(fused, every)(*narrow), eager(*narrow), truth, strict=True):
        error = lambda y: (y.double() - exact).abs().max()  # noqa: B023
        assert error(got) <= 2 * error(want) + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_cache_is_written_and_read():
    cache, positions, new = randn(2, 6, 1, 8), torch.tensor([[3], [1]]), randn(2, 1, 1, 8, seed=1)
    want = cache.clone()
    want[0, 3], want[1, 1] = new[0, 0], new[1, 0]
    written = ops.write_cache(cache, positions, new, donate=False)
    assert torch.equal(written, want)
    assert not torch.equal(cache, want)
    assert torch.equal(ops.write_cache(cache, positions, new, donate=True), want)
    assert torch.equal(cache, want)
    q = randn(2, 1, 4, 8, seed=2)
    seen = torch.arange(6) <= positions[..., None]
    got = ops.cached_attention(q, cache, cache.flip(-1), seen)
    for row, slots in ((0, 4), (1, 2)):
        keys = cache[row, :slots, 0]
        p = (q[row, 0] @ keys.t() * 8**-0.5).softmax(-1)
        torch.testing.assert_close(got[row, 0], p @ keys.flip(-1), atol=1e-12, rtol=0)


def test_vmap_of_adamw_is_a_loop():
    lists = [[randn(3, 4, 5, seed=i), randn(3, 2, seed=i + 4)] for i in range(3)]
    lists.append([x.abs() for x in lists[0]])
    scalars = (torch.tensor([1, 2, 3]), randn(3).abs(), randn(3, seed=1).abs(), torch.tensor([False, True, False]))
    hyper = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "decay": 0.1, "donate": False}
    update = lambda *args: ops.adamw(*args, **hyper)
    for dims in ((0,) * 8, (0,) * 4 + (None,) * 4):
        some = [s if d == 0 else s[0] for s, d in zip(scalars, dims[4:], strict=True)]
        got = vmap(update, dims)(*lists, *some)
        items = [
            update(*([x[i] for x in xs] for xs in lists), *(s[i] if s.ndim else s for s in some)) for i in range(3)
        ]
        want = tuple([torch.stack(x) for x in zip(*(item[k] for item in items), strict=True)] for k in range(3))
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_vmap_over_each_op_is_a_loop():
    per = lambda f, *args: vmap(grad(f, tuple(range(len(args)))))(*args)
    loop = lambda f, *args: [
        torch.stack(g)
        for g in zip(*(grad(f, tuple(range(len(args))))(*a) for a in zip(*args, strict=True)), strict=True)
    ]
    attend = lambda q, k, v: ops.attention(q[None], k[None], v[None]).sin().sum()
    norm = lambda x, gain: ops.rms_norm(x, gain, 1e-5).sin().sum()
    head = lambda x, w: ops.linear_cross_entropy(x, w, torch.arange(5), torch.tensor(5), z_weight=0.1)[0]
    for f, args in ((attend, QKV), (norm, (randn(3, 5, 8), randn(3, 8))), (head, (randn(3, 5, 8), randn(3, 11, 8)))):
        torch.testing.assert_close(list(per(f, *args)), loop(f, *args), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7, 32), (2, 129, 4096)])
def test_rms_norm_is_no_worse_than_eager(shape, dtype):
    x, gain = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    truth = plain_rms_norm(x.double(), gain.double())
    error = lambda y: (y.double() - truth).abs().max()
    assert (
        error(ops.rms_norm(x, gain, 1e-5))
        <= 2 * error(F.rms_norm(x, x.shape[-1:], gain, 1e-5)) + torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_no_worse_than_eager(dtype):
    q, k, v = (randn(1, 200, 4, 32, dtype=dtype, seed=s) for s in range(3))
    truth = plain_attention(q.double(), k.double(), v.double())
    error = lambda y: (y.double() - truth).abs().max()
    assert error(ops.attention(q, k, v)) <= 2 * error(plain_attention(q, k, v)) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunked_loss_is_no_worse_than_eager(dtype):
    x, weight, target = randn(700, 64, dtype=dtype), randn(500, 64, dtype=dtype, seed=1) / 8, torch.arange(700) % 500
    eager = lambda x, w: F.cross_entropy((x @ w.t()).float(), target)
    fused = lambda x, w: ops.linear_cross_entropy(x, w, target, torch.tensor(700), z_weight=0.0)[0]
    truth = grad(lambda x, w: F.cross_entropy(x @ w.t(), target), (0, 1))(x.double(), weight.double())
    for got, want, exact in zip(grad(fused, (0, 1))(x, weight), grad(eager, (0, 1))(x, weight), truth, strict=True):
        error = lambda y: (y.double() - exact).abs().max()  # noqa: B023
        assert error(got) <= 2 * error(want) + torch.finfo(dtype).eps * exact.abs().max()


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


def test_fakes_tell_the_truth():
    x, gain = randn(2, 5, 32), randn(32)
    _, rstd = reference.rms_norm_fwd(x, gain, 1e-5)
    out, lse = reference.attention_fwd(*QKV)
    lists = [[randn(3, 4), randn(5)] for _ in range(4)]
    scalars = (torch.tensor(1), torch.tensor(0.1), torch.tensor(1.0), torch.tensor(False), 0.9, 0.95, 1e-8, 0.1)
    qk, norm = (
        (QKV[0], randn(1, 8)),
        reference.qk_norm_rotary_fwd(QKV[0], GAIN[None, :8], GAIN[None, 8:16], ONE_SET, 1e-5),
    )
    packed = reference.packed_attention_fwd(*QKV, FIRST)
    cache, positions = randn(2, 6, 1, 8), torch.tensor([[3], [1]])
    cases = {
        torch.ops.lumina.add_rms_norm_fwd.default: (X, RESIDUAL, GAIN, 1e-5),
        torch.ops.lumina.add_rms_norm_bwd.default: (X, RESIDUAL, X, GAIN, rstd),
        torch.ops.lumina.qk_norm_rotary_fwd.default: (*qk, randn(1, 8), ONE_SET, 1e-5),
        torch.ops.lumina.qk_norm_rotary_bwd.default: (QKV[0], *qk, ONE_SET, *norm[1:]),
        torch.ops.lumina.swiglu_fwd.default: (X, RESIDUAL),
        torch.ops.lumina.swiglu_bwd.default: (X, X, RESIDUAL),
        torch.ops.lumina.packed_attention_fwd.default: (*QKV, FIRST),
        torch.ops.lumina.packed_attention_bwd.default: (QKV[0], *QKV, FIRST, *packed),
        torch.ops.lumina.write_cache.default: (cache, positions, randn(2, 1, 1, 8)),
        torch.ops.lumina.cached_attention.default: (
            randn(2, 1, 4, 8),
            cache,
            cache.flip(0),
            torch.arange(6) <= positions[..., None],
        ),
        torch.ops.lumina.join.default: ([X, GAIN], 355, torch.float32),
        torch.ops.lumina.rms_norm_fwd.default: (x, gain, 1e-5),
        torch.ops.lumina.rms_norm_bwd.default: (x, x, gain, rstd),
        torch.ops.lumina.attention_fwd.default: QKV,
        torch.ops.lumina.attention_bwd.default: (out, *QKV, out, lse),
        linear_cross_entropy_pass: (randn(5, 8), randn(11, 8), torch.arange(5), torch.tensor(5), 0.1, []),
        adamw_op: (*lists, *scalars),
    }
    for op, args in cases.items():
        opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
