"""Rung 2: what the house wrote down of the torch_npu wheel is what the wheel says. The wheel is read and not imported."""

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import npu_fakes
from kernels.vendored import generate
from tests.ascend import ladder, npu_calls, overlay


@pytest.fixture(scope="module")
def wheel():
    folder = overlay.site_packages("npu")
    if not (folder / "torch_npu").exists():
        pytest.skip(ladder.missing(2) or "make .venv-npu/installed was not run")
    return folder


def test_pinned_version_was_read(wheel):
    assert f"torch_npu=={generate.version(wheel)}" in overlay.OVERLAYS["npu"].packages


@pytest.mark.parametrize("name", ["npu_schemas.txt", "ge_converters.txt"])
def test_vendored_file_is_the_wheels(wheel, name):
    assert generate.files(wheel)[name] == (generate.HERE / name).read_text()


def test_converters_that_only_raise_are_no_converters(wheel):
    """Facts of the wheel that the Ascend kernels are written around."""
    listed = generate.converters(wheel)
    assert {"npu.npu_fusion_attention.default", "npu.npu_rms_norm_backward.default", "aten.embedding.default"} <= set(
        listed
    )
    assert not {"npu.npu_fusion_attention_v3.default", "npu.npu_apply_adam_w.default", "aten.index_put.default"} & set(
        listed
    )


@pytest.fixture(scope="module")
def told(wheel):
    command = (sys.executable, "-m", "tests.ascend.wheel_meta", wheel)
    done = subprocess.run(command, capture_output=True, text=True, cwd=overlay.ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["outlines"]


CASES = list(npu_calls.calls("meta"))


@pytest.fixture(scope="module")
def ours():
    npu_fakes.declare()
    with FakeTensorMode():
        return npu_calls.outlines("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_our_fake_is_the_wheels(told, ours, case):
    assert ours[case] == told[case]


def test_declared_twice_is_declared_once(ours):
    npu_fakes.declare()
    assert str(torch.ops.npu.npu_swiglu.default._schema) == "npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor"


def test_other_layouts_are_refused(ours):
    q = torch.empty(6, 4, 64, device="meta")
    with pytest.raises(ValueError, match="layout TND: expected BSH or BNSD"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 4, "TND")


def test_device_of_torch_alone():
    """A renamed device by itself would abort the process under autograd."""
    program = """if True:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from kernels import npu_fakes
        npu_fakes.declare()
        with FakeTensorMode():
            x = torch.empty(2, 8, device=npu_fakes.declare_device(), requires_grad=True)
            y = torch.ops.npu.npu_swiglu(x.detach())
            (dx,) = torch.autograd.grad((x * x).sum(), x)
        assert x.device.type == y.device.type == dx.device.type == npu_fakes.declare_device().type == "npu"
    """
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, cwd=overlay.ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
