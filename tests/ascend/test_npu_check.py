"""The checks of rung 7, which need an NPU, on simulated npu tensors: what would run there runs, passes, and can fail."""

import pytest
import torch
import torch_npu  # noqa: F401

from experiments.ascend import checks as npu_check
from kernels import ascend
from tests.ascend.npu_sim import NpuSim

NPU = torch.device("npu:0")


def told(checks: list[npu_check.Check]) -> list[str]:
    """Every line of a run of these checks."""
    lines: list[str] = []
    with NpuSim() as sim:
        failed = npu_check.run(checks, lines.append)
    assert lines[-1] == f"rung 7: RAN {len(checks)} checks, {failed} FAILED"
    assert any(name.startswith("npu::") for name in sim.calls)
    return lines[:-1]


def failures(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.endswith(": ok")]


@pytest.mark.parametrize("checks", [npu_check.of_ops, npu_check.of_the_model])
def test_all_is_well(checks):
    assert failures(told(checks(NPU))) == []


def test_every_op_of_a_training_step_and_of_decoding_is_checked():
    with NpuSim() as sim:
        npu_check.run(npu_check.of_the_model(NPU), lambda line: None)
        used = {name for name in sim.calls if name.startswith("lumina::")}
        sim.calls.clear()
        npu_check.run(npu_check.of_ops(NPU), lambda line: None)
    # join only copies; of an op in two forms the one that writes in place is checked, which the steps' tests hold against the other
    forms = {"lumina::adamw": "lumina::adamw_", "lumina::write_cache": "lumina::write_cache_"}
    assert {forms.get(name, name) for name in used} - {"lumina::join"} <= set(sim.calls)


def named(*ops: str) -> list[npu_check.Check]:
    return [check for check in npu_check.of_ops(NPU) if check.name.startswith(ops)]


def test_a_kernel_that_computes_something_else_fails_and_stops_no_other(monkeypatch):
    monkeypatch.setattr(ascend, "_both_halves", lambda angles, dtype, of=ascend._both_halves: of(angles, dtype)[::-1])
    lines = told(named("qk_norm_rotary", "swiglu"))
    assert len(failures(lines)) == 3
    assert all("FAILED: y: off by" in line and "expected at most" in line for line in lines[:3])
    assert all(line.endswith(": ok") for line in lines[3:])
    assert len(lines) == 6


def test_a_kernel_that_is_off_by_little_more_than_rounding_fails(monkeypatch):
    exact = torch.ops.npu.npu_swiglu
    nudged = type("Nudged", (), {"__getattr__": lambda _, name: getattr(torch.ops.npu, name)})()
    nudged.npu_swiglu = lambda x: exact(x) * 1.0001
    monkeypatch.setattr(ascend, "npu", nudged)
    assert [line.partition(": FAILED")[0] for line in failures(told(named("swiglu", "rms_norm")))] == [
        "swiglu, float32, registered"
    ]


def test_a_call_that_the_device_refuses_is_told_by_its_first_line(monkeypatch):
    monkeypatch.setattr(ascend, "_causal", lambda device: torch.ones(8, 8, dtype=torch.bool, device=device))
    (line,) = failures(told(named("attention, float32")))
    assert line.startswith("attention, float32, registered: FAILED: RuntimeError: sparse_mode 3 with a mask [8, 8]")


def test_a_model_with_a_wrong_kernel_fails(monkeypatch):
    monkeypatch.setattr(ascend, "_outside", lambda first, of=ascend._outside: of(torch.zeros_like(first)))
    lines = failures(told(npu_check.of_the_model(NPU)))
    assert [line.partition(": FAILED")[0] for line in lines] == [
        "a step with packed documents", "a step in bfloat16 with packed documents"
    ]  # fmt: skip


def test_two_ranks_find_their_collectives_right():
    """On CPUs, by gloo: what is asked of two NPUs is asked of two processes."""
    lines = []
    assert npu_check.run(npu_check.of_two_devices("cpu"), lines.append) == 0
    assert lines[0] == "collectives of 2 ranks: ok"


def test_two_ranks_whose_collectives_are_wrong_are_told(monkeypatch):
    monkeypatch.setattr(
        npu_check.processes, "run", lambda size, fn, *args: [["all_gather on rank 0: [1.0], expected [2.0]"], []]
    )
    lines = []
    assert npu_check.run(npu_check.of_two_devices("cpu"), lines.append) == 1
    assert lines[0] == "collectives of 2 ranks: FAILED: all_gather on rank 0: [1.0], expected [2.0]"
