"""Pages that `make docs` makes: the start from README.md, every command's flags from its settings, the public functions from docstrings."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.structure.files import File, Files

from experiments.__main__ import COMMANDS
from lumina_fn.process import flags

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<to>(?!https?:|#|mailto:)[^)#\s]+)(?P<anchor>#[^)]*)?\)")
# Settings that are not in the command's own module.
SETTINGS = {"experiments.demo": "experiments.demo.__main__", "experiments.finetune": "experiments.finetuning.settings"}
API = {
    "The public contract": ("model", "vq", "train", "sample", "data", "prompt", "images", "vocab", "checkpoint"),
    "Around it": (
        "config",
        "loss",
        "gradients",
        "gradient_noise",
        "optim",
        "sharding",
        "transform",
        "decode",
        "errors",
    ),
    "Programs": ("programs.graphs", "programs.folder"),
    "Rows of a dataset": (
        "rows.opened",
        "rows.row",
        "rows.lists",
        "rows.tables",
        "rows.folders",
        "rows.tars",
        "rows.parquet",
    ),
    "Training data": ("features.shards", "features.mixing", "features.packing", "features.batches"),
    "Checkpoints": ("state.saved_state", "state.manifest"),
    "Costs": ("costs.cost", "costs.footprint"),
}


def on_files(files: Files, config) -> Files:
    made = {"index.md": start(), "reference/commands.md": commands(), "reference/api.md": api()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links out of docs/ name the file in the project: a site has no project around it."""
    here = PurePosixPath("docs", page.file.src_uri).parent

    def link(found: re.Match) -> str:
        path = normpath(str(here / found["to"]))
        if path.startswith("docs/") or found["text"].startswith("!"):
            return found[0]
        return f"{found['text'][1:-1]} (`{path}`)"

    return LINK.sub(link, markdown)


def start() -> str:
    """README.md, seen from inside of docs/."""
    into = lambda found: f"{found['text']}({re.sub('^docs/', '', found['to'])}{found['anchor'] or ''})"
    outside = lambda found: into(found) if found["to"].startswith("docs/") else f"{found['text']}(../{found['to']})"
    return LINK.sub(outside, (ROOT / "README.md").read_text())


def commands() -> str:
    lines = [
        "# Commands",
        "",
        "Every flag with its default, made from the commands' settings. `lumina COMMAND --help` prints the same.",
    ]
    for command in COMMANDS:
        lines += ["", f"## lumina {command.name}", "", f"{command.does[0].upper()}{command.does[1:]}."]
        lines += ["", f"The same as `python -m {command.module}`."]
        module = importlib.import_module(SETTINGS.get(command.module, command.module))
        for word, kind in getattr(module, "KINDS", {"": getattr(module, "Settings", None)}).items():
            if kind is not None and (rows := list(flags.reference(kind))):
                lines += ["", *([f"### lumina {command.name} {word}"] if word else []), *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: list[tuple]) -> Iterator[str]:
    cell = lambda text: text.replace("|", "\\|")
    head = ("", "| flag | values | default | what it is |", "|---|---|---|---|")
    yield from () if rows[0][0] else head
    for group, name, values, default, text in rows:
        if group:
            yield from ("", f"**{group.title.capitalize()}**, for example `{group.example}`", *head)
        yield f"| `{name}` | {cell(values)} | {cell(default)} | {cell(text)} |"


def api() -> str:
    lines = ["# Python API", "", "Made from docstrings. Shapes are jaxtyping's: B batch, S samples, T time, D width, H heads, K head width, F hidden, V vocabulary, h w rows and columns of codes."]  # fmt: skip
    for title, modules in API.items():
        lines += ["", f"## {title}"]
        for module in modules:
            lines += ["", f"::: lumina_fn.{module}", "    options: {heading_level: 3}"]
    return "\n".join(lines) + "\n"
