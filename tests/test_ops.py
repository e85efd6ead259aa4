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
    cases = {
        torch.ops.lumina.rms_norm_fwd.default: (x, gain, 1e-5),
        torch.ops.lumina.rms_norm_bwd.default: (x, x, gain, rstd),
        torch.ops.lumina.attention_fwd.default: QKV,
        torch.ops.lumina.attention_bwd.default: (out, *QKV, out, lse),
        linear_cross_entropy_pass: (randn(5, 8), randn(11, 8), torch.arange(5), torch.tensor(5), 0.1, []),
        adamw_op: (*lists, *scalars),
    }
    for op, args in cases.items():
        opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
