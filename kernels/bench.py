"""What each implementation of the fused kernels takes here, in time and memory, and how far its results are off.

    lumina kernel-bench
    lumina kernel-bench attention rms_norm --impl reference compiled --shape tiny --dtype float32 bfloat16 --csv FILE

Implementations take turns, and a time is the median of its rounds. What an op must compute (products, causal attention's half)
and must move (arguments and results, once) over its time is its rate, and that over the device's peak a part of it; the peak
is measured first, by a product and a copy, and what stays in a cache may exceed it. Errors are parts of the largest number of
an output, against the reference in float64, next to those of eager PyTorch in the same dtype. Memory is the most that PyTorch's
allocator held at once above what was there before the call, results included. Collectives (all_gather, reduce_scatter) are not
timed here: that takes a launch on several devices.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

OPS = (
    "rms_norm", "add_rms_norm", "qk_norm_rotary", "swiglu", "attention", "packed_attention", "cached_attention", "write_cache",
    "linear_cross_entropy", "adamw",
)  # fmt: skip
IMPLEMENTATIONS = ("reference", "compiled", "ascend", "triton")
SHAPES = ("7b", "tiny")
DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line; argparse would print the usage first."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> _Parser:
    about, _, notes = (__doc__ or "").partition("\n")
    program = sys.argv[0] if sys.argv[0].startswith("lumina ") else "python -m kernels.bench"
    parser = _Parser(
        prog=program, description=about, epilog=notes, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(OPS)} (default: all)")
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, help="default: all that can run on the device")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="the 7.88B model's widths (default), or a toy's")
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
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser  # fmt: skip


def _size(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of sys.argv); the exit code."""
    parser = _parser()
    if "--version" in (sys.argv[1:] if argv is None else argv):
        print(f"lumina-fn {importlib.metadata.version('lumina-fn')}")
        return 0
    args = parser.parse_args(argv)
    if unknown := [op for op in args.ops if op not in OPS]:
        parser.error(f"{unknown[0]}: no such op; expected any of {', '.join(OPS)}")
    from kernels import benchmark  # with PyTorch, for which --help does not wait

    return benchmark.run(args, parser.error)


if __name__ == "__main__":
    sys.exit(main())
