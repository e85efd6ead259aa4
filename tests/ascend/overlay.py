"""Make a venv beside .venv that shows .venv's packages and, over them, those of some rungs of the ladder.

    python -m tests.ascend.overlay npu|triton

`.venv-npu/installed` says what is in it. Where it cannot be made, `.venv-npu/missing` says why, and that is no error:
the ladder's tests decide whether the reason is good enough. Whatever else goes wrong is an error.
"""

import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

from tests.ascend.cann_stub.build import build

ROOT = Path(__file__).parents[2]
UNREACHABLE = "no package registry answers"


class Overlay(NamedTuple):
    packages: tuple[str, ...]  # the only place where their versions are written
    tools: tuple[str, ...]  # programs that must be on the machine
    cann: bool  # whether to build the stand-in for CANN


OVERLAYS = {
    "npu": Overlay(("torch_npu==2.13.0",), ("gcc", "nm"), cann=True),
    "triton": Overlay(
        ("triton-ascend==3.2.0", "ascendnpu-ir==1.2.0", "pybind11==3.0.1", "numpy==2.2.6"), ("gcc",), cann=False
    ),
}

# torch_npu registers itself with torch as a backend to load: `import torch` alone would already look for a device.
# Without the task queue an operator that was launched by mistake raises where it was called.
LAUNCHER = """#!/bin/sh
export LD_LIBRARY_PATH='{lib64}'${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 TASK_QUEUE_ENABLE=0
exec '{python}' "$@"
"""


class CannotBeMade(Exception):
    """The machine is at fault."""


def folder(name: str) -> Path:
    return ROOT / f".venv-{name}"


def site_packages(name: str) -> Path:
    """Where the overlay's own packages are, installed or not."""
    return folder(name) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def foreign() -> str | None:
    """What makes this machine one that the pinned wheels are not made for, if anything."""
    here = f"{platform.system()} {platform.machine()}"
    return None if here == "Linux x86_64" else f"{here}, and the wheels are for Linux x86_64"


def make(name: str) -> str:
    """The overlay, made anew; what is in it, one thing a line."""
    overlay, where = OVERLAYS[name], folder(name)
    if reason := foreign():
        raise CannotBeMade(reason)
    venv.create(where, clear=True, with_pip=False, symlinks=True)
    packages = site_packages(name)
    # addsitedir, and not a plain path: .venv has .pth files of its own (an editable install is one).
    (packages / "main.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install(where / "bin" / "python", overlay.packages)
    for tool in overlay.tools:
        if shutil.which(tool) is None:
            raise CannotBeMade(f"{tool} is not installed")
    contents = list(overlay.packages)
    if overlay.cann:
        lib64 = where / "cann" / "lib64"
        contents.append(f"a stand-in for CANN: {build(packages / 'torch_npu', lib64)} functions in {lib64}")
        launcher = where / "bin" / "npu-python"
        launcher.write_text(LAUNCHER.format(lib64=lib64, python=where / "bin" / "python"))
        launcher.chmod(0o755)
    return "".join(f"{line}\n" for line in contents)


def install(python: Path, packages: tuple[str, ...]) -> None:
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *packages)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode and ("connection broken" in done.stderr or "Could not fetch URL" in done.stderr):
        raise CannotBeMade(UNREACHABLE)
    if done.returncode:
        raise RuntimeError(f"pip could not install {', '.join(packages)}:\n{done.stderr}")


def main(name: str) -> None:
    where, missing = folder(name), folder(name) / "missing"
    try:
        contents = make(name)
    except CannotBeMade as reason:
        where.mkdir(exist_ok=True)
        missing.write_text(f"{reason}\n")
        print(f".venv-{name} was not made: {reason}")
        return
    (where / "installed").write_text(contents)
    print(contents, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
