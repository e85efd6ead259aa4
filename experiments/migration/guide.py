"""The MindSpeed-MM guide's folder, translated into commands of this project."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import ascend_env
from experiments.migration import command_lines, field_rules, shell
from experiments.migration.command_lines import Command
from experiments.migration.field_rules import Line, refuse
from experiments.migration.shell import Script
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

    root: Path  # the working directory of its scripts
    lines: list[Line]
    commands: list[Command]  # none where a line is refused
    set_env: list[str]  # paths of CANN's own set_env.sh in its usual places, as words of a shell


class _Part(NamedTuple):
    """A script and the flags it gives."""

    name: str
    script: Script
    launch: dict[str, Any]
    program: str
    flags: dict[str, Any]


def read(folder: Path) -> Guide:
    """The commands and a line for each field. Raises InputError for a folder that is not the guide's."""
    root, base = _places(folder)
    extraction = base / "feature_extract/feature_extraction.sh"
    lines: list[Line] = []
    parts = [_part(root, path, lines) for path in (extraction, base / "pretrain.sh")]
    extract, train = parts
    _check_program(extract, "get_lumina_feature.py", lines)
    _check_program(train, "pretrain_lumina.py", lines)
    files = [
        (extract, "--mm-data", "feature_extract/data.json", field_rules.DATA),
        (extract, "--mm-model", "feature_extract/model.json", field_rules.AE),
        (extract, "--mm-tool", "mindspeed_mm/tools/tools.json", field_rules.TOOLS),
        (train, "--mm-data", "feature_data.json", field_rules.FEATURE_DATA),
        (train, "--mm-model", "model.json", field_rules.MODEL),
    ]
    tables = [(name, rules, _json(root, base, part, flag, name)) for part, flag, name, rules in files]
    sizes = _sizes(root, train)
    found: dict[str, dict[str, Any]] = {}
    for name, rules, values in tables:
        judged, found[name] = field_rules.judge(name, rules, values, sizes)
        lines += judged
    for part, rules in ((extract, field_rules.EXTRACT_FLAGS), (train, field_rules.TRAIN_FLAGS)):
        for kind, table, values in (("launch", field_rules.LAUNCH, part.launch), ("flags", rules, part.flags)):
            judged, found[f"{part.name} {kind}"] = field_rules.judge(part.name, table, values, {})
            lines += judged
    set_env = sorted({word for part in parts for word in _set_env(part, lines)})
    environments = [_environment(part, lines) for part in parts]
    commands: list[Command] = []
    try:
        commands = command_lines.make(root, found, environments, lines)
    except KeyError as error:
        if not any(line.field == error.args[0] for line in lines):
            refuse(lines, "the guide's files", str(error.args[0]), "", "is missing; give it")
    except (ValueError, TypeError, OverflowError) as error:
        refuse(lines, "the guide's files", str(error), "", "not a usable value")
    if any(line.kind == "refused" for line in lines):
        commands = []
    return Guide(root, lines, commands, set_env)


def _places(folder: Path) -> tuple[Path, Path]:
    """The working directory of the guide's scripts, and the folder that has pretrain.sh."""
    root = Path(os.path.realpath(folder))
    if not str(root).isprintable():
        raise InputError(f"{folder}: its name has control characters, which commands.sh cannot name; rename it")
    if root.as_posix().endswith(EXAMPLE) and (root.parents[2] / "mindspeed_mm").is_dir():
        root = root.parents[2]
    for base in (root / EXAMPLE, root):
        if (base / "pretrain.sh").is_file():
            return root, base
    raise InputError(
        f"{folder} holds neither the guide's files ({EXAMPLE}/pretrain.sh or pretrain.sh) nor extracted features "
        f"({', '.join(foreign.INDEXES)}); give a MindSpeed-MM checkout or a folder of features"
    )


def _part(root: Path, path: Path, lines: list[Line]) -> _Part:
    path = lookup.find(os.path.relpath(path, root), [root])
    script = shell.read(path)
    launch, at = {}, 0
    while at < len(script.command) and script.command[at].startswith("-"):
        flag, equals, value = script.command[at].partition("=")
        if not equals:
            at += 1
            value = script.command[at] if at < len(script.command) else ""
        launch[flag.replace("_", "-")] = value
        at += 1
    program, words = "".join(script.command[at : at + 1]), script.command[at + 1 :]
    flags: dict[str, Any] = {}
    open_flag = None  # the flag before, if it has no value yet
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags[flag] = value
            open_flag = None if equals else flag
        elif open_flag is not None:
            flags[open_flag] = word
            open_flag = None
        else:
            refuse(lines, path.name, word, "", "a word that belongs to no flag")
    return _Part(path.name, script, launch, program, flags)


def _check_program(part: _Part, name: str, lines: list[Line]) -> None:
    if Path(part.program).name != name:
        refuse(lines, part.name, "program", part.program, f"expected {name}")


def _json(root: Path, base: Path, part: _Part, flag: str, name: str) -> dict[str, Any]:
    """The fields of the JSON file that the script names, found from the guide's root, or else of the file in its usual place."""
    given = part.flags.get(flag)
    candidates = [str(given)] if isinstance(given, str) else []
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
    raise problem


def _sizes(root: Path, train: _Part) -> Mapping[str, Any]:
    """The content of config.json in the folder of the weights; empty if there is none."""
    load = train.flags.get("--load")
    config = root / load / "config.json" if isinstance(load, str) else root / "config.json"
    return sources.read_json(config) if isinstance(load, str) and config.exists() else {}


def _set_env(part: _Part, lines: list[Line]) -> list[str]:
    """CANN's own set_env.sh as words of a shell. Other sourced files are left to the user, since sourcing runs them."""
    words = []
    for path in dict.fromkeys(part.script.sourced):
        if match := _CANN.fullmatch(path):
            words.append((match[1] if match[1].startswith("/") else '"${HOME-}"') + match[2])
            lines.append(Line(part.name, "source", path, "mapped", "sourced where it is there"))
        else:
            why = "no set_env.sh where CANN is installed (/usr/local/Ascend, ~/Ascend): what it sets is not in the commands, see that they are right without; where you need and trust it, source it before you run commands.sh"
            lines.append(Line(part.name, "source", path, "yourself", why))
    return words


def _environment(part: _Part, lines: list[Line]) -> dict[str, str]:
    """The exported variables that have the same effect here; appends a line for every variable."""
    kept, variables = {}, {v.name for v in ascend_env.TABLE}
    for name, value in part.script.variables.items():
        if isinstance(value, shell.Unknown) and name not in part.script.exports:
            lines.append(Line(part.name, name, "", "not needed", f"{value}; nothing here depends on it"))
    for name in sorted(_VARIABLES.keys() & part.script.variables.keys()):
        value = part.script.variables[name]
        lines.append(Line(part.name, name, str(value), "mapped", f"through its {_VARIABLES[name]}"))
    for name in sorted(part.script.exports - _VARIABLES.keys()):
        if name in _NEEDLESS:
            value = part.script.variables.get(name, "")
            lines.append(Line(part.name, name, str(value), "not needed", _NEEDLESS[name]))
            continue
        try:
            value = part.script.value(name)
        except shell.Unknown as error:
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
