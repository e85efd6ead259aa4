"""A launch script of the MindSpeed-MM guide, read without a shell: its variables, its exports and the one command that it starts.

Assignments and words are expanded as by a shell ($A, ${A}, ${A:-b}, $((A*B))). A value that is not known before the script runs, such
as $(date), is an error only if the command needs it; if, for, cd and arrays, which decide what is run, are always errors. Sourced
files are not read: the values of variables that were set before are not known after.
"""

import ast
import operator
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from experiments.migration.words import Piece, Statement, Unknown, end_of, flat, statements
from lumina_fn.disk import reading
from lumina_fn.errors import InputError

MAX_SCRIPT = 1 << 20  # bytes
MAX_EXPANDED = 1 << 22  # characters of all values together, which could grow without bound by references to references
MAX_SOURCED = 100  # files
MAX_DEPTH = 8  # of ${A:-${B:-...}}
# Commands that change no variable and start no training.
HARMLESS = frozenset(
    ("mkdir", "chmod", "chown", "find", "echo", "printf", "tee", "set", "ulimit", "sleep", "date", "ls", "rm", "test", "[", "[[", "wait", "true", "conda", "npu-smi")
)  # fmt: skip
_NAME = "[A-Za-z_][A-Za-z0-9_]*"  # ASCII only: for a shell `HCCL_É=1` is a command
_ASSIGNMENT = re.compile(rf"({_NAME})(\+?)=")
_REFERENCE = re.compile(rf"\$\{{({_NAME})(?::?[-=](.*))?\}}|\$({_NAME})", re.DOTALL)
_SUMS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b), ast.Mod: lambda a, b: a - b * int(a / b),
}  # fmt: skip


@dataclass
class Script:
    """A launch script: its variables, its exports and its command."""

    path: Path
    variables: dict[str, str | Unknown] = field(default_factory=dict)
    exports: set[str] = field(default_factory=set)
    sourced: list[str] = field(default_factory=list)  # each file, as far as its path is known
    command: list[str] = field(default_factory=list)  # torchrun and its words
    expanded: int = 0  # characters so far

    def value(self, name: str) -> str:
        """The value of a variable. Raises Unknown if it is not known."""
        value = self.variables.get(name)
        if value is None:
            raise Unknown(f"${name} is set nowhere in the script")
        if isinstance(value, Unknown):
            raise value
        return value


def read(path: Path) -> Script:
    """The script's variables and command. Raises InputError naming the line that cannot be understood."""
    text = reading.text(path, MAX_SCRIPT, "the guide's script")
    script, line = Script(path), 0
    try:
        for statement in statements(text):
            line = statement.line
            _follow(script, statement)
    except Unknown as error:
        raise InputError(f"{path}, line {line}: {error}; look at this yourself and write what it comes to") from error
    if not script.command:
        raise InputError(f"{path} starts no torchrun; expected the guide's script")
    return script


def _follow(script: Script, statement: Statement) -> None:
    words = statement.words
    first = flat(words[0])
    if statement.before == "|" and first in HARMLESS | {"grep", "awk", "head", "tail", "cat"}:
        return
    prefix = 0
    while prefix < len(words) and _ASSIGNMENT.match(flat(words[prefix])):
        prefix += 1
    if prefix or first == "export" or first == "torchrun" or first.startswith("python"):
        if statement.before in ("&&", "||", "|", "&"):
            raise Unknown(f"`{first}` after `{statement.before}` depends on what ran before")
        if first == "export":
            for word in words[1:]:
                _export(script, word)
            return
        for word in words[:prefix]:
            name = _assign(script, word)
            if prefix < len(words):
                script.exports.add(name)
        if prefix < len(words):
            _start(script, words[prefix:])
    elif first in ("source", ".") and len(words) > 1:
        _source(script, _known(script, words[1]))
    elif first not in HARMLESS:
        raise Unknown(f"`{first}` is not read")


def _source(script: Script, path: str) -> None:
    script.sourced.append(path)
    if len(script.sourced) > MAX_SOURCED:
        raise Unknown(f"more than {MAX_SOURCED} files are sourced")
    if script.command or path.endswith("set_env.sh"):  # CANN's script sets none of the guide's variables
        return
    for name, value in script.variables.items():
        if isinstance(value, str):
            script.variables[name] = Unknown(f"${name} may be set by {path[:200]}, which is sourced and not read")


def _known(script: Script, word: list[Piece]) -> str:
    """The path that a word expands to; the word as written if only a shell could expand it."""
    try:
        [path] = expand_word(script, word)
    except ValueError:  # or it expands to several words
        return flat(word)
    return path


def _start(script: Script, words: list[list[Piece]]) -> None:
    found = [part for word in words for part in expand_word(script, word)]
    if found[:1] != ["torchrun"] and found[1:3] not in (
        ["-m", "torch.distributed.run"],
        ["-m", "torch.distributed.launch"],
    ):
        raise Unknown(f"`{' '.join(found[:3])}` is not torchrun")
    if script.command:
        raise Unknown("a second torchrun")
    script.command = found[1:] if found[0] == "torchrun" else found[3:]


def _export(script: Script, word: list[Piece]) -> None:
    script.exports.add(_assign(script, word) if _ASSIGNMENT.match(flat(word)) else flat(word))


def _assign(script: Script, word: list[Piece]) -> str:
    match = _ASSIGNMENT.match(flat(word))
    value = [word[0]._replace(text=word[0].text[match.end() :]), *word[1:]]
    try:
        if value[0].splits and value[0].text.startswith("~"):
            raise Unknown(f"`{value[0].text[:80]}` is whatever home there is when the script runs")
        text = "".join(_expanded(script, piece) for piece in value)
        script.variables[match[1]] = (script.value(match[1]) if match[2] else "") + text
    except Unknown as error:
        script.variables[match[1]] = error
    return match[1]


def expand_word(script: Script, word: list[Piece]) -> list[str]:
    """The words that a word expands to. Raises Unknown if only a shell could expand it."""
    parts, open_word = [], False  # the last of `parts` may still grow
    for piece in word:
        text = _expanded(script, piece)
        if piece.splits and (re.search(r"[*?\[]", text) or piece.text.startswith("~")):
            raise Unknown(f"`{piece.text[:80]}` is whatever files or home there are when the script runs")
        split = re.split(r"[ \t\n]+", text) if piece.splits else [text]
        for i, part in enumerate(split):
            if i or not open_word:
                parts.append(part)
            else:
                parts[-1] += part
            open_word = True
    return [p for p in parts if p] if any(piece.splits for piece in word) else parts


def _expanded(script: Script, piece: Piece) -> str:
    return expand(script, piece.text) if piece.expands else piece.text


def expand(script: Script, text: str, depth: int = 0) -> str:
    """The text with every $... replaced. Raises Unknown if only a shell could replace one."""
    out, at = [], 0
    while (found := re.compile(r"[$`]").search(text, at)) is not None:
        out.append(text[at : found.start()])
        at = end_of(text, found.start())
        out.append(_replaced(script, text[found.start() : at], depth))
        script.expanded += len(out[-1])
        if script.expanded > MAX_EXPANDED:
            raise Unknown(f"its values have more than {MAX_EXPANDED} characters")
    return "".join([*out, text[at:]])


def _replaced(script: Script, reference: str, depth: int) -> str:
    if reference == "$":
        return reference
    if reference.startswith("$(("):
        return str(_sum(script, reference[3:-2], depth))
    match = _REFERENCE.fullmatch(reference)
    if match is None or depth > MAX_DEPTH:
        raise Unknown(f"{reference[:200]} is known when the script runs")
    name = match[1] or match[3]
    if match[2] is not None and not script.variables.get(name):
        return expand(script, match[2], depth + 1)
    return script.value(name)


def _sum(script: Script, text: str, depth: int) -> int:
    plain = re.sub(_NAME, lambda m: script.value(m[0]), expand(script, text, depth + 1))
    if len(plain) > 200 or not re.fullmatch(r"[\d\s+\-*/%()]+", plain, re.ASCII):
        raise Unknown(f"$(({text})) is not a plain sum")

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SUMS:
                return _SUMS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise Unknown(f"$(({text})) is not a plain sum")

    try:
        return value(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError) as error:
        raise Unknown(f"$(({text})) cannot be computed") from error


def quoted(words: list[str]) -> str:
    """The words, quoted, as one line of a shell."""
    return " ".join(shlex.quote(word) for word in words)
