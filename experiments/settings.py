"""A run's settings, a frozen dataclass, as command-line flags: names, types, defaults and help all come from its fields."""

import argparse
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from lumina_fn.errors import InputError

S = TypeVar("S")
POSITIONAL = object()  # `Annotated[Path, "help", POSITIONAL]`: named by its place, not by a flag


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
        else:
            parser.add_argument(flag, default=field.default, required=required, **common, **_values(hint))
    given = vars(parser.parse_args(argv)).items()
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given})


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


def device(name: str) -> torch.device:
    """The device of that name; `auto` is an accelerator if there is one, else the CPU. Raises InputError."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise InputError(f"--device {name}: it holds no numbers; expected a device that computes")
    return found
