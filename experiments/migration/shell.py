"""A launch script of the MindSpeed-MM guide, read without a shell: its variables, its exports and the one command that it starts.

Assignments and words are expanded as by a shell ($A, ${A}, ${A:-b}, $((A*B))). A value that is not known before the script runs, such
as $(date) or $1, stays open, and matters only if the command needs it; if, for and arrays, which decide what is run, are always errors.
Sourced files are not read: the values of variables that were set before are open after.
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from experiments.migration.expansion import BEGIN, END, NAME, Script, assigned, expand_word, opened, readable
from experiments.migration.words import Piece, Statement, Unknown, flat, statements
from lumina_fn.disk import reading
from lumina_fn.errors import InputError

MAX_SCRIPT = 1 << 20  # bytes
MAX_SOURCED = 100  # files
# Commands that change no variable and start no training.
HARMLESS = frozenset(
    ("mkdir", "chmod", "chown", "find", "echo", "printf", "tee", "set", "ulimit", "sleep", "date", "ls", "rm", "test", "[", "[[", "wait", "true", ":", "conda", "npu-smi")
)  # fmt: skip
# Sourced files that set none of the guide's variables: CANN's own, and those that activate an environment of Python's.
ACTIVATES = re.compile(r"(.*/)?(activate|conda\.sh)|.*set_env\.sh", re.DOTALL)
# After one of these `&&` goes on: it works, where the script does.
_WORKS = frozenset(("cd", "export", "source", ".", "set", "conda", "mkdir", "eval"))
_ASSIGNMENT = re.compile(rf"({NAME})(\+?)=")
_HOOK = re.compile(r"\$\(([^\s()]*/)?conda (shell\.(bash|posix) hook|'shell\.(bash|posix)' 'hook'( 2> ?/dev/null)?)\)")


def read(path: Path, folder: str = ".", given: Mapping[str, str] | None = None) -> Script:
    """The script's variables and command. Raises InputError naming the line that cannot be understood.

    folder  the working directory that the script is started in
    given   values of variables and arguments that replace those in the script
    """
    text = reading.text(path, MAX_SCRIPT, "the guide's script")
    if BEGIN in text or END in text:
        raise InputError(f"{path} holds characters for private use (U+E000, U+E001), which no script of the guide has")
    script, previous = Script(path, folder, given or {}), ""
    try:
        for statement in statements(text):
            script.line = statement.line
            first = flat(statement.words[0])
            if first == "exit" and statement.before in ("\n", ";"):
                break
            _follow(script, statement, previous)
            previous = first
    except Unknown as error:
        raise InputError(
            f"{path}, line {script.line}: {error}; look at this yourself and write what it comes to"
        ) from error
    if not script.command:
        raise InputError(f"{path} starts no torchrun; expected the guide's script")
    return script


def _follow(script: Script, statement: Statement, previous: str = "") -> None:
    """Do what a simple command does to the script's variables; `previous` is the first word of the one before it."""
    words = statement.words
    first = flat(words[0])
    if statement.before == "|" and first in HARMLESS | {"grep", "awk", "head", "tail", "cat"}:
        return
    if statement.before == "||" and first == "exit":  # what is before it works, where the script goes on
        return
    prefix = 0
    while prefix < len(words) and _ASSIGNMENT.match(flat(words[prefix])):
        prefix += 1
    if prefix or first in ("export", "torchrun", "cd") or first.startswith("python"):
        if statement.before in ("||", "|", "&") or (statement.before == "&&" and previous not in _WORKS):
            raise Unknown(f"`{first}` after `{statement.before}` depends on what ran before")
        if first == "export":
            for word in words[1:]:
                _export(script, word)
            return
        if first == "cd":
            _change_folder(script, words[1:])
            return
        for word in words[:prefix]:
            name = _assign(script, word)
            if prefix < len(words):
                script.exports.add(name)
        if prefix < len(words):
            _start(script, words[prefix:])
    elif first in ("source", ".") and len(words) > 1:
        _source(script, _known(script, words[1]))
    elif script.command and first.startswith("-") and statement.before == "\n":
        script.lost.append((statement.line, " ".join(map(flat, words))))
    elif first not in HARMLESS and not (first == "eval" and len(words) == 2 and _HOOK.fullmatch(flat(words[1]))):
        raise Unknown(f"`{first}` is not read")


def _source(script: Script, path: str) -> None:
    script.sourced.append(path)
    if len(script.sourced) > MAX_SOURCED:
        raise Unknown(f"more than {MAX_SOURCED} files are sourced")
    if script.command or ACTIVATES.fullmatch(path):
        return
    for name in script.fresh - script.given.keys():
        script.variables[name] = script.mark(name, f"${name} may be set by {path[:200]}, which is sourced and not read")
    script.fresh.clear()


def _known(script: Script, word: list[Piece]) -> str:
    """The path that a word expands to; the word as written if only a shell could expand it."""
    try:
        [path] = expand_word(script, word)
    except ValueError:  # or it expands to several words
        return flat(word)
    return flat(word) if opened(path) else path


def _change_folder(script: Script, words: list[list[Piece]]) -> None:
    if script.command:
        return
    found = [part for word in words for part in expand_word(script, word) if part not in ("--", "-P", "-L")]
    if len(found) != 1 or found[0] == "-":
        raise Unknown("`cd` without one folder's name is not read")
    if not readable(found[0]).isprintable():
        raise Unknown("`cd` to a name with control characters, which commands.sh cannot name")
    script.folder = os.path.normpath(Path(script.folder) / found[0])
    script.folders.append(found[0])
    if not opened(script.folder) and not Path(found[0]).is_absolute() and not Path(script.folder).is_dir():
        raise Unknown(f"`cd` to {found[0][:200]}, which is not there")


def _start(script: Script, words: list[list[Piece]]) -> None:
    found = [part for word in words for part in expand_word(script, word)]
    if found[:1] != ["torchrun"] and found[1:3] not in (
        ["-m", "torch.distributed.run"],
        ["-m", "torch.distributed.launch"],
    ):
        raise Unknown(f"`{readable(' '.join(found[:3]))}` is not torchrun")
    if script.command:
        raise Unknown("a second torchrun")
    script.command = found[1:] if found[0] == "torchrun" else found[3:]


def _export(script: Script, word: list[Piece]) -> None:
    script.exports.add(_assign(script, word) if _ASSIGNMENT.match(flat(word)) else flat(word))


def _assign(script: Script, word: list[Piece]) -> str:
    match = _ASSIGNMENT.match(flat(word))
    value = [word[0]._replace(text=word[0].text[match.end() :]), *word[1:]]
    script.variables[match[1]] = assigned(script, match[1], value, more=bool(match[2]))
    script.fresh.add(match[1])
    return match[1]


def quoted(words: list[str]) -> str:
    """The words, quoted, as one line of a shell."""
    return " ".join(shlex.quote(word) for word in words)
