"""Rung 3: torch_npu itself, loaded over the stand-in for CANN, does with fake tensors what the house wrote down of it."""

import pytest
import torch
import torch_npu  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import npu_fakes
from kernels.vendored import generate
from tests.ascend import npu_calls


def vendored(name: str) -> list[str]:
    return [line for line in (generate.HERE / name).read_text().splitlines() if not line.startswith("#")]


def test_declaring_leaves_torch_npus_ops_alone():
    before = torch.ops.npu.npu_swiglu.default
    npu_fakes.declare()
    assert torch.ops.npu.npu_swiglu.default is before
    assert npu_fakes.declare_device() == torch.device("npu")


def test_schemas_are_those_registered():
    names = [line[: line.index("(")].partition(".") for line in vendored("npu_schemas.txt")]
    assert [str(torch._C._get_schema(name, overload)) for name, _, overload in names] == vendored("npu_schemas.txt")


@pytest.fixture(scope="module")
def told():
    with FakeTensorMode():
        return npu_calls.outlines("npu")


@pytest.fixture(scope="module")
def ours():
    """Called as plain functions: where torch_npu is loaded nothing may be declared."""
    fakes = {fake.__name__: fake for fake in npu_fakes.FAKES}
    return {
        name: npu_calls.outline(fakes[op](*args, **kwargs))
        for name, (op, (args, kwargs)) in npu_calls.calls("meta").items()
    }


@pytest.mark.parametrize("case", list(npu_calls.calls("meta")))
def test_our_fake_is_torch_npus(told, ours, case):
    assert ours[case] == told[case]


F32, BF16 = torch.float32, torch.bfloat16
B, T, H, G, K, D = 2, 6, 4, 2, 64, 48


def attention(q, k, v, mask):
    return torch.ops.npu.npu_fusion_attention(q, k, v, H, "BSH", atten_mask=mask, scale=0.1, sparse_mode=3)[0]


DIFFERENTIABLE = {
    "rms_norm": (lambda x, gain: torch.ops.npu.npu_rms_norm(x, gain, 1e-5)[0], [(B, T, D), (D,)]),
    "rotary_mul": (torch.ops.npu.npu_rotary_mul, [(B, T, H, K), (1, T, 1, K), (1, T, 1, K)]),
    "swiglu": (torch.ops.npu.npu_swiglu, [(B, T, D)]),
    "attention": (attention, [(B, T, H * K), (B, T, G * K), (B, T, G * K)]),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_torch_npu_are_shaped_like_what_they_are_of(name, dtype):
    """Its C++ autograd calls the backward op whose fake is ours above; the chain as a whole must fit."""
    function, shapes = DIFFERENTIABLE[name]
    with FakeTensorMode():
        inputs = [torch.empty(shape, device="npu", dtype=dtype, requires_grad=True) for shape in shapes]
        mask = [torch.empty(2048, 2048, device="npu", dtype=torch.bool)] if name == "attention" else []
        output = function(*inputs, *mask)
        gradients = torch.autograd.grad(output, inputs, torch.empty_like(output))
    assert [(g.shape, g.device.type) for g in gradients] == [(x.shape, "npu") for x in inputs]
    assert {g.dtype for g in gradients} == {dtype}


def test_launching_an_operator_is_an_error():
    """The stand-in runs none, and says so; it does not return zeros."""
    x = torch.ones(2, 2).to("npu")
    assert x.cpu().tolist() == [[1, 1], [1, 1]]
    with pytest.raises(RuntimeError, match="MatMul"):
        torch.mm(x, x)
