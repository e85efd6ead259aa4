"""What each implementation of the fused kernels takes here, in time and memory, and how far its results are off.

    python -m kernels.bench
    python -m kernels.bench attention rms_norm --impl reference compiled --shape tiny --dtype float32 bfloat16 --csv FILE

Implementations take turns, and a time is the median of its rounds. What an op must compute (products, causal attention's half)
and must move (arguments and results, once) over its time is its rate, and that over the device's peak a part of it; the peak
is measured first, by a product and a copy, and what stays in a cache may exceed it. Errors are parts of the largest number of
an output, against the reference in float64, next to those of eager PyTorch in the same dtype. Memory is the most that PyTorch's
allocator held at once above what was there before the call, results included. Collectives (all_gather, reduce_scatter) are not
timed here: that takes a launch on several devices.
"""

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
    """By Inductor. What works in place (a name that ends in _) is one call of PyTorch's already."""
    functions = {name: fn for name, fn in vars(reference).items() if isinstance(fn, FunctionType) and name[-1] != "_"}
    return SimpleNamespace(**{name: torch.compile(fn, dynamic=False) for name, fn in functions.items()})


def triton_kernels() -> SimpleNamespace:
    """Our own of all ops that have one."""
    modules = [importlib.import_module(f"kernels.{name}") for name in TRITON]
    return SimpleNamespace(**{name: fn for module in modules for name, fn in vars(module).items()})


IMPLEMENTATIONS: dict[str, Callable[[], Any]] = {
    "reference": lambda: reference,
    "compiled": _compiled,
    "ascend": lambda: ascend,
    "triton": triton_kernels,
}


def missing(impl: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on a device, if it cannot."""
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


MEASURED, GIVEN = "measured", "given"  # where a peak is from


def rows(op: str, some: Sequence[Side], times: Sequence[Sequence[float]], peak: Peak, **common: Any) -> list[Row]:
    """What was measured of an op."""
    first: dict[str, Sequence[float]] = {}  # by the part of the op
    made = []
    for side, own in zip(some, times, strict=True):
        call, median = side.call, statistics.median(own)
        others = first.setdefault(call.part, own)
        at_peak = {"compute": call.flops / peak.flops, "memory": side.bytes / peak.bandwidth}
        bound = max(at_peak, key=at_peak.get)
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
    """Aligned, and Markdown. The unit of a rate says what bounds the op."""
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
    """What the rates are parts of, and what was counted."""
    peaks = {(row.device, row.dtype, row.peak_tflops, row.peak_gbps, row.peak_source) for row in found}
    return [
        *(f"Peak of {device}, {dtype}: {tflops:.3g} TFLOP/s and {gbps:.3g} GB/s, {source}." for device, dtype, tflops, gbps, source in sorted(peaks)),
        "FLOP are those of matrix products, of causal attention the half that is needed.",
    ]  # fmt: skip


def write_csv(path: Path, found: Sequence[Row]) -> None:
    """All or nothing: the file is there once it is whole."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *found])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text.getvalue())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def not_ours(path: Path) -> str | None:
    """Why a file is not written over, if it is not: only a table of this command is."""
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage before it."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> _Parser:
    about, _, notes = __doc__.partition("\n")
    parser = _Parser(
        prog="python -m kernels.bench", description=about, epilog=notes, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    ops = cases(SIZES["tiny"])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(ops)} (default: all)")
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, help="default: all that can run on the device")
    parser.add_argument("--shape", choices=SIZES, default="7b", help="the 7.88B model's widths (default), or a toy's")
    parser.add_argument("--tokens", type=_size, metavar="N", help="of a row and of a cache (default: 4096; tiny: 48)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32; on an NPU bfloat16")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "npu", "cuda"),
        default="auto",
        help="auto: an NPU or a GPU, if one is there",
    )
    parser.add_argument("--repeat", type=_size, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "--peak",
        type=float,
        nargs=2,
        metavar=("TFLOPS", "GBPS"),
        help="the device's, of a datasheet (default: measured)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a file for the results; every number of them")
    return parser  # fmt: skip


def _size(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _device(name: str, parser: _Parser) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type == (found.type if name == "auto" else name):
        return found
    if name != "auto":
        parser.error(f"--device {name}: torch finds none here")
    return torch.device("cpu")


def dtypes(asked: list[str] | None, device: torch.device) -> list[str]:
    return asked or ["bfloat16" if device.type == "npu" else "float32"]


def _implementations(asked: Sequence[str] | None, device: torch.device, parser: _Parser) -> dict[str, Any]:
    """By name; of those that cannot run here, the ones that were asked for are an error."""
    loaded = {}
    for name in IMPLEMENTATIONS:  # in this order: the reference is what others are compared with
        if asked is not None and name not in asked:
            continue
        reason = missing(name, device)
        if reason and asked is not None:
            parser.error(f"--impl {name}: {reason}")
        if reason:
            _say(f"{name} is left out: {reason}")
        else:
            loaded[name] = IMPLEMENTATIONS[name]()
    return loaded


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    sizes: Sizes = SIZES[args.shape]
    if args.tokens:
        sizes = sizes._replace(tokens=args.tokens, slots=max(args.tokens, sizes.new))
    known = cases(sizes)
    if unknown := [op for op in args.ops if op not in known]:
        parser.error(f"{unknown[0]}: no such op; expected any of {', '.join(known)}")
    if args.csv and not args.csv.absolute().parent.is_dir():
        parser.error(f"--csv {args.csv}: there is no folder {args.csv.parent}")
    if args.csv and (reason := not_ours(args.csv)):
        parser.error(f"--csv {args.csv}: {reason}")
    if args.peak and not all(0 < number < math.inf for number in args.peak):
        parser.error("--peak: expected two numbers above 0")
    device = _device(args.device, parser)
    impls = _implementations(args.impl, device, parser)
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
        parser.error("nothing of what was asked for can run here")
    print("\n".join([*table(found), "", *caption(found)]))
    if args.csv:
        try:
            write_csv(args.csv, found)
        except OSError as error:
            parser.error(f"--csv {args.csv}: {error.strerror}; the results are above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
