"""Two devices for Triton where no NPU is, both behind triton-ascend's own lowering: one runs it on this CPU, one plans Ascend's memory.

`with executed():` a launch goes from Triton to linalg (to the letter what an NPU's compiler is given), to LLVM, to this CPU.
`with planned() as plans:` a launch goes from linalg to HIVM, where each buffer is given its place in the memories of a
910B2's core, or the compilation fails; nothing is run, so the arguments may be meta tensors of any size.
"""

import contextlib
import ctypes
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import ascendnpuir
from torch import Tensor
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from tests.ascend import mlir

AscendBackend = backends["ascend"].compiler
BISHENGIR = Path(ascendnpuir.__file__).parent / "bin" / "bishengir-compile"
# As triton-ascend calls it for an A2 (linalg_to_bin_enable_npu_compile_A2_A3 in its compiler.py).
OPTIONS = (
    "--target=Ascend910B2",
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)


SPACES = {"ub": "UB_SIZE", "cbuf": "L1_SIZE", "cc": "L0C_SIZE"}  # HIVM's name and its target's for a memory's size


class Plan(NamedTuple):
    """A kernel that fits."""

    kernel: str
    bits: dict[str, int]  # up to where each of a core's memories is in use
    limits: dict[str, int]
    saved: list[str]  # what the compiler gave up to make it fit


class Executed(AscendBackend):
    """Ascend's compiler up to linalg; the rest of the way is this CPU's."""

    arch = "executed"

    @classmethod
    def supports_target(cls, target: GPUTarget) -> bool:
        return target.arch == cls.arch

    def add_stages(self, stages: dict, options: object) -> None:
        super().add_stages(stages, options)
        stages["npubin"] = self.finish

    def finish(self, linalg: str, metadata: dict) -> bytes:
        name, mode = re.search(r"func\.func @(\w+)", linalg)[1], re.search(r'mix_mode = "(\w+)"', linalg)[1]
        metadata.update(name=f"{name} {mode}", tensor_kinds=[], shared=0)
        return self.binary(linalg)

    def binary(self, linalg: str) -> bytes:
        return mlir.library(linalg)


class Planned(Executed):
    """Ascend's compiler up to HIVM, where memory is allotted; what is left is hivmc's, which comes with CANN."""

    arch = "planned"

    def binary(self, linalg: str) -> bytes:
        """What the compiler says, then its plan; a RuntimeError with what it says where there is none."""
        with tempfile.TemporaryDirectory() as scratch:
            source, stages = Path(scratch) / "kernel.mlir", Path(scratch) / "stages"
            source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))  # as triton-ascend does
            command = (BISHENGIR, source, *OPTIONS, f"--save-temps={stages}", "-o", Path(scratch) / "kernel.o")
            done = subprocess.run(command, capture_output=True, text=True, timeout=mlir.SECONDS)
            plan = stages / "module.hivm.opt.mlir"
            if not plan.exists():
                raise RuntimeError(done.stderr)
            return f"{done.stderr}\n{plan.read_text()}".encode()


def read_plan(kernel: str, text: str) -> Plan:
    limits = {name: int(re.search(rf'"{size}", (\d+)', text)[1]) for name, size in SPACES.items()}
    bits = dict.fromkeys(SPACES, 0)
    for at, shape, width, space in re.findall(
        r"pointer_cast\(%c(\d+)_i64[^)]*\) : memref<([\dx]*?)x?[a-z]+(\d+), #hivm.address_space<(\w+)>>", text
    ):
        if space in bits:
            size = math.prod(int(n) for n in shape.split("x") if n) * int(width)
            bits[space] = max(bits[space], 8 * int(at) + size)
    return Plan(kernel, bits, limits, re.findall(r"automatically set ([\w-]+) to false and", text))


class MemRef(ctypes.Structure):
    """A tensor as MLIR's functions take it."""

    _fields_ = (
        ("allocated", ctypes.c_void_p), ("aligned", ctypes.c_void_p), ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64 * 1), ("stride", ctypes.c_int64 * 1),
    )  # fmt: skip

    @classmethod
    def of(cls, tensor: Tensor) -> "MemRef":
        at = tensor.data_ptr()
        return cls(at, at, 0, (ctypes.c_int64 * 1)(tensor.numel()), (ctypes.c_int64 * 1)(1))


SCALARS = {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


def run_on_cpu(source: ASTSource, binary: bytes, grid: tuple[int, int, int], args: tuple) -> None:
    """One program after the other, each with what the compiled function takes: two memrefs that only an NPU needs, arguments, grid, program."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(binary)
        file.flush()
        function = getattr(ctypes.CDLL(file.name), f"_mlir_ciface_{source.name}")
    given = [MemRef(), MemRef()]
    for (name, kind), value in zip(source.signature.items(), args, strict=True):
        if name not in source.constants:  # an integer that is 1 became a constant
            given.append(MemRef.of(value) if isinstance(value, Tensor) else SCALARS[kind](value))
    given = [ctypes.byref(value) if isinstance(value, MemRef) else value for value in given]
    for program in itertools.product(*map(range, grid)):
        function(*given, *map(ctypes.c_int32, (*grid, *program)))


class Device:
    """What Triton asks a device's driver for."""

    def __init__(self, number: int, arch: str, launch: Callable[[ASTSource, bytes, tuple, tuple], None]):
        self.number, self.arch, self.launch = number, arch, launch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 0},
            load_binary=lambda name, binary, shared, device: (name, binary, 0, 0),
        )

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("npu", self.arch, 0)

    def launcher_cls(self, source: ASTSource, metadata: object) -> Callable[..., None]:
        # Of what Triton passes: the grid, a stream, the binary, packed and launch metadata, two hooks, the arguments.
        return lambda x, y, z, _, binary, *rest: self.launch(source, binary, (x, y, z), rest[4:])


# Two compilers in the place of the one that ends in hivmc.
del backends["ascend"]
backends.update(executed=Backend(Executed, None), planned=Backend(Planned, None))


@contextlib.contextmanager
def _active(device: Device) -> Iterator[None]:
    driver.set_active(device)
    try:
        yield
    finally:
        driver.reset_active()


@contextlib.contextmanager
def executed() -> Iterator[None]:
    with _active(Device(0, Executed.arch, run_on_cpu)):
        yield


@contextlib.contextmanager
def planned() -> Iterator[list[Plan]]:
    plans = []
    with _active(
        Device(1, Planned.arch, lambda source, binary, *_: plans.append(read_plan(source.name, binary.decode())))
    ):
        yield plans
