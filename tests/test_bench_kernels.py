"""kernels.bench and its cases: every op runs, what is said of it is true, and a mistake is one line."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from kernels import bench, cases, measure, reference

ROOT = Path(__file__).parents[1]
TINY = cases.cases(cases.SIZES["tiny"])
CPU = torch.device("cpu")
PEAK = ["--peak", "0.1", "10"]  # measuring it takes longer than the ops


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def of_bench(tmp_path: Path, *argv: str) -> list[dict[str, str]]:
    out = tmp_path / "rows.csv"
    assert bench.main([*argv, "--shape", "tiny", "--device", "cpu", "--repeat", "1", *PEAK, "--csv", str(out)]) == 0
    assert list(tmp_path.iterdir()) == [out]
    return rows(out)


def test_every_op_and_dtype_is_measured(tmp_path, capsys):
    found = of_bench(tmp_path, "--impl", "reference", "--dtype", "float32", "bfloat16", "float16")
    expected = {(op, call.part, str(d)[6:]) for op, case in TINY.items() for call in case.calls for d in case.dtypes}
    assert {(row["op"], row["part"], row["dtype"]) for row in found} == expected
    assert tuple(found[0]) == bench.Row._fields
    for row in found:
        assert float(row["ms"]) > 0
        assert (
            0
            <= float(row["error"])
            == float(row["eager_error"])
            < {"float32": 2e-6, "bfloat16": 0.02, "float16": 2e-3}[row["dtype"]]
        )
        assert int(row["peak_bytes"]) >= 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 + len(found)  # a Markdown table
    assert "adamw: left out, it is never in bfloat16" in err


@pytest.mark.slow
@pytest.mark.parametrize("op", TINY)
def test_compiled_is_the_reference_but_for_rounding(op, tmp_path):
    torch._dynamo.reset()
    found = of_bench(tmp_path, op, "--impl", "compiled", "reference")
    assert [row["impl"] for row in found] == ["reference", "compiled"] * len(TINY[op].calls)
    assert all(float(row["ratio"]) == 1 for row in found if row["impl"] == "reference")
    for row in found:
        assert float(row["error"]) <= 2 * float(row["eager_error"]) + 4 * torch.finfo(torch.float32).eps


def test_an_error_is_a_part_of_the_largest_number():
    case = TINY["swiglu"]
    wanted, _ = cases.expected(case, torch.float32)
    exact = wanted.exact["y"]
    moved = exact.clone()
    moved[0, 0, 0] += 0.25 * exact.abs().max()
    (error,) = cases.errors({"y": moved.float()}, wanted)
    assert error.found == pytest.approx(0.25, abs=1e-6)
    assert error.found > error.bound == 2 * error.eager + torch.finfo(torch.float32).eps
    assert cases.errors({"y": torch.full_like(exact, torch.nan).float()}, wanted)[0].found == torch.inf


@pytest.mark.parametrize("change", [lambda y: y.double(), lambda y: y[:1], lambda y: y.mT.contiguous().mT])
def test_an_output_of_another_shape_dtype_or_layout_is_refused(change):
    wanted, _ = cases.expected(TINY["swiglu"], torch.float32)
    with pytest.raises(ValueError, match=r"y is .*, expected float32 \[2, 48, 96\] by \[4608, 96, 1\]"):
        cases.errors({"y": change(wanted.exact["y"].float())}, wanted)


# torch counts nothing for the CPU's flash attention; these are its own formulas, which leave nothing out for a causal mask.
aten = torch.ops.aten
FLASH = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda d, q, k, v, *_, **__: sdpa_backward_flop(d, q, k, v),
}  # fmt: skip


@pytest.mark.parametrize("op", TINY)
def test_flops_are_those_of_the_products(op):
    """In bfloat16, since the reference's product into a float32 sum is one that torch does not count. Causal attention is half."""
    case = TINY[op]
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else torch.float32
    values = case.inputs(dtype)
    for call in case.calls:
        with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
            values |= call(reference, values)
        assert counter.get_total_flops() == call.flops * (2 if op in ("attention", "packed_attention") else 1)


@pytest.mark.parametrize(
    ("op", "bytes_"),
    [
        ("rms_norm", [4 * (2 * 96 * 128 + 128 + 96), 4 * (3 * 96 * 128 + 2 * 128 + 96)]),
        ("swiglu", [4 * 3 * 96 * 96, 4 * 5 * 96 * 96]),
        ("write_cache", [8 * 6 + 2 * 4 * 6 * 2 * 64]),
        ("adamw", [4 * 7 * (96 * 128 + 128 * 128 + 128) + 8 + 3 * 4]),
    ],
)
def test_bytes_are_those_of_arguments_and_results(op, bytes_):
    case = TINY[op]
    values, found = case.inputs(torch.float32), []
    for call in case.calls:
        values |= call(reference, values)
        found.append(call.bytes(values))
    assert found == bytes_


def test_the_7b_shapes_are_the_models():
    from lumina_fn.config import LUMINA_7B as cfg

    sizes = cases.SIZES["7b"]
    assert (sizes.width, sizes.heads, sizes.kv_heads, sizes.head_width, sizes.hidden, sizes.vocab) == (
        cfg.width, cfg.heads, cfg.kv_heads, cfg.head_width, cfg.hidden, cfg.vocab
    )  # fmt: skip


def test_memory_is_what_a_call_holds_at_once():
    """silu(gate) and the result, before the former is freed; then a result alone, and nothing."""
    x = torch.randn(1000)
    assert measure.peak_memory(lambda: reference.swiglu_fwd(x, x), CPU) == 2 * x.nbytes
    assert measure.peak_memory(lambda: [x + 1 for _ in range(3)], CPU) == 3 * x.nbytes
    assert measure.peak_memory(lambda: x.add_(1), CPU) == 0


def test_sides_take_turns():
    order = []
    some = [SimpleNamespace(run=lambda i=i: order.append(i), calls=1) for i in range(3)]
    times = measure.in_turn(some, CPU, 3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(own) for own in times] == [3, 3, 3]


def test_rates_and_their_part_of_the_peak():
    call = cases.Call("f", (), (), flops=2_000_000_000)
    side = lambda name, moved: measure.Side(name, call, lambda: None, 1, 0.0, 0.0, 0, moved)
    common = {"dtype": "float32", "device": "cpu", "shape": "tiny", "tokens": 1}
    peak = measure.Peak(1e12, 1e10)
    a, b = bench.rows("op", [side("a", 10), side("b", 10**9)], [[0.01, 0.02, 0.04], [0.01, 0.04, 0.08]], peak, **common)
    assert (a.ms, a.ratio, a.bound, a.of_peak) == pytest.approx((20, 1, "compute", 0.1))
    assert (b.ms, b.ratio, b.bound, b.of_peak) == pytest.approx((40, 2, "memory", 2.5))
    assert a.tflop_per_s == pytest.approx(0.1)
    assert b.gb_per_s == pytest.approx(25)


def test_what_cannot_run_here_and_was_not_asked_for_is_said(capsys):
    parser = bench._parser()
    assert list(bench._implementations(None, CPU, parser)) == ["reference", "compiled"]
    err = capsys.readouterr().err
    assert "ascend is left out: it is for NPUs, and this is cpu" in err
    assert "triton is left out: it needs an accelerator, and this is a CPU" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["attend"], "attend: no such op; expected any of rms_norm"),
        (["--impl", "ascend"], "--impl ascend: it is for NPUs, and this is cpu"),
        (["--impl", "triton", "reference"], "--impl triton: it needs an accelerator"),
        (["--device", "cuda"], "--device cuda: torch finds none here"),
        (["adamw", "--dtype", "bfloat16", *PEAK], "nothing of what was asked for can run here"),
        (["--repeat", "0"], "'0': expected a whole number above 0"),
        (["--peak", "1"], "expected 2 arguments"),
        (["--csv", "/nowhere/at/all.csv"], "there is no folder /nowhere/at"),
    ],
)
def test_a_mistake_is_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--shape", "tiny", *(["--device", "cpu"] if "--device" not in argv else []), *argv])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


@pytest.mark.slow
def test_the_command_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "--impl", "ascend", "--device", "cpu"], cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
