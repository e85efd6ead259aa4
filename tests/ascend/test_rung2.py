"""Rung 2: what the house wrote down of the torch_npu wheel is what the wheel says. The wheel is read and not imported."""

import json
import subprocess
import sys

import pytest
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
