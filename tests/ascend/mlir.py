"""Debian's MLIR and LLVM 19, unpacked into build/mlir-19 without being installed: linalg in, a library for this CPU out."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2] / "build" / "mlir-19"
LIB = ROOT / "usr" / "lib"
PACKAGES = ("mlir-19-tools", "llvm-19", "libllvm19")
COPY = Path(__file__).parent / "memref_copy.c"
SECONDS = 300  # for any one tool: the slowest takes 10 on a busy machine

PASSES = (
    "convert-elementwise-to-linalg", "one-shot-bufferize=allow-return-allocs-from-loops=true", "convert-linalg-to-loops",
    "expand-strided-metadata", "lower-affine", "convert-scf-to-cf", "convert-cf-to-llvm", "arith-expand=include-bf16=true",
    "convert-math-to-llvm", "convert-math-to-libm", "convert-arith-to-llvm", "convert-index-to-llvm", "memref-expand",
    "finalize-memref-to-llvm", "convert-func-to-llvm", "lower-affine", "convert-arith-to-llvm", "reconcile-unrealized-casts",
)  # fmt: skip


def fetch() -> None:
    """The packages, downloaded by apt and unpacked by dpkg: neither needs root."""
    if ROOT.exists():
        return
    ROOT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT.parent) as scratch:
        download = ("apt-get", "download", *PACKAGES)
        subprocess.run(download, cwd=scratch, check=True, capture_output=True, timeout=SECONDS)
        unpacked = Path(scratch) / "unpacked"
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(("dpkg", "-x", package, unpacked), check=True, timeout=SECONDS)
        unpacked.rename(ROOT)


def tool(*command: str | Path, source: str | None = None) -> str:
    """What one of the programs prints."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(LIB / "x86_64-linux-gnu")}
    command = (LIB / "llvm-19/bin" / command[0], *command[1:])
    done = subprocess.run(command, input=source, env=env, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{command[0].name} failed:\n{done.stderr[:4000]}")
    return done.stdout


def library(linalg: str) -> bytes:
    """A shared library in which `_mlir_ciface_NAME` takes the kernel's memrefs by reference and its scalars by value."""
    ir = tool("mlir-opt", *(f"--{name}" for name in PASSES), source=_plain(linalg))
    with tempfile.TemporaryDirectory() as scratch:
        compiled, linked = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        llvm = tool("mlir-translate", "--mlir-to-llvmir", source=ir)
        tool("llc", "-O2", "-mcpu=native", "-relocation-model=pic", "-filetype=obj", "-o", compiled, source=llvm)
        link = ("gcc", "-shared", "-fPIC", "-O2", compiled, COPY, "-o", linked, "-lm")
        subprocess.run(link, check=True, capture_output=True, timeout=SECONDS)
        return linked.read_bytes()


def _plain(linalg: str) -> str:
    """The same program without what only Ascend's dialects know: attributes and hints, none of which computes anything."""
    linalg = re.sub(r" attributes \{[^}]*\}", "", linalg, count=1)
    linalg = re.sub(r"\{(?:hivm|tt)\.[^}]*\}", "", linalg)
    linalg = re.sub(r"\n\s*annotation\.mark[^\n]*", "", linalg)
    return re.sub(
        r"func\.func @(\w+\([^)]*\))", r"func.func public @\1 attributes {llvm.emit_c_interface}", linalg, count=1
    )
