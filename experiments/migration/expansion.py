"""The words of a launch script, expanded as by a shell without running one; values known only when the script runs stay open.

An open value is a mark in the text that names what decides it: a variable, an argument of the script, or a part of the script that no
--set can name. Marks go through assignments and sums, so that each flag of the command tells what it depends on.
"""

import ast
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from experiments.migration.words import Piece, Unknown, end_of, statements

MAX_EXPANDED = 1 << 22  # characters of all values together, which could grow without bound by references to references
MAX_DEPTH = 8  # of ${A:-${B:-...}}
NAME = "[A-Za-z_][A-Za-z0-9_]*"  # ASCII only: for a shell `HCCL_É=1` is a command
BEGIN, END = "\ue000", "\ue001"  # of a mark; for private use, and refused in scripts
_MARK = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}")
_REFERENCE = re.compile(rf"\$\{{({NAME}|[1-9][0-9]?)(?::?[-=](.*))?\}}|\$({NAME}|[1-9])", re.DOTALL)
_OWN = re.compile(r"\$(?:0|\{0\}|BASH_SOURCE|\{BASH_SOURCE(?:\[0\])?\})")  # the script's own path
_SUMS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b), ast.Mod: lambda a, b: a - b * int(a / b),
}  # fmt: skip


class Endless(Unknown):
    """Values that grow without end."""


class Open(NamedTuple):
    """A value that is known only when the script runs."""

    why: str
    line: int
    source: str | None = None  # the environment variable that holds it
    default: str | None = None  # of an argument that may be missing


@dataclass
class Script:
    """A launch script: its variables, its exports and its command. Texts hold marks where a value is open."""

    path: Path
    folder: str = "."  # its working directory
    given: Mapping[str, str] = field(default_factory=dict)  # values of --set, which replace the script's own
    variables: dict[str, str] = field(default_factory=dict)
    open: dict[str, Open] = field(default_factory=dict)  # by the names in marks
    fresh: set[str] = field(default_factory=set)  # variables that were set since a file was sourced
    exports: set[str] = field(default_factory=set)
    sourced: list[str] = field(default_factory=list)  # each file, as far as its path is known
    folders: list[str] = field(default_factory=list)  # what it changes its working directory to
    command: list[str] = field(default_factory=list)  # torchrun and its words
    lost: list[tuple[int, str]] = field(
        default_factory=list
    )  # lines that look like arguments of the command and are not
    looked_up: set[str] = field(default_factory=set)  # names of variables and arguments in the script
    expanded: int = 0  # characters so far
    line: int = 0

    def value(self, name: str) -> str:
        """The value of a variable or an argument, a mark if it is open."""
        self.looked_up.add(name)
        if name in self.variables:
            return self.variables[name]
        if name in self.given:
            return self.given[name]
        if name == "PWD":
            return self.folder
        why = f"${name} is known when the script runs" if name.isdigit() else f"${name} is set nowhere in the script"
        return self.mark(name, why, None if name.isdigit() else name)

    def mark(self, name: str, why: str, source: str | None = None, default: str | None = None) -> str:
        """The mark of a value that is open for this reason."""
        self.open[name] = Open(why, self.line, source, default)
        return marked([name])


def marked(names: Iterable[str]) -> str:
    """The mark of a value that depends on these open values."""
    return f"{BEGIN}{','.join(sorted(set(names)))}{END}"


def opened(text: object) -> list[str]:
    """The names of the open values in a text; none in other values."""
    if not isinstance(text, str):
        return []
    return sorted({name for names in _MARK.findall(text) for name in names.split(",")})


def readable(text: str) -> str:
    """The text with `$NAME` for its marks."""
    return _MARK.sub(
        lambda m: " ".join("$(...)" if name.startswith("#") else f"${name}" for name in m[1].split(",")), text
    )


def assigned(script: Script, name: str, value: list[Piece], *, more: bool) -> str:
    """The value that an assignment gives a variable; `more` for `+=`. An open value that has no name of its own is named after it."""
    script.looked_up.add(name)
    if name in script.given:
        return script.given[name]
    try:
        text = "".join(_expanded(script, piece, first=i == 0) for i, piece in enumerate(value))
    except Endless:
        raise
    except Unknown as error:
        return script.mark(name, str(error))
    keys = opened(text)
    if len(keys) == 1 and text == marked(keys) and keys[0] not in script.variables:
        before = script.open[keys[0]]
        text = script.mark(name, before.why, before.source, before.default)
    return script.variables.get(name, "") + text if more else text


def expand_word(script: Script, word: list[Piece]) -> list[str]:
    """The words that a word expands to. Raises Unknown if only a shell could expand it."""
    parts, open_word = [], False  # the last of `parts` may still grow
    for n, piece in enumerate(word):
        text = _expanded(script, piece, first=n == 0)
        if piece.splits and re.search(r"[*?\[]", text):
            raise Unknown(f"`{piece.text[:80]}` is whatever files there are when the script runs")
        split = re.split(r"[ \t\n]+", text) if piece.splits else [text]
        for i, part in enumerate(split):
            if i or not open_word:
                parts.append(part)
            else:
                parts[-1] += part
            open_word = True
    return [p for p in parts if p] if any(piece.splits for piece in word) else parts


def _expanded(script: Script, piece: Piece, *, first: bool) -> str:
    if first and piece.splits and piece.text.startswith("~"):
        user, slash, rest = piece.text[1:].partition("/")
        why = f"`{piece.text[:80]}` is whatever home there is when the script runs"
        if user:
            return _unnamed(script, why)
        home = script.given["HOME"] if "HOME" in script.given else script.mark("HOME", why)
        script.looked_up.add("HOME")
        return home + slash + expand(script, rest)
    return expand(script, piece.text) if piece.expands else piece.text


def _unnamed(script: Script, why: str) -> str:
    return script.mark(f"#{len(script.open)}", why)


def expand(script: Script, text: str, depth: int = 0) -> str:
    """The text with every $... replaced. Raises Unknown if it is too deep or too long."""
    out, at = [], 0
    while (found := re.compile(r"[$`]").search(text, at)) is not None:
        out.append(text[at : found.start()])
        at = end_of(text, found.start())
        out.append(_replaced(script, text[found.start() : at], depth))
        script.expanded += len(out[-1])
        if script.expanded > MAX_EXPANDED:
            raise Endless(f"its values have more than {MAX_EXPANDED} characters")
    return "".join([*out, text[at:]])


def _replaced(script: Script, reference: str, depth: int) -> str:
    if reference == "$":
        return reference
    if depth > MAX_DEPTH:
        raise Unknown(f"{reference[:200]} is nested too deeply")
    if reference.startswith("$(("):
        return _sum(script, reference[3:-2], depth)
    if _OWN.fullmatch(reference):
        return str(script.path)
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        found = _of_paths(script, reference)
        return _unnamed(script, f"{reference[:200]} is known when the script runs") if found is None else found
    name, default = match[1] or match[3], match[2]
    if default is None or script.variables.get(name) or script.given.get(name):
        return script.value(name)
    script.looked_up.add(name)
    if name.isdigit():  # an argument of the script, which its users give
        return script.mark(name, f"{reference[:200]} is known when the script runs", default=default)
    return expand(script, default, depth + 1)


def _of_paths(script: Script, reference: str) -> str | None:
    """What `$(pwd)`, `$(dirname A)`, `$(cd A && pwd)` and the like come to, by their texts alone; None for other references."""
    inner = reference[1:-1] if reference[0] == "`" else reference[2:-1] if reference.startswith("$(") else None
    if inner is None or inner.count("$(") > MAX_DEPTH:
        return None
    try:
        parts = list(statements(inner))
        commands = [[one for word in part.words for one in expand_word(script, word) if one != "--"] for part in parts]
    except Endless:
        raise
    except Unknown:
        return None
    if any(part.before not in ("\n", ";", "&&") for part in parts) or any(
        map(opened, (w for ws in commands for w in ws))
    ):
        return None
    match commands:
        case [["pwd"]]:
            return script.folder
        case [["dirname", path]]:
            return str(PurePosixPath(path).parent)
        case [["basename", path]]:
            return PurePosixPath(path).name
        case [["realpath", path] | ["readlink", "-f", path]] | [["cd", path], ["pwd"] | ["pwd", "-P"]]:
            return os.path.normpath(Path(script.folder) / path)
    return None


def _sum(script: Script, text: str, depth: int) -> str:
    value = lambda m: m[0] if m[0].startswith(BEGIN) else script.value(m[0])
    plain = re.sub(f"{_MARK.pattern}|{NAME}", value, expand(script, text, depth + 1))
    if keys := opened(plain):
        return marked(keys)
    if len(plain) > 200 or not re.fullmatch(r"[\d\s+\-*/%()]+", plain, re.ASCII):
        raise Unknown(f"$(({text})) is not a plain sum")

    def result(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SUMS:
                return _SUMS[type(op)](result(left), result(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -result(operand)
        raise Unknown(f"$(({text})) is not a plain sum")

    try:
        return str(result(ast.parse(plain.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError) as error:
        raise Unknown(f"$(({text})) cannot be computed") from error
