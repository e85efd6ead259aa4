"""The run of `experiments.migrate`, once its settings are known: a guide becomes commands, extracted features become a feature set."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from experiments.migration import guide as migration_guide
from experiments.migration.command_lines import Command, Variable
from experiments.migration.expansion import NAME
from experiments.migration.field_rules import Line
from experiments.migration.guide import Guide
from experiments.migration.shell import quoted
from lumina_fn import prompt
from lumina_fn.disk import files, places
from lumina_fn.errors import InputError, printable
from lumina_fn.features import foreign, shards
from lumina_fn.features.shards import Feature, Origin, Rejected

if TYPE_CHECKING:
    from experiments.migrate import Settings

PROJECT = Path(__file__).parents[2]
_NAMES = re.compile(rf"{NAME}|[1-9][0-9]?")  # of variables and of a script's arguments
REFUSED = 20  # fields that are named in an error
SAID = {
    "note": "note",
    "yourself": "look at this yourself",
    "carried": "known when it runs",
}  # kinds of lines that are also printed, and their words


def main(run: "Settings") -> None:
    """Write OUT from the guide's folder or from extracted features. Raises InputError for other folders."""
    if not run.source.is_dir():
        raise InputError(f"{run.source}: no such folder; expected a MindSpeed-MM checkout or extracted features")
    if foreign.indexes(run.source):
        if run.set:
            raise InputError(f"--set {run.set[0]}: {run.source} holds extracted features, and no scripts")
        _features(run)
    elif run.model is not None or run.size:
        raise InputError(f"{run.source} holds no extracted features, which --model and --size are for")
    else:
        _guide(run)


def _features(run: "Settings") -> None:
    if run.model is None:
        raise InputError(f"{run.source} holds extracted features: name their model's folder with --model")
    tokenizer = prompt.load_tokenizer(run.model)
    origin = Origin(run.size, 0, tokenizer.ids, tokenizer.fingerprint, vq="")
    places.place(run.out, [run.source, run.model])
    left: list[foreign.Left] = []
    with files.new_folder(run.out, shards.KIND, run.overwrite) as folder:
        file_of: dict[int, str] = {}
        done = shards.write_features(folder, _kept(foreign.read(run.source, tokenizer), left, file_of), origin)
        if not done:
            raise InputError(f"{run.source}: none of {len(left)} records could be used; the first: {left[0].reason}")
        _write_manifest(folder, left, file_of)
    twice = sum(item.duplicate for item in left)
    print(
        printable(
            f"{done} features, {len(left) - twice} quarantined, {twice} duplicates of a record left out: {run.out}"
        )
    )


def _kept(
    results: Iterator[tuple[Feature, str] | foreign.Left], left: list[foreign.Left], file_of: dict[int, str]
) -> Iterator[Feature]:
    """The features; records that cannot be used are appended to `left`. Shows progress on a terminal."""
    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        for result in progress.track(results, total=None, description="records"):
            if isinstance(result, foreign.Left):
                left.append(result)
            else:
                feature, file_of[result[0].row] = result
                yield feature


def _write_manifest(folder: Path, left: list[foreign.Left], file_of: dict[int, str]) -> None:
    rejected = [Rejected(item.row, item.file, item.reason) for item in left]
    lines = [r._asdict() for r in rejected]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"row": r.row, "file": r.file, "status": "quarantined", "reason": r.reason} for r in rejected]
    for entry in shards.read_index(folder).entries:
        content = shards.read(folder / entry.file)
        lines += shards.manifest(entry.file, content, file_of, lambda source: None)
    lines.sort(key=lambda line: line["row"])
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _guide(run: "Settings") -> None:
    guide = migration_guide.read(run.source, given(run.set))
    of = lambda kind: [line for line in guide.lines if line.kind == kind]
    if problems := _asked(of("asked"), of("carried")) + _refused(of("refused")):
        ends = [f"note: {line.file}: {line.field}: {line.value:.200}: {line.here}" for line in of("note") if line.field.startswith("line ")]  # fmt: skip
        raise InputError(printable("; ".join([*problems, *ends])))
    script = commands(guide)
    places.place(run.out, [run.source])
    with files.new_folder(run.out, "migration", run.overwrite) as folder:
        (folder / "commands.sh").write_text(script)
        (folder / "report.md").write_text(report(guide))
        record = {"working_directory": guide.root, "fields": [line._asdict() for line in guide.lines], "commands": [c._asdict() for c in guide.commands]}  # fmt: skip
        (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(printable(line) for line in script.splitlines()))
    for line in guide.lines:
        if line.kind in SAID:
            print(printable(f"{SAID[line.kind]}: {line.file}: {line.field} {line.value:.200}: {line.here}"))
    print(printable(f"{len(guide.lines)} fields, each in {run.out / 'report.md'}; the commands above are in {run.out / 'commands.sh'}"))  # fmt: skip


def given(flags: Sequence[str]) -> dict[str, str]:
    """The values of `NAME=VALUE`. Raises InputError for other texts, and for a name that is given twice."""
    found: dict[str, str] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals or not _NAMES.fullmatch(name) or not value.isprintable():
            raise InputError(
                f"--set {flag}: expected a variable or the number of an argument with its value, as in --set NNODES=2"
            )
        if name in found:
            raise InputError(f"--set {name} is given twice: {found[name]} and {value}")
        found[name] = value
    return found


def _asked(lines: list[Line], carried: list[Line]) -> list[str]:
    """What is asked for, each value once; with it what is also open, and needs no answer."""
    if not lines:
        return []
    values = "; ".join(f"{line.file}: {line.field} ({line.value:.200}) decides {line.here}" for line in lines)
    own = {line.value for line in lines}
    others = "".join(
        f"; {line.file}: {line.field} ({line.value:.200}) becomes {line.here}"
        for line in carried
        if line.value not in own
    )
    names = " ".join(dict.fromkeys(f"--set {line.field}=..." for line in lines))
    many = "1 value is" if len(lines) == 1 else f"{len(lines)} values are"
    return [
        f"{many} known only when the scripts run, and would change results: {values}{others}; look at this yourself and write what it "
        f"comes to, or give it: {names}"
    ]


def _refused(lines: list[Line]) -> list[str]:
    if not lines:
        return []
    named = "; ".join(f"{line.file}: {line.field} {line.value:.200}: {line.here}" for line in lines[:REFUSED])
    more = f"; and {len(lines) - REFUSED} more" * (len(lines) > REFUSED)
    return [f"{len(lines)} of its fields would change results: {named}{more}"]


def commands(guide: Guide) -> str:
    """A script of the commands, each after a comment that says what it does. Text of the guide appears in it only as quoted words."""
    lines = [
        "#!/usr/bin/env bash",
        f"# The guide's scripts worked in {printable(guide.root)}: relative paths were found against it.",
        "set -eu",
        quoted(["cd", str(PROJECT)]),
    ]
    for word in guide.set_env:
        lines.append(f"if [ -f {word} ]; then set +u; . {word}; set -u; fi")
    words = [
        word for command in guide.commands if command.active for word in (*command.environment.values(), *command.words)
    ]
    lines += [
        f': "{word}"' for word in dict.fromkeys(word for word in words if isinstance(word, Variable))
    ]  # before hours of work
    for command in guide.commands:
        mark = "" if command.active else "# "
        note = "" if command.active else " (or, instead of the above)"
        lines += ["", f"# {command.what}{note}", mark + shown(command)]
    return "\n".join(lines) + "\n"


def shown(command: Command) -> str:
    """A command as one line of a shell."""
    environment = {name: _word(value) for name, value in command.environment.items()}
    if environment.get("NNODES", "1") != "1" and not isinstance(command.environment["NODE_RANK"], Variable):
        # The other machines run the same script.
        environment["NODE_RANK"] = f'"${{NODE_RANK:-{environment["NODE_RANK"]}}}"'
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), *map(_word, command.words)])


def _word(word: str) -> str:
    return f'"{word}"' if isinstance(word, Variable) else quoted([word])


def report(guide: Guide) -> str:
    """The text of report.md: a table with a row for each field."""
    cell = lambda text: printable(text).replace("|", "\\|") or "-"
    rows = [f"| {cell(line.file)} | `{cell(line.field)}` | {cell(line.value)} | {SAID.get(line.kind, line.kind)} | {cell(line.here)} |" for line in guide.lines]  # fmt: skip
    head = [
        "# What became of the guide's fields", "", f"The scripts' working directory: {printable(guide.root)}", "",
        "| file | field | value | | here |", "|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*head, *rows]) + "\n"
