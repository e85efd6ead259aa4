"""The MindSpeed-MM guide's folder, translated into commands of this project."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import ascend_env
from experiments.migration import command_lines, field_rules, shell
from experiments.migration.command_lines import Command
from experiments.migration.expansion import Script, marked, opened, readable
from experiments.migration.field_rules import Line, refuse
from lumina_fn import sources
from lumina_fn.disk import lookup
from lumina_fn.errors import InputError
from lumina_fn.features import foreign

EXAMPLE = "examples/lumina/mgpt2"
# Prefixes of variables that libraries also read here.
_KEPT = ("ASCEND_", "HCCL_", "GLOO_", "ACL", "NPU_", "TORCH_", "PYTORCH_", "OMP_", "TOKENIZERS_", "HF_")
_PLAIN = re.compile("[A-Za-z0-9_.,:;=^+-]*")  # excludes the path of a file, which the variable's reader might run
# Where CANN's installers put its set_env.sh: for root, and for the user who runs commands.sh.
_CANN = re.compile(r"(/usr/local|~|\$HOME|\$\{HOME\})(/Ascend/(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*set_env\.sh)")
_VARIABLES = {  # set by the guide's users; its scripts make these flags of them
    "NPUS_PER_NODE": "--nproc-per-node", "NNODES": "--nnodes", "NODE_RANK": "--node-rank", "MASTER_ADDR": "--master-addr",
    "MASTER_PORT": "--master-port", "LOAD_PATH": "--load", "SAVE_PATH": "--save",
}  # fmt: skip
_NEEDLESS = {"CUDA_DEVICE_MAX_CONNECTIONS": "Megatron's own check", "NON_MEGATRON": "there is no Megatron"}


class Guide(NamedTuple):
    """The result of reading the guide's folder."""

    root: str  # the working directories of its scripts
    lines: list[Line]
    commands: list[Command]  # none where a line is refused
    set_env: list[str]  # paths of CANN's own set_env.sh in its usual places, as words of a shell


class _Part(NamedTuple):
    """A script and the flags it gives."""

    name: str
    folder: Path  # its working directory
    script: Script
    launch: dict[str, Any]
    program: str
    flags: dict[str, Any]


def read(folder: Path, given: Mapping[str, str] | None = None) -> Guide:
    """The commands and a line for each field. Raises InputError for a folder that is not the guide's.

    `given` are values that the scripts know only when they run.
    """
    root, base = _places(folder)
    lines: list[Line] = []
    paths = (base / "feature_extract/feature_extraction.sh", base / "pretrain.sh")
    extract, train = parts = [_part(root, path, given or {}, lines) for path in paths]
    for name in given or {}:
        if not any(name in part.script.looked_up for part in parts):
            raise InputError(f"--set {name}: no variable or argument {name} is in the guide's scripts")
    _check_program(extract, "get_lumina_feature.py", lines)
    _check_program(train, "pretrain_lumina.py", lines)
    files = [
        (extract, "--mm-data", "feature_extract/data.json", field_rules.DATA),
        (extract, "--mm-model", "feature_extract/model.json", field_rules.AE),
        (extract, "--mm-tool", command_lines.TOOLS, field_rules.TOOLS),
        (train, "--mm-data", "feature_data.json", field_rules.FEATURE_DATA),
        (train, "--mm-model", "model.json", field_rules.MODEL),
    ]
    tables = [(name, rules, _json(root, base, part, flag, name)) for part, flag, name, rules in files]
    sizes = _sizes(train)
    found: dict[str, dict[str, Any]] = {}
    for name, rules, values in tables:
        judged, found[name] = field_rules.judge(name, rules, values, sizes)
        lines += judged
    for part, rules in ((extract, field_rules.EXTRACT_FLAGS), (train, field_rules.TRAIN_FLAGS)):
        for kind, table, values in (("launch", field_rules.LAUNCH, part.launch), ("flags", rules, part.flags)):
            judged, found[f"{part.name} {kind}"] = field_rules.judge(part.name, table, values, {}, script=True)
            for line in judged:
                if line.kind == "asked":
                    _ask(part, values[line.field], line.field, lines)
                elif kind == "launch" and (names := opened(value := values.get(line.field))):
                    whole = part.script.open[names[0]] if value == marked(names[:1]) else None
                    found[f"{part.name} launch"][line.field] = command_lines.carried(line.field, whole)
                    lines.append(line._replace(kind="carried", value=_why(part, value)))
                else:
                    lines.append(line)
    if "--global-batch-size" not in train.flags:  # then it is theirs: a micro batch for each device
        for flag in ("--nproc-per-node", "--nnodes"):
            _ask(train, train.launch.get(flag, ""), "the batch, a micro batch for each device", lines)
    set_env = sorted({word for part in parts for word in _set_env(part, lines)})
    environments = [_environment(part, lines) for part in parts]
    commands: list[Command] = []
    try:
        if not any(line.kind == "asked" for line in lines):
            folders = (extract.folder, train.folder)
            commands = command_lines.make(folders, found, environments, lines)
    except KeyError as error:
        if not any(line.field == error.args[0] for line in lines):
            refuse(lines, "the guide's files", str(error.args[0]), "", "is missing; give it")
    except (ValueError, TypeError, OverflowError) as error:
        refuse(lines, "the guide's files", str(error), "", "not a usable value")
    if any(line.kind == "refused" for line in lines):
        commands = []
    return Guide(" and ".join(dict.fromkeys(str(part.folder) for part in parts)), lines, commands, set_env)


def _places(folder: Path) -> tuple[Path, Path]:
    """The working directory of the guide's scripts, and the folder that has pretrain.sh."""
    root = Path(os.path.realpath(folder))
    if not str(root).isprintable():
        raise InputError(f"{folder}: its name has control characters, which commands.sh cannot name; rename it")
    if root.as_posix().endswith("/" + EXAMPLE):
        root = root.parents[2]
    for base in (root / EXAMPLE, root):
        if (base / "pretrain.sh").is_file():
            return root, base
    raise InputError(
        f"{folder} holds neither the guide's files ({EXAMPLE}/pretrain.sh or pretrain.sh) nor extracted features "
        f"({', '.join(foreign.INDEXES)}); give a MindSpeed-MM checkout or a folder of features"
    )


def _part(root: Path, path: Path, given: Mapping[str, str], lines: list[Line]) -> _Part:
    path = lookup.find(os.path.relpath(path, root), [root])
    script = shell.read(path, str(root), given)
    part = _Part(path.name, root if opened(script.folder) else Path(script.folder), script, {}, "", {})
    for word in script.folders:
        lines.append(
            Line(part.name, "cd", readable(word), "mapped", "relative paths of this script are found from there")
        )
    _ask(part, script.folder, "the folder from which relative paths are found", lines)
    if script.lost:
        more = f" (and {len(script.lost) - 1} lines more)" * (len(script.lost) > 1)
        why = "no part of the command for a shell: a comment among its arguments, or a line without \\ at its end, has ended it before"
        lines.append(Line(part.name, f"line {script.lost[0][0]}", script.lost[0][1], "note", why + more))
    at = 0
    while at < len(script.command) and script.command[at].startswith("-"):
        flag, equals, value = script.command[at].partition("=")
        if not equals:
            at += 1
            value = script.command[at] if at < len(script.command) else ""
        part.launch[flag.replace("_", "-")] = value
        at += 1
    if opened("".join(script.command[at : at + 1])):
        _ask(part, script.command[at], "words after torchrun", lines)
        at += 1
    program, words = "".join(script.command[at : at + 1]), script.command[at + 1 :]
    open_flag = None  # the flag before, if it has no value yet
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            part.flags[flag] = value
            open_flag = None if equals or field_rules.SWITCHES.fullmatch(flag) else flag
        elif word.lstrip().startswith("#"):
            why = "begins no comment inside quotes: the shell gives it, and what follows it, to the program; remove the whole line"
            refuse(lines, part.name, word, "", why)
        elif open_flag is not None:
            part.flags[open_flag] = word
            open_flag = None
        elif opened(word):
            _ask(part, word, "words of the program", lines)
        else:
            refuse(lines, part.name, word, "", "a word that belongs to no flag")
    return part._replace(program=program)


def _why(part: _Part, text: str) -> str:
    """Why a text is open."""
    return "; ".join(f"line {part.script.open[name].line}: {part.script.open[name].why}" for name in opened(text))


def _ask(part: _Part, text: str, what: str, lines: list[Line]) -> None:
    """Append a line for each open value that a text depends on; `what` is what it decides."""
    for name in opened(text):
        why = _why(part, marked([name]))
        if name.startswith("#"):
            refuse(lines, part.name, what, why, "look at this yourself and write what it comes to")
        elif (
            before := next(
                (i for i, one in enumerate(lines) if one[:2] == (part.name, name) and one.kind == "asked"), None
            )
        ) is None:
            lines.append(Line(part.name, name, why, "asked", what))
        elif what not in lines[before].here:
            lines[before] = lines[before]._replace(here=f"{lines[before].here}, {what}")


def _check_program(part: _Part, name: str, lines: list[Line]) -> None:
    if Path(part.program).name != name:
        refuse(lines, part.name, "program", part.program, f"expected {name}")


def _json(root: Path, base: Path, part: _Part, flag: str, name: str) -> dict[str, Any]:
    """The fields of the JSON file that the script names, found from its folder, or else of the file in its usual place; none if it is
    tools.json and nowhere: copies of the example come without it."""
    given = part.flags.get(flag, "")
    there = given if part.folder == root else os.path.relpath(part.folder / given, root)
    candidates = [there] if given and not opened(given) else []
    usual = [base / name, root / name, root / Path(name).name] if name.endswith("tools.json") else [base / name]
    candidates += [os.path.relpath(path, root) for path in usual if path.is_file()]
    problem = InputError(f"{part.script.path} gives no {flag}")
    for candidate in candidates:
        try:
            return dict(field_rules.flat(sources.read_json(lookup.find(candidate, [root]))))
        except InputError as error:
            problem = InputError(f"{name}, as {part.name}'s {flag} {candidate}: {error}")
            if root.joinpath(candidate).exists():
                raise problem from error
    if name == command_lines.TOOLS:
        return {}
    raise problem


def _sizes(train: _Part) -> Mapping[str, Any]:
    """The content of config.json in the folder of the weights; empty if there is none."""
    load = train.flags.get("--load")
    if load is None or opened(load):
        return {}
    config = train.folder / load / "config.json"
    return sources.read_json(config) if config.exists() else {}


def _set_env(part: _Part, lines: list[Line]) -> list[str]:
    """CANN's own set_env.sh as words of a shell. Other sourced files are left to the user, since sourcing runs them."""
    words = []
    for path in dict.fromkeys(part.script.sourced):
        if match := _CANN.fullmatch(path):
            words.append((match[1] if match[1].startswith("/") else '"${HOME-}"') + match[2])
            lines.append(Line(part.name, "source", path, "mapped", "sourced where it is there"))
        elif not path.endswith("set_env.sh") and shell.ACTIVATES.fullmatch(path):
            why = "activate the environment that this project is installed in before you run commands.sh"
            lines.append(Line(part.name, "source", path, "yourself", why))
        else:
            why = "no set_env.sh where CANN is installed (/usr/local/Ascend, ~/Ascend): what it sets is not in the commands, see that they are right without; where you need and trust it, source it before you run commands.sh"
            lines.append(Line(part.name, "source", path, "yourself", why))
    return words


def _environment(part: _Part, lines: list[Line]) -> dict[str, str]:
    """The exported variables that have the same effect here; appends a line for every variable."""
    kept, variables = {}, {v.name for v in ascend_env.TABLE}
    for name, value in part.script.variables.items():
        if (names := opened(value)) and name not in part.script.exports | _VARIABLES.keys():
            why = part.script.open[names[0]].why
            lines.append(Line(part.name, name, "", "not needed", f"{why}; no result depends on it"))
    for name in sorted(_VARIABLES.keys() & part.script.variables.keys()):
        value = part.script.variables[name]
        lines.append(Line(part.name, name, readable(value), "mapped", f"through its {_VARIABLES[name]}"))
    for name in sorted(part.script.exports - _VARIABLES.keys()):
        if name in _NEEDLESS:
            value = part.script.variables.get(name, "")
            lines.append(Line(part.name, name, readable(value), "not needed", _NEEDLESS[name]))
            continue
        value = part.script.value(name)
        if names := opened(value):
            error = part.script.open[names[0]].why
            if name in part.script.variables and (name in variables or name.startswith(_KEPT)):
                why = f"{error}: export what it comes to before you run commands.sh"
                lines.append(Line(part.name, name, "", "yourself", why))
            else:
                refuse(lines, part.name, name, "", f"{error}; look at this yourself and write what it comes to")
            continue
        if not value.isprintable():
            refuse(lines, part.name, name, value, "has control characters")
        elif problem := ascend_env.problems({name: value}):
            refuse(lines, part.name, name, value, problem[0])
        elif name == "ASCEND_ENV" or (
            name.startswith(_KEPT) and not _PLAIN.fullmatch(value)
        ):  # ASCEND_ENV names a file that is sourced
            why = "its value may name what is run: where you trust it, export it before you run commands.sh"
            lines.append(Line(part.name, name, value, "yourself", why))
        elif name in variables or name.startswith(_KEPT):
            kept[name] = value
            lines.append(Line(part.name, name, value, "mapped", "the same variable"))
        else:
            refuse(
                lines, part.name, name, value, "an export that is not known here: set it yourself, and remove the line"
            )
    return kept
