"""python -m kernels.bench: every op is measured, what is said of it is counted, and mistakes are told in a line."""

import csv
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import ascend, bench, benchmark, npu, reference
from kernels.cases import SIZES, cases, errors, expected

CASES = cases(SIZES["tiny"])
NPU = SimpleNamespace(type="npu")  # a torch.device of that name would have to be declared, for the whole process


def test_every_op_is_measured_and_written_down(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    assert (
        bench.main(["--impl", "reference", "--shape", "tiny", "--device", "cpu", "--repeat", "1", "--csv", str(file)])
        == 0
    )
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {row["op"] for row in rows} == set(CASES)
    assert [(row["op"], row["part"]) for row in rows] == [(op, call.part) for op in CASES for call in CASES[op].calls]
    for row in rows:
        assert float(row["ms"]) > 0
        assert float(row["ratio"]) == 1
        assert row["error"] == row["eager_error"]
        assert row["peak_source"] == "measured"
        at_peak = {"compute": ("tflop_per_s", "peak_tflops"), "memory": ("gb_per_s", "peak_gbps")}[row["bound"]]
        assert float(row["of_peak"]) == pytest.approx(float(row[at_peak[0]]) / float(row[at_peak[1]]))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(rows) + 5
    assert re.fullmatch(r"Peak of cpu, float32: \S+ TFLOP/s and \S+ GB/s, measured\.", out[-2])
    assert "of causal attention the half" in out[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_peak_that_was_given_is_said_to_be(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    flags = ["--impl", "reference", "--shape", "tiny", "--device", "cpu", "--repeat", "1"]
    for _ in range(2):  # its own table is written over
        bench.main(["rms_norm", *flags, "--peak", "354", "1600", "--csv", str(file)])
    for row in csv.DictReader(file.read_text().splitlines()):
        assert (row["peak_tflops"], row["peak_gbps"], row["peak_source"]) == ("354.0", "1600.0", "given")
    assert "Peak of cpu, float32: 354 TFLOP/s and 1.6e+03 GB/s, given." in capsys.readouterr().out


@pytest.mark.slow
def test_every_op_compiles(capsys):
    """And comes out no further off than its bound; one that was left out would be missing."""
    bench.main(["--impl", "reference", "compiled", "--shape", "tiny", "--device", "cpu", "--repeat", "1"])
    said = capsys.readouterr()
    whole = [
        op for op in CASES if not any(call.kernel.endswith("_") for call in CASES[op].calls)
    ]  # the others work in place
    for op in whole:
        assert said.out.count(f"| {op} ") == 2 * len(CASES[op].calls), said.err


def test_an_output_that_lies_elsewhere_is_told_in_a_line(monkeypatch, capsys):
    turned = SimpleNamespace(swiglu_fwd=lambda gate, up: reference.swiglu_fwd(gate, up).mT.contiguous().mT, swiglu_bwd=reference.swiglu_bwd)  # fmt: skip
    monkeypatch.setitem(benchmark.IMPLEMENTATIONS, "compiled", lambda: turned)
    bench.main(["swiglu", "--shape", "tiny", "--device", "cpu", "--repeat", "1", "--impl", "reference", "compiled"])
    said = capsys.readouterr()
    assert (
        "swiglu: compiled is left out: y is float32 [2, 48, 96] by [4608, 1, 48], expected float32 [2, 48, 96] by [4608, 96, 1]"
        in said.err
    )
    assert "reference" in said.out


def test_help_says_what_is_not_timed(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert "all_gather, reduce_scatter" in capsys.readouterr().out


def test_an_npu_is_measured_in_bfloat16():
    assert benchmark.dtypes(None, NPU) == ["bfloat16"]
    assert benchmark.dtypes(None, torch.device("cpu")) == ["float32"]
    assert benchmark.dtypes(["float16"], NPU) == ["float16"]


def test_upstreams_triton_is_not_ascends(tmp_path, monkeypatch):
    """Both are packages called triton: what differs is a backend."""
    there = tmp_path / "triton" / "backends"
    there.mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    npu.triton_ascend.cache_clear()
    try:
        assert not npu.triton_ascend()
        assert benchmark.missing("triton", NPU) == "triton-ascend is not installed"
        assert benchmark.missing("triton", torch.device("cuda")) is None
        npu.triton_ascend.cache_clear()
        (there / "ascend").mkdir()
        assert npu.triton_ascend()
        assert benchmark.missing("triton", NPU) is None
    finally:
        npu.triton_ascend.cache_clear()


@pytest.mark.slow
def test_compiled_takes_its_turns(capsys):
    bench.main(["rms_norm", "attention", "--shape", "tiny", "--device", "cpu", "--repeat", "2", "--dtype", "bfloat16"])
    said = capsys.readouterr()
    assert said.out.count("compiled") == said.out.count("reference") == 4
    assert "ascend is left out: it is for NPUs, and this is cpu" in said.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["atention"], "atention: no such op; expected any of rms_norm"),
        (["rms_norm", "--impl", "ascend"], "--impl ascend: it is for NPUs, and this is cpu"),
        (["rms_norm", "--impl", "triton"], "--impl triton: it needs an accelerator"),
        (["rms_norm", "--device", "npu"], "--device npu: torch finds none here"),
        (["rms_norm", "--csv", "nowhere/rows.csv"], "there is no folder nowhere"),
        (["rms_norm", "--csv", "pyproject.toml"], "it holds something else than these results"),
        (["rms_norm", "--csv", "tests"], "it is a link, a folder or a device"),
        (["rms_norm", "--peak", "nan", "1"], "--peak: expected two numbers above 0"),
        (["rms_norm", "--repeat", "0"], "expected a whole number above 0"),
    ],
)
def test_a_mistake_is_told_in_a_line(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--shape", "tiny", *(["--device", "cpu"] if "--device" not in argv else []), *argv])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert told.count("\n") == 1


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_products_are_those_that_pytorch_counts():
    """Of the vocabulary loss all, forward and backward; of causal attention half, since the other half is never needed."""
    (loss,), (forward, backward) = CASES["linear_cross_entropy"].calls, CASES["attention"].calls
    values = CASES["linear_cross_entropy"].inputs(torch.float32)
    x, weight = values["x"].requires_grad_(), values["weight"].requires_grad_()
    assert loss.flops == counted(lambda: (x @ weight.t()).sum().backward())
    q, k, v = (torch.randn(2, 4, 48, 64) for _ in range(3))
    whole = lambda: (q @ k.mT).softmax(-1) @ v
    assert forward.flops == counted(whole) / 2
    assert backward.flops == 2.5 * forward.flops  # scores again, and the gradients of four factors


def test_an_error_is_a_part_of_the_largest_number():
    """A result that is off by a hundredth of it is said to be, and one that is shaped otherwise is refused."""
    case = CASES["swiglu"]
    wanted = expected(case, torch.float32)[0]
    y = case.run(reference, case.inputs(torch.float32))[0]["y"]
    off = y.clone()
    off.view(-1)[0] += 0.01 * wanted.exact["y"].abs().max()
    assert errors({"y": off}, wanted)[0].found == pytest.approx(0.01, rel=1e-3)
    assert errors({"y": y}, wanted)[0].found == wanted.eager["y"] < 1e-6
    with pytest.raises(ValueError, match="y is float64"):
        errors({"y": y.double()}, wanted)


def test_every_case_names_kernels_that_an_npu_has():
    kernels = {call.kernel for case in CASES.values() for call in case.calls}
    assert kernels <= set(vars(ascend)) & set(vars(reference))


def test_the_names_in_the_flags_are_all_there_are():
    assert tuple(cases(SIZES["tiny"])) == bench.OPS
    assert tuple(benchmark.IMPLEMENTATIONS) == bench.IMPLEMENTATIONS
    assert tuple(SIZES) == bench.SHAPES
    assert tuple(benchmark.DTYPES) == bench.DTYPES
