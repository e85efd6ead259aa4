"""ops.conv3x3: by whatever algorithm, it is the convolution."""

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from kernels import winograd
from ops import conv


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def given(B, C, O, H, W, dtype=torch.float64):
    return random(B, C, H, W, dtype=dtype), random(O, C, 3, 3, dtype=dtype, seed=1), random(O, dtype=dtype, seed=2)


@pytest.fixture
def always(monkeypatch):
    """Winograd's algorithm for pictures of any size."""
    monkeypatch.setattr(conv, "WIDE", 1)
    monkeypatch.setattr(conv, "LARGE", 0)


@pytest.mark.parametrize("strip", [1, 16 * 3 * 5 * 2, 1 << 22])  # one row of tiles at a time, two, all
@pytest.mark.parametrize("sizes", [(1, 5, 7, 8, 6), (2, 5, 3, 10, 6), (1, 1, 1, 2, 2)], ids=str)
def test_it_is_the_convolution(monkeypatch, strip, sizes):
    monkeypatch.setattr(winograd, "STRIP", strip)
    x, weight, bias = given(*sizes)
    y = winograd.conv3x3(x, weight, bias)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=1e-13)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_its_error_is_no_worse_than_a_convolutions(layout):
    x, weight, bias = given(1, 128, 96, 24, 20, dtype=torch.float32)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    off = lambda y: (y.double() - truth).abs().max() / truth.abs().max()
    ours, eager = (
        winograd.conv3x3(x.contiguous(memory_format=layout), weight, bias),
        F.conv2d(x, weight, bias, padding=1),
    )
    assert off(ours) <= 2 * off(eager) + torch.finfo(torch.float32).eps


def test_gradients(always):
    args = [x.requires_grad_() for x in given(2, 3, 4, 4, 6)]
    assert torch.autograd.gradcheck(conv.conv3x3, args)


@pytest.mark.parametrize("over", ["pictures", "filters"])
def test_vmap_is_a_loop(always, over):
    x, weight, bias = given(2, 3, 4, 4, 6)
    many = lambda t: torch.stack([t, 2 * t, -t])
    dims = (0, None, None) if over == "pictures" else (None, 0, 0)
    args = [many(t) if dim == 0 else t for t, dim in zip((x, weight, bias), dims, strict=True)]
    one = lambda i: [t[i] if dim == 0 else t for t, dim in zip(args, dims, strict=True)]
    torch.testing.assert_close(vmap(conv.conv3x3, dims)(*args), torch.stack([conv.conv3x3(*one(i)) for i in range(3)]))
    loss = lambda x, weight, bias: conv.conv3x3(x, weight, bias).square().sum()
    slopes = vmap(grad(loss, (0, 1, 2)), dims)(*args)
    for i in range(3):
        for found, wanted in zip(slopes, grad(loss, (0, 1, 2))(*one(i)), strict=True):
            torch.testing.assert_close(found[i], wanted)


def test_fake_is_as_the_real_thing():
    args = given(2, 3, 4, 4, 6)
    torch.library.opcheck(conv.winograd_op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((1, 128, 64, 64, 64), torch.float32), ((1, 64, 64, 9, 10), torch.float32), ((1, 3, 64, 64, 64), torch.float32),
     ((1, 64, 64, 256, 256), torch.bfloat16)],
    ids=["small", "odd", "narrow", "half"],
)  # fmt: skip
def test_what_it_does_not_pay_for_is_convolved(monkeypatch, sizes, dtype):
    monkeypatch.setattr(conv, "apply", None)  # it would be called
    x, weight, bias = given(*sizes, dtype=dtype)
    torch.testing.assert_close(
        conv.conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1), rtol=1e-2, atol=1e-3
    )


def test_what_it_pays_for_is_not(monkeypatch):
    seen = []
    monkeypatch.setattr(conv, "apply", lambda function, *args: seen.append(function) or args[0])
    conv.conv3x3(*given(1, 64, 64, 256, 256, dtype=torch.float32))
    assert seen == [conv._Winograd]
