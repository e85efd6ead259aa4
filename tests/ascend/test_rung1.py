"""Rung 1: torch alone. Ops and device of an NPU are declared, and traced with fake tensors."""

import subprocess
import sys

import pytest
import torch

from kernels import npu_fakes
from tests.ascend import overlay


@pytest.fixture
def declared():
    npu_fakes.declare()


def test_declared_twice_is_declared_once(declared):
    npu_fakes.declare()
    assert str(torch.ops.npu.npu_swiglu.default._schema) == "npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor"


def test_other_layouts_are_refused(declared):
    q = torch.empty(6, 4, 64, device="meta")
    with pytest.raises(ValueError, match="layout TND: expected BSH or BNSD"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 4, "TND")


def test_device_of_torch_alone():
    """A renamed device by itself would abort the process under autograd, and a thread of the device's own sometimes at its end."""
    program = """if True:
        import ops, threading, torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from kernels import npu_fakes
        npu_fakes.declare()
        with FakeTensorMode():
            x = torch.empty(2, 8, device=npu_fakes.declare_device(), requires_grad=True)
            threads = []
            x.register_hook(lambda _: threads.append(threading.current_thread()))
            y = torch.ops.npu.npu_swiglu(x.detach())
            (dx,) = torch.autograd.grad((x * x).sum(), x)
            grads = torch.func.vmap(torch.func.grad(lambda x: ops.swiglu(x, x).sum()))(torch.empty(3, 2, 8, device="npu"))
        assert x.device.type == y.device.type == dx.device.type == npu_fakes.declare_device().type == "npu"
        assert threads == [threading.main_thread()]
        assert (grads.shape, grads.device.type) == ((3, 2, 8), "npu")
    """
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, cwd=overlay.ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
