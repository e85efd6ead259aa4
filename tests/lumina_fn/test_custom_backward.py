"""The backward that is written in ops/ is the one that is used, whichever way a gradient is taken.

Two proofs for each op: its backward's kernel is replaced by one that gives twice as much, and all gradients double; the graph
that a trace leaves holds that op, and nothing that was derived from the forward.
"""

import io
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import ops
from kernels import reference
from lumina_fn.programs import graphs
from lumina_fn.programs.graphs import CPU, Function
from lumina_fn.transform import compiled_pair, eager_pair, inductor, jit, keep_graph, remat
from ops.rms_norm import _RMSNorm
from tests.lumina_fn.test_transform import Tripled
from tests.ops.test_ops import CASES, EPS, FIRST, QKV, angles

# Each op as a function of tensors alone, what it is differentiated by, and the others: tracing takes no constants.
OPS = {
    "rms_norm": (lambda x, gain: ops.rms_norm(x, gain, EPS), CASES["rms_norm"].args, ()),
    "add_rms_norm": (lambda *args: ops.add_rms_norm(*args, EPS), CASES["add_rms_norm"].args, ()),
    "qk_norm_rotary": (lambda *args: ops.qk_norm_rotary(*args, EPS), CASES["qk_norm_rotary"].args, (angles(9),)),
    "swiglu": (ops.swiglu, CASES["swiglu"].args, ()),
    "attention": (ops.attention, QKV, ()),
    "packed_attention": (ops.packed_attention, QKV, (FIRST,)),
    "linear_cross_entropy": (
        lambda *args: ops.linear_cross_entropy(*args, z_weight=0.1)[0],
        CASES["linear_cross_entropy"].args,
        (torch.tensor([3, -100, 0, 10, 7, -100, 3]), torch.tensor(5)),
    ),
}
KEPT = {name: "linear_cross_entropy_pass" if name == "linear_cross_entropy" else f"{name}_bwd" for name in OPS}
named = pytest.mark.parametrize("name", OPS)
# torch.export copies trees in a way that torch wants no more, and says of a custom op what is no matter here.
exporting = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def total(op):
    """A number, of all of the op's outputs."""
    return lambda *args: sum(y.sin().sum() for y in pytree.tree_leaves(op(*args)))


def exported(fn, *args):
    """fn as a program, written and read again."""
    function = Function(lambda *xs: list(fn(*xs)), tuple(args))
    file = io.BytesIO()
    program = graphs.export(function, CPU).program
    program._example_inputs = None
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()(*args)


def by_pair(make):
    """f's pair, walked by hand."""

    def gradients(f, every, args):
        pair = make(f, fixed=tuple(range(len(every), len(args))))
        _, residuals = pair.forward(*args)
        return tuple(pair.backward(residuals, *args, torch.ones((), dtype=torch.float64)))

    return gradients


def by_vmap(wrap):
    """The last of two items, which share what is not differentiated."""

    def gradients(f, every, args):
        many = [torch.stack([x + 1, x]) if i in every else x for i, x in enumerate(args)]
        dims = tuple(0 if i in every else None for i in range(len(args)))
        return tuple(g[1] for g in wrap(vmap(grad(f, every), dims))(*many))

    return gradients


# Gradients of f(*args) by the arguments `every`.
WAYS = {
    "grad": lambda f, every, args: grad(f, every)(*args),
    "grad in no_grad": lambda f, every, args: torch.no_grad()(grad(f, every))(*args),
    "vmap": by_vmap(lambda gradients: gradients),
    "remat": lambda f, every, args: grad(remat(lambda *xs: f(*xs, *args[len(every) :])), every)(*args[: len(every)]),
    "make_fx": lambda f, every, args: make_fx(grad(f, every), tracing_mode="fake")(*args)(*args),
    "jit": lambda f, every, args: jit(grad(f, every), keep_graph)(*args),
    "jit of vmap": by_vmap(lambda gradients: jit(gradients, keep_graph)),
    "export": lambda f, every, args: tuple(exported(grad(f, every), *args)),
    "pair": by_pair(eager_pair),
    "traced pair": by_pair(partial(compiled_pair, backend=keep_graph)),
    "traced pair that recomputes": by_pair(partial(compiled_pair, keep_inputs=True, backend=keep_graph)),
    "inductor": lambda f, every, args: jit(grad(f, every), inductor)(*args),
    "compiled pair": by_pair(compiled_pair),
}
SLOW = {"inductor", "compiled pair"}


@pytest.fixture
def doubled(monkeypatch):
    """A function that has an op's backward give twice as much, wherever a kernel for a CPU is looked up."""
    with torch.library._scoped_library("lumina", "IMPL") as library:

        def double(op: str) -> None:
            kernel = getattr(reference, op)
            first = 2 if op == "linear_cross_entropy_pass" else 0  # its value is no gradient
            twice = lambda *args: tuple(y * (2 if i >= first else 1) for i, y in enumerate(kernel(*args)))
            library.impl(op, twice, "CPU")
            monkeypatch.setattr(reference, op, twice)  # what vmap's rules call
            if (overload := getattr(torch.ops.lumina, op).default) in ops.REFERENCES:
                monkeypatch.setitem(ops.REFERENCES, overload, twice)  # what compilers take it apart to

        yield double


@exporting
@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * (w in SLOW)) for w in WAYS])
@named
def test_gradients_are_what_the_backward_says(name, way, doubled):
    op, free, fixed = OPS[name]
    f, every, args = total(op), tuple(range(len(free))), (*free, *fixed)
    want = grad(f, every)(*args)
    assert all(g.abs().max() > 1e-3 for g in want)
    torch.testing.assert_close(WAYS[way](f, every, args), want, atol=1e-11, rtol=1e-11)
    doubled(KEPT[name])
    torch.testing.assert_close(WAYS[way](f, every, args), tuple(2 * g for g in want), atol=1e-11, rtol=1e-11)


@exporting
@pytest.mark.parametrize("how", ["make_fx", "export"])
@named
def test_graph_holds_the_backward_and_nothing_of_the_forward(name, how):
    op, free, fixed = OPS[name]
    args = (*free, *fixed)

    def pulled(*args):
        outputs, pull = vjp(lambda *xs: tuple(pytree.tree_leaves(op(*xs, *args[len(free) :]))), *args[: len(free)])
        return list(pull(tuple(torch.ones_like(y) for y in outputs)))

    if how == "make_fx":
        graph = make_fx(pulled, tracing_mode="fake")(*args).graph
        graph.eliminate_dead_code()
    else:
        graph = graphs.export(Function(pulled, args), CPU).program.graph
    calls = Counter(n.target.__name__.split(".")[0] for n in graph.nodes if n.op == "call_function")
    del calls["getitem"], calls["ones_like"]
    if name == "linear_cross_entropy":  # the loss, and both of the pass's gradients times the loss's own
        assert calls == {KEPT[name]: 1, "mul": 3, "add": 1}
    else:
        assert calls == {f"{name}_fwd": 1, KEPT[name]: 1}


def test_torch_compile_alone_still_drops_it():
    """Why lumina_fn.transform.jit traces first. Of an op of ours it leaves zeros, of a formula the forward's own derivative."""
    mended = (
        "torch.compile(torch.func.grad(f)) keeps a custom backward now: transform.jit need not trace first any more"
    )
    x = torch.tensor([1.0, 2.0, 5.0])
    lies = grad(lambda x: Tripled.apply(x).sum())
    gain = torch.ones(3)
    norm = grad(lambda x: (_RMSNorm.apply(x, gain, EPS)[0] * torch.arange(3.0)).sum())
    assert lies(x).tolist() == [3.0, 3.0, 3.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(lies, backend="eager")(x), torch.compile(norm, backend="eager")(x)
    torch._dynamo.reset()
    assert got[0].tolist() == [2.0, 4.0, 10.0], mended
    assert norm(x).abs().max() > 0.01
    assert not got[1].any(), mended
