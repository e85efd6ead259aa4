"""remat, jit and the compiled pair, with a backward whose value is known."""

from functools import partial

import pytest
import torch
from torch.func import grad, vjp, vmap

from lumina_fn.transform import compiled_pair, eager_pair, inductor, jit, keep_graph, remat


class Tripled(torch.autograd.Function):
    """x squared, whose backward lies: 3 dy. Whoever differentiates the forward instead is found out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return 3 * dy


@pytest.mark.parametrize("backend", [keep_graph, pytest.param(inductor, marks=pytest.mark.slow)])
def test_jit_keeps_a_custom_backward(backend):
    x = torch.tensor([1.0, 2.0, 5.0])
    got = jit(grad(lambda x: Tripled.apply(x).sum()), backend)(x)
    assert got.tolist() == [3.0, 3.0, 3.0]


PAIRS = [
    eager_pair,
    partial(compiled_pair, backend=keep_graph),
    pytest.param(compiled_pair, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("keep_inputs", [False, True])
def test_a_pair_keeps_a_custom_backward(make, keep_inputs):
    pair = make(lambda x, w: Tripled.apply(x) * w, keep_inputs=keep_inputs)
    x, w = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 10.0, 100.0])
    y, residuals = pair.forward(x, w)
    assert y.tolist() == [1.0, 40.0, 2500.0]
    dx, dw = pair.backward(residuals, x, w, torch.ones(3))
    assert dx.tolist() == [3.0, 30.0, 300.0]
    assert dw.tolist() == [1.0, 4.0, 25.0]


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("keep_inputs", [False, True])
def test_a_pair_takes_one_tensor_twice(make, keep_inputs):
    """Traced with the tensors it was first called with, x * w would have become x * x."""
    pair = make(lambda x, w: x * w.exp(), keep_inputs=keep_inputs)
    x, w = torch.ones(3), torch.zeros(3)
    pair.forward(x, x)
    y, residuals = pair.forward(x, w)
    assert y.tolist() == [1.0, 1.0, 1.0]
    dx, dw = pair.backward(residuals, x, w, torch.ones(3))
    assert dx.tolist() == dw.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("make", PAIRS[1:])
@pytest.mark.parametrize("keep_inputs", [False, True])
def test_a_compiled_pair_keeps_nothing_of_the_parameters(make, keep_inputs):
    """A view or a cast of one would keep a gathered unit alive."""

    def fn(x, fixed, w, v):
        return (x @ w.t()).relu() @ v.t().exp() * fixed

    pair = make(fn, fixed=(1,), keep_inputs=keep_inputs)
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    x, fixed, w, v = random(2, 3), random(5), random(4, 3), random(5, 4)
    y, residuals = pair.forward(x, fixed, w, v)
    storages = {t.untyped_storage().data_ptr() for t in (fixed, w, v)}
    assert not storages & {r.untyped_storage().data_ptr() for r in residuals}
    assert all(r.shape in {(2, 4), (4, 2)} for r in residuals)  # the hidden layer, no 5 of w and v
    assert bool(residuals) != keep_inputs
    want, pull = vjp(lambda x, w, v: fn(x, fixed, w, v), x, w, v)
    torch.testing.assert_close(y, want)
    dy = random(*y.shape)
    for a, b in zip(pair.backward(residuals, x, fixed, w.clone(), v.clone(), dy), pull(dy), strict=True):
        torch.testing.assert_close(a, b)


def test_jit_takes_one_tensor_twice():
    subtract = jit(lambda a, b: a - b)
    x = torch.ones(2)
    assert subtract(x, x).tolist() == [0.0, 0.0]
    assert subtract(2 * x, x).tolist() == [1.0, 1.0]


def test_jit_traces_once_a_shape():
    traced = []
    double = jit(lambda tree: [traced.append(1), {"y": 2 * tree["x"]}][1])
    for n in (2, 2, 3):
        assert double({"x": torch.ones(n)})["y"].tolist() == [2.0] * n
    assert len(traced) == 2


def test_remat_changes_no_gradient():
    f = lambda w, x: torch.tanh(x @ w).sum()
    w, x = torch.randn(4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(grad(remat(f))(w, x), grad(f)(w, x))
    rows = lambda g: vmap(grad(g), in_dims=(None, 0))(w, x[:, None])
    torch.testing.assert_close(rows(remat(f)), rows(f))


def test_remat_runs_its_function_again_in_the_backward():
    calls = []

    def f(x):
        calls.append(1)
        return x.sin()

    grad(lambda x: remat(f)(x).sum())(torch.ones(3))
    assert len(calls) == 2


def test_remat_passes_over_integers():
    """Ids among the arguments have no gradient; those of the others are what they are without remat."""
    table, ids = (
        torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1, 5]),
    )
    of = lambda f: torch.func.grad(lambda t: f(t, ids).square().sum())(table)
    look_up = lambda t, at: t[at].sin()
    assert torch.equal(of(remat(look_up)), of(look_up))
