"""Command-line flags from a frozen dataclass: names, types, defaults, groups and help come from its fields."""

import argparse
import difflib
import math
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import lumina_fn
from lumina_fn.errors import InputError
from lumina_fn.process import entry
from lumina_fn.process.ranges import Range

S = TypeVar("S")
POSITIONAL = object()  # `Annotated[Path, "help", POSITIONAL]`: an argument without a flag
REPEATED = object()  # `Annotated[tuple[Path, ...], "help", REPEATED]`: a required flag, given once for each value


class Group(NamedTuple):
    """`Annotated[int, "help", Group("data", "--pack 4096")]`: this field and those after it are listed under this title."""

    title: str
    example: str


class _Flag(NamedTuple):
    """The flag of a field of the dataclass."""

    field: Field
    hint: Any
    help: str
    marks: tuple[object, ...]

    @property
    def name(self) -> str:
        return self.field.name if self.positional else "--" + self.field.name.replace("_", "-")

    @property
    def positional(self) -> bool:
        return POSITIONAL in self.marks

    @property
    def required(self) -> bool:
        return self.field.default is MISSING

    @property
    def metavar(self) -> str:
        hint = _given(self.hint)
        hint = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(hint) is Literal:
            return "|".join(map(str, get_args(hint)))
        return self.field.name.upper() if self.positional else hint.__name__.upper()

    def mark(self, kind: type) -> Any:
        """The annotation of this type, or None."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)


def parse(kind: type[S], doc: str | None, argv: Sequence[str] | None, sub: str = "") -> S:
    """The dataclass `kind` with values from flags; the help is in `Annotated[int, "help"]` fields. `doc` is the command's
    description, `sub` the name of a subcommand. Raises InputError for invalid flags.
    """
    flags = list(_flags(kind))
    parser = _parser(flags, doc, f"{program()} {sub}".strip())
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv and any(flag.required for flag in flags):
        entry.tell(f"{parser.format_usage()}\n{(doc or '').strip().partition(chr(10))[0]}\n")
    given, extra = parser.parse_known_intermixed_args(argv)  # accepts `x --flag y z` too
    if extra:
        parser.error(_unknown(extra, [flag.name for flag in flags]))
    values = vars(given)
    if missing := [f for f in flags if f.required and values.get(f.field.name) is None]:
        parser.error(f"expected {', '.join(f.name if f.positional else f'{f.name} {f.metavar}' for f in missing)}")
    for flag in flags:
        value = values[flag.field.name]
        for one in value if isinstance(value, list | tuple) else [value]:
            if problem := _problem(one, flag.mark(Range)):
                raise InputError(f"{flag.name} {one}: {problem}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def program() -> str:
    """The command as the user typed it."""
    if sys.argv[0].startswith("lumina "):  # set by experiments.__main__
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def version() -> str:
    """The line that --version prints."""
    return f"lumina-fn {lumina_fn.__version__}"


def reference(kind: type) -> Iterator[tuple[Group | None, str, str, str, str]]:
    """For each flag its group (if one begins there), name, values, default and help, for the documentation."""
    for flag in _flags(kind):
        default = "" if flag.required or flag.field.default in (None, ()) else _shown(flag.field.default)
        values = "" if _given(flag.hint) is bool else flag.metavar
        yield flag.mark(Group), flag.name, values, "required" if flag.required else default, flag.help


def _flags(kind: type) -> Iterator[_Flag]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, text, marks = hints[field.name], "", ()
        if get_origin(hint) is Annotated:
            hint, text, *marks = get_args(hint)
        yield _Flag(field, hint, text, tuple(marks))


def _parser(flags: list[_Flag], doc: str | None, prog: str) -> argparse.ArgumentParser:
    needed = [f.metavar if f.positional else f"{f.name} {f.metavar}" for f in flags if f.required]
    usage = " ".join([prog, *needed, "[flags]"])
    parser = _Parser(prog, usage, doc, formatter_class=_Help, allow_abbrev=False, add_help=False)
    at = parser.add_argument_group("flags" if not any(flag.positional for flag in flags) else "arguments and flags")
    for flag in flags:
        if group := flag.mark(Group):
            at = parser.add_argument_group(group.title, f"for example {group.example}")
        _add(at, flag)
    others = parser.add_argument_group("others")
    others.add_argument("-h", "--help", action="help", help="print this and exit")
    others.add_argument("--version", action="version", version=version(), help="print the version and exit")
    return parser


def _add(at: argparse._ArgumentGroup, flag: _Flag) -> None:
    hint, default = _given(flag.hint), None if flag.required else flag.field.default
    text = flag.help if default in (None, ()) else f"{flag.help} (default: {_shown(default)})".strip()
    text = text.replace("%", "%%")
    if flag.positional:
        at.add_argument(flag.field.name, help=text, type=hint, metavar=flag.metavar, nargs="?")
        return
    common = {"help": text, "dest": flag.field.name, "default": default}
    if hint is bool:
        at.add_argument(flag.name, action=argparse.BooleanOptionalAction, **common)
    elif REPEATED in flag.marks:
        # argparse appends to a copy of the default, which has to be a list.
        common["default"] = list(default) if isinstance(default, tuple) else None
        at.add_argument(flag.name, action="append", **common, **_values(get_args(hint)[0]))
    else:
        at.add_argument(flag.name, **common, **_values(hint))


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _unknown(extra: list[str], known: list[str]) -> str:
    """The error for unknown arguments: the first unknown flag and the known flag that is nearest to it."""
    first = next((word for word in extra if word.startswith("-")), None)
    if first is None:
        return f"unexpected {extra[0]!r}"
    name = first.partition("=")[0]
    near = difflib.get_close_matches(name, [*known, "--help", "--version"], 1)
    return f"unknown flag {name}" + (f", did you mean {near[0]}?" if near else "")


def _problem(value: object, within: Range | None) -> str | None:
    """What is wrong with a number; None if nothing is, or if the value is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if within is not None:
        return within.problem(value)
    return None if math.isfinite(value) else "expected a finite number"


def _given(hint: Any) -> Any:
    """The type of a given value: `T` for a hint `T | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(h for h in get_args(hint) if h is not type(None))
    return hint


def _values(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:  # tuple[int, ...]: one or more
        return {"nargs": "+"} | _values(get_args(hint)[0])
    return {"type": hint, "metavar": hint.__name__.upper()}
