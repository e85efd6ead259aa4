"""Two devices for Triton where no NPU is, both fed by triton-ascend's own lowering: one runs it on the CPU, one plans Ascend's memory.

`with executed():` a launch of a kernel goes Triton -> linalg (exactly what an NPU's compiler is given) -> LLVM -> this CPU.
`with planned() as plans:` it goes -> linalg -> HIVM for the 910B2, which fits every buffer into the core's memories or fails;
nothing runs, so the arguments may be meta tensors of any size.
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ascendnpuir
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.ascend import mlir

AscendBackend = backends["ascend"].compiler
BISHENGIR = Path(ascendnpuir.__file__).parent / "bin/bishengir-compile"
SECONDS = 300  # for any one tool: the slowest takes 20 on a busy machine


class Plan(NamedTuple):
    """What HIVM allotted for a kernel, in bits per core; 0: none."""

    kernel: str
    memory: dict[str, int]


class _Lab(AscendBackend):
    """Ascend's compiler up to linalg; `finish` makes of that what this machine can use."""

    arch = ""

    @classmethod
    def supports_target(cls, target: GPUTarget) -> bool:
        return target.arch == cls.arch

    def hash(self) -> str:
        return f"{self.arch}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"

    def add_stages(self, stages: dict, options: object) -> None:
        super().add_stages(stages, options)
        stages["npubin"] = self.finish

    def finish(self, linalg: str, metadata: dict) -> bytes:
        found = lambda pattern: re.search(pattern, linalg)[1]
        name = found(r"func\.func @(\w+)")
        metadata.update(name=f"{name} {found('mix_mode = .(\\w+)')}", tensor_kinds=[], shared=1)
        return self.binary(name, linalg, metadata)
