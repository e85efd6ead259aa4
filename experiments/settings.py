"""A run's settings, a frozen dataclass, as command-line flags: names, types, defaults and help all come from its fields."""

import argparse
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from experiments import ascend_env
from lumina_fn import errors
from lumina_fn.errors import InputError
from lumina_fn.process.ranges import Range

if TYPE_CHECKING:  # it takes seconds to load, and is loaded where a device is asked for
    import torch

S = TypeVar("S")
POSITIONAL = object()  # `Annotated[Path, "help", POSITIONAL]`: named by its place, not by a flag
REPEATED = (
    object()
)  # `Annotated[tuple[Path, ...], "help", REPEATED]`: a flag without default, given once for each value


DEVICES = ("npu", "cuda", "cpu")  # `auto` takes the first that is there
EnvCheck = Annotated[
    Literal["error", "warn"],
    "on an NPU, what becomes of an environment variable that is out of its range (python -m experiments.ascend_env); "
    "warn: for a newer CANN, which may take more",
]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see --help")


def parse(kind: type[S], doc: str | None, argv: Sequence[str] | None) -> S:
    """The dataclass `kind` filled from flags; `Annotated[int, "help"]` fields carry their help. Raises InputError."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, text, marks = hints[field.name], "", ()
        if get_origin(hint) is Annotated:
            hint, text, *marks = get_args(hint)
        if POSITIONAL in marks:
            parser.add_argument(field.name, help=text.replace("%", "%%"), type=hint, metavar=field.name.upper())
            continue
        required = field.default is MISSING
        text = text if required or field.default is None else f"{text} (default: {field.default})".strip()
        flag, common = "--" + field.name.replace("_", "-"), {"help": text.replace("%", "%%"), "dest": field.name}
        hint = _given(hint)
        if hint is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, required=required, **common
            )
        elif REPEATED in marks:
            values = _values(get_args(hint)[0])
            parser.add_argument(flag, action="append", required=True, **common, **values)
        else:
            parser.add_argument(flag, default=field.default, required=required, **common, **_values(hint))
    given = vars(parser.parse_args(argv))
    for name, hint in hints.items():
        marks = getattr(hint, "__metadata__", ())
        within, value = next((mark for mark in marks if isinstance(mark, Range)), None), given[name]
        if isinstance(value, int | float) and (problem := within.problem(value) if within else _finite(value)):
            flag = name if POSITIONAL in marks else "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value}: {problem}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _finite(value: float) -> str | None:
    return None if math.isfinite(value) else "expected a finite number"


def _given(hint: Any) -> Any:
    """The type of a value that is given, where None means that none is."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(h for h in get_args(hint) if h is not type(None))
    return hint


def _values(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:  # tuple[int, ...]: one or more
        return {"nargs": "+"} | _values(get_args(hint)[0])
    return {"type": hint, "metavar": hint.__name__.upper()}


def kind(name: str) -> str:
    """The kind of device that this name asks for; `auto`: the first of DEVICES that is available."""
    import torch

    if name != "auto":
        return name.partition(":")[0]
    # torch has a module for each kind that it can drive; torch.npu comes with torch_npu.
    return next(found for found in DEVICES if hasattr(torch, found) and getattr(torch, found).is_available())


def device(name: str) -> "torch.device":
    """The device of that name; `auto` is an NPU if there is one, else a GPU, else the CPU. Raises InputError."""
    import torch

    try:
        found = torch.device(kind(name) if name == "auto" else name)
        if found.type == "meta":
            raise InputError(f"--device {name}: it holds no numbers; expected a device that computes")
        count = torch.get_device_module(found).device_count()
        if (found.index or 0) >= count:  # asking torch_npu for such a device may end the process
            raise RuntimeError(f"torch finds {count}, numbered from 0" if count else "torch finds none")
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:
        why = _npu_is_missing() if kind(name) == "npu" else None
        raise InputError(f"--device {name}: not available here: {why or str(error).splitlines()[0]}") from error


def _npu_is_missing() -> str | None:
    """What to do so that torch finds an NPU."""
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
    """What `choose` finds for run.device. Where that is an NPU its environment is checked before, and then said."""
    say = say or (lambda line: print(errors.printable(line), file=sys.stderr))
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
    """What is compiled on the device. InputError on an NPU, whose fused kernels run one by one: Inductor has no part in it."""
    if device.type != "npu":
        return wanted or "blocks"
    if wanted in (None, "off"):
        return "off"
    raise InputError(
        f"--compile {wanted}: an NPU runs its fused kernels one by one here; give --compile off, "
        "or write the compiled step for its graph engine: python -m lumina_fn.export"
    )
