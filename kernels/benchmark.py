"""What `kernels.bench` does once its arguments are known: implementations side by side, timed in turn, and a table of them."""

import argparse
import csv
import importlib
import importlib.util
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch

from kernels import ascend, npu, reference
from kernels.cases import FLOATS, SIZES, Sizes, cases
from kernels.measure import Peak, Side, in_turn, measured_peak, sides

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
TRITON = ("triton_rms_norm", "triton_qk_norm_rotary", "triton_attention", "triton_vocabulary_loss")


class Row(NamedTuple):
    """A line of the table, and of the CSV file."""

    op: str
    part: str
    dtype: str
    impl: str
    device: str
    shape: str
    tokens: int
    ms: float
    ratio: float  # of its time to the first implementation's, the median over rounds
    tflop_per_s: float
    gb_per_s: float
    peak_tflops: float
    peak_gbps: float
    peak_source: str
    bound: str  # by the peak: "compute" or "memory"
    of_peak: float
    error: float
    eager_error: float
    peak_bytes: int


def _compiled() -> SimpleNamespace:
    """The reference compiled by Inductor, without its functions that work in place (names ending in _): those are one call already."""
    functions = {name: fn for name, fn in vars(reference).items() if isinstance(fn, FunctionType) and name[-1] != "_"}
    return SimpleNamespace(**{name: torch.compile(fn, dynamic=False) for name, fn in functions.items()})


def triton_kernels() -> SimpleNamespace:
    """Our Triton kernels, by name."""
    modules = [importlib.import_module(f"kernels.{name}") for name in TRITON]
    return SimpleNamespace(**{name: fn for module in modules for name, fn in vars(module).items()})


IMPLEMENTATIONS: dict[str, Callable[[], Any]] = {
    "reference": lambda: reference,
    "compiled": _compiled,
    "ascend": lambda: ascend,
    "triton": triton_kernels,
}


def missing(impl: str, device: torch.device) -> str | None:
    """The reason why an implementation cannot run on a device; None if it can."""
    match impl:
        case "compiled" if device.type == "npu":
            return "torch.compile is left to CPUs and to CUDA"
        case "ascend" if device.type != "npu":
            return f"it is for NPUs, and this is {device.type}"
        case "triton" if device.type == "cpu":
            return "it needs an accelerator, and this is a CPU"
        case "triton" if device.type == "npu" and not npu.triton_ascend():
            return "triton-ascend is not installed"
        case "triton" if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
    return None


MEASURED, GIVEN = "measured", "given"  # sources of a peak


def rows(op: str, some: Sequence[Side], times: Sequence[Sequence[float]], peak: Peak, **common: Any) -> list[Row]:
    """The rows of an op's measured calls."""
    first: dict[str, Sequence[float]] = {}  # times of the first implementation, by the part of the op
    made = []
    for side, own in zip(some, times, strict=True):
        call, median = side.call, statistics.median(own)
        others = first.setdefault(call.part, own)
        at_peak = {"compute": call.flops / peak.flops, "memory": side.bytes / peak.bandwidth}
        bound = max(at_peak, key=at_peak.__getitem__)
        ratio = statistics.median(a / b for a, b in zip(own, others, strict=True))
        made.append(
            Row(
                op=op, part=call.part, impl=side.impl, ms=1e3 * median, ratio=ratio, tflop_per_s=call.flops / median / 1e12,
                gb_per_s=side.bytes / median / 1e9, peak_tflops=peak.flops / 1e12, peak_gbps=peak.bandwidth / 1e9, bound=bound, of_peak=at_peak[bound] / median, error=side.error,
                eager_error=side.eager, peak_bytes=side.peak_bytes, **common,
            )
        )  # fmt: skip
    return made


def table(found: Sequence[Row]) -> list[str]:
    """The lines of an aligned Markdown table. The unit of a rate shows what bounds the op: TFLOP/s compute, GB/s memory."""
    head = ("op", "part", "dtype", "impl", "ms", "ratio", "rate", "of peak", "error", "eager's", "memory, MB")
    rate = lambda row: f"{row.tflop_per_s:.3g} TFLOP/s" if row.bound == "compute" else f"{row.gb_per_s:.3g} GB/s"
    cells = [
        (row.op, row.part, row.dtype, row.impl, f"{row.ms:.3g}", f"{row.ratio:.2f}", rate(row), f"{row.of_peak:.0%}",
         f"{row.error:.1e}", f"{row.eager_error:.1e}", f"{row.peak_bytes / 1e6:.3g}")
        for row in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    line = lambda row: f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
    return [line(head), f"|{'|'.join('-' * (width + 2) for width in widths)}|", *map(line, cells)]


def caption(found: Sequence[Row]) -> list[str]:
    """Lines below the table: the peaks that rates are compared with, and how FLOP are counted."""
    peaks = {(row.device, row.dtype, row.peak_tflops, row.peak_gbps, row.peak_source) for row in found}
    return [
        *(f"Peak of {device}, {dtype}: {tflops:.3g} TFLOP/s and {gbps:.3g} GB/s, {source}." for device, dtype, tflops, gbps, source in sorted(peaks)),
        "FLOP are those of matrix products, of causal attention the half that is needed.",
    ]  # fmt: skip


def write_csv(path: Path, found: Sequence[Row]) -> None:
    """Write all rows to a CSV file, which appears only when complete."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *found])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text.getvalue())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def not_ours(path: Path) -> str | None:
    """The reason why a file must not be overwritten: it is no table of this command. None if it may be."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        return "it is a link, a folder or a device: name a new file"
    header = ",".join(Row._fields).encode() + b"\n"
    try:
        with path.open("rb") as file:
            found = file.readline(len(header))
    except OSError as error:
        return error.strerror
    return None if found == header else "it holds something else than these results: name a new file"


def _device(name: str, refuse: Callable[[str], NoReturn]) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type == (found.type if name == "auto" else name):
        return found
    if name != "auto":
        refuse(f"--device {name}: torch finds none here")
    return torch.device("cpu")


def dtypes(asked: list[str] | None, device: torch.device) -> list[str]:
    """The names of the dtypes to measure: those given by the user, else bfloat16 on an NPU and float32 elsewhere."""
    return asked or ["bfloat16" if device.type == "npu" else "float32"]


def _implementations(
    asked: Sequence[str] | None, device: torch.device, refuse: Callable[[str], NoReturn]
) -> dict[str, Any]:
    """The implementations to measure, by name. One that cannot run here is an error if the user asked for it, else left out."""
    loaded = {}
    for name in IMPLEMENTATIONS:  # in this order: the reference is what others are compared with
        if asked is not None and name not in asked:
            continue
        reason = missing(name, device)
        if reason and asked is not None:
            refuse(f"--impl {name}: {reason}")
        if reason:
            _say(f"{name} is left out: {reason}")
        else:
            loaded[name] = IMPLEMENTATIONS[name]()
    return loaded


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> int:
    """Measure what the arguments ask for and print the table; the exit code. `refuse` ends the command with a line."""
    sizes: Sizes = SIZES[args.shape]
    if args.tokens:
        sizes = sizes._replace(tokens=args.tokens, slots=max(args.tokens, sizes.new))
    known = cases(sizes)
    if args.csv and not args.csv.absolute().parent.is_dir():
        refuse(f"--csv {args.csv}: there is no folder {args.csv.parent}")
    if args.csv and (reason := not_ours(args.csv)):
        refuse(f"--csv {args.csv}: {reason}")
    if args.peak and not all(0 < number < math.inf for number in args.peak):
        refuse("--peak: expected two numbers above 0")
    device = _device(args.device, refuse)
    impls = _implementations(args.impl, device, refuse)
    found: list[Row] = []
    for name in dtypes(args.dtype, device):
        dtype = DTYPES[name]
        peak = Peak(args.peak[0] * 1e12, args.peak[1] * 1e9) if args.peak else measured_peak(dtype, device)
        for op in args.ops or known:
            if dtype not in known[op].dtypes:
                _say(f"{op}: left out, it is never in {name}")
                continue
            some = sides(known[op], impls, dtype, device, lambda line, op=op: _say(f"{op}: {line}"))
            times = in_turn(some, device, args.repeat)
            common = {
                "dtype": name, "device": device.type, "shape": args.shape, "tokens": sizes.tokens,
                "peak_source": GIVEN if args.peak else MEASURED,
            }  # fmt: skip
            of_op = rows(op, some, times, peak, **common)
            for row in of_op:
                _say(f"{row.op} {row.part}, {row.dtype}, {row.impl}: {row.ms:.3g} ms")
            found += of_op
    if not found:
        refuse("nothing of what was asked for can run here")
    print("\n".join([*table(found), "", *caption(found)]))
    if args.csv:
        try:
            write_csv(args.csv, found)
        except OSError as error:
            refuse(f"--csv {args.csv}: {error.strerror}; the results are above")
    return 0
