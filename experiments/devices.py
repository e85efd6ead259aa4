"""The device that a command computes on: chosen, checked, and reported where it is missing."""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from experiments import ascend_env
from lumina_fn.errors import InputError, printable

if TYPE_CHECKING:  # importing it takes seconds: the functions below import it when they are called
    import torch

DEVICES = ("npu", "cuda", "cpu")  # `auto` takes the first that is available
LET_GO = 10  # seconds from the end of the last process on an NPU until a new one may open it; HCCL asks for them
EnvCheck = Annotated[
    Literal["error", "warn"],
    "on an NPU, what an environment variable out of its range causes (python -m experiments.ascend_env lists the ranges); "
    "warn: for a newer CANN that accepts more values",
]


def kind(name: str) -> str:
    """The kind of a device by its name, such as npu for `npu:3`; for `auto` the first of DEVICES that is available."""
    import torch

    if name != "auto":
        return name.partition(":")[0]
    # torch has a module for each kind of device; torch.npu exists once torch_npu is loaded.
    return next(found for found in DEVICES if hasattr(torch, found) and getattr(torch, found).is_available())


def device(name: str) -> "torch.device":
    """The device of that name; `auto` is an NPU if there is one, else a GPU, else the CPU. Raises InputError if it is not available."""
    import torch

    try:
        found = torch.device(kind(name) if name == "auto" else name)
        if found.type == "meta":
            raise InputError(f"--device {name}: it holds no numbers; expected a device that computes")
        count = torch.get_device_module(found).device_count()
        if (found.index or 0) >= count:  # torch_npu may abort the process if such a device is used
            raise RuntimeError(f"torch finds {count}, numbered from 0" if count else "torch finds none")
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:
        why = _npu_is_missing() if kind(name) == "npu" else None
        raise InputError(f"--device {name}: not available here: {why or str(error).splitlines()[0]}") from error


def _npu_is_missing() -> str | None:
    """Why torch finds no NPU, and what to do; None if it finds one."""
    import torch

    source = "source CANN's set_env.sh (/usr/local/Ascend/ascend-toolkit/set_env.sh) in this shell"
    if importlib.util.find_spec("torch_npu") is None:
        return f"torch_npu is not installed: pip install -e '.[npu]', and {source}"
    if not hasattr(torch, "npu"):
        return f"torch_npu is installed, but was not loaded: {source} (and unset TORCH_DEVICE_BACKEND_AUTOLOAD)"
    if not torch.npu.is_available():
        return f"torch_npu finds no device: {source}, and see that `npu-smi info` lists one"
    return None


def checked_device(
    run: Any, choose: Callable[[str], "torch.device"] = device, say: Callable[[str], None] | None = None
) -> "torch.device":
    """The device that `choose` returns for run.device. For an NPU the environment variables are checked first, and printed afterwards.

    Raises InputError for a device that is not available, and for a variable out of its range unless run.env_check is `warn`.
    """
    say = say or (lambda line: print(printable(line), file=sys.stderr))
    if kind(run.device) != "npu":
        if run.device == "auto" and importlib.util.find_spec("torch_npu") is not None:
            say(f"note: computing on {kind('auto')}, not on an NPU: {_npu_is_missing()}")
        return choose(run.device)
    ascend_env.check(os.environ, run.env_check, say)
    found = choose(run.device)
    for line in ascend_env.effective(os.environ):
        say(line)
    return found


def compiling(wanted: str | None, device: "torch.device") -> str:
    """What is compiled on the device: `wanted`, or the device's default for None.

    Raises InputError on an NPU for anything but `off`: its fused kernels run one by one, without Inductor.
    """
    if device.type != "npu":
        return wanted or "blocks"
    if wanted in (None, "off"):
        return "off"
    raise InputError(
        f"--compile {wanted}: an NPU runs its fused kernels one by one here; give --compile off, "
        "or write the compiled step for its graph engine: python -m lumina_fn.export"
    )
