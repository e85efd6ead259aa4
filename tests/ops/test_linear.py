"""ops.linear: whatever the order in which a CPU takes few rows, it is x @ weight.T."""

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

import ops

ROWS = [(), (1,), (1, 1), (2,), (3, 1), (4,), (2, 5), (0,)]


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("outputs", [24, 25])
def test_it_is_the_product(rows, outputs):
    x, weight = random(*rows, 7), random(outputs, 7)
    y = ops.linear(x, weight)
    torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=1e-13)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_its_error_is_no_worse_than_eager(dtype, rows):
    x, weight = random(rows, 96, dtype=dtype), random(64, 96, dtype=dtype)
    truth = x.double() @ weight.double().T
    off = lambda y: (y.double() - truth).abs().max() / truth.abs().max()
    assert off(ops.linear(x, weight)) <= 2 * off(F.linear(x, weight)) + torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_gradients_and_vmap(rows):
    x, weight = random(rows, 7), random(16, 7)
    assert torch.autograd.gradcheck(ops.linear, (x.requires_grad_(), weight.requires_grad_()))
    x, weight = x.detach(), weight.detach()
    many = torch.stack([x, 2 * x, -x])
    one = lambda x: grad(lambda w: ops.linear(x, w).square().sum())(weight)
    torch.testing.assert_close(vmap(one)(many), torch.stack([one(x) for x in many]))


def test_a_traced_length_stays_free():
    class Linear(torch.nn.Module):
        def forward(self, x, weight):
            return ops.linear(x, weight)

    length = torch.export.Dim("length", min=2, max=1000)
    program = torch.export.export(Linear(), (random(8, 7), random(16, 7)), dynamic_shapes=({0: length}, None))
    x = random(100, 7)
    torch.testing.assert_close(program.module()(x, random(16, 7)), x @ random(16, 7).T)
