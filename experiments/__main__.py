"""The command `lumina`: `lumina finetune ...` is the same as `python -m experiments.finetune ...`, and likewise for every other command.

lumina                 lists the commands
lumina COMMAND --help  lists a command's flags
"""

import difflib
import runpy
import sys
from typing import NamedTuple

from lumina_fn.errors import InputError
from lumina_fn.process import entry, flags


class Command(NamedTuple):
    """One command of `lumina`: its name, the module that runs it, and its text in the list of commands."""

    name: str
    module: str
    does: str


COMMANDS = (  # in the order in which people use them
    Command("demo", "experiments.demo", "see it work: a tiny model learns a new shape, in minutes, on a CPU"),
    Command("plan", "experiments.plan", "predict memory and time for each device before you launch"),
    Command(
        "migrate",
        "experiments.migrate",
        "move from MindSpeed-MM: its guide's files become commands, its extracted features a feature set",
    ),
    Command("convert", "lumina_fn.convert", "convert weights: native, Hugging Face, MindSpeed, MoVQGAN"),
    Command("pretokenize", "experiments.pretokenize", "turn pictures and captions into features"),
    Command("dataset", "experiments.dataset", "report what a dataset holds, or verify its features"),
    Command("finetune", "experiments.finetune", "fine-tune a model on features"),
    Command("sample", "experiments.sample", "draw pictures from prompts"),
    Command("export", "lumina_fn.export", "write the model or its training step as programs for a CPU or an NPU"),
    Command("npu-check", "experiments.npu_check", "run the checks that need a real Ascend NPU"),
    Command("ascend-env", "experiments.ascend_env", "list and check the environment variables of an NPU"),
    Command("kernel-bench", "kernels.bench", "measure the fused kernels on this device"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names, or list all commands; returns the exit code. Raises InputError for an unknown command."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(listing())
        return 0
    if words[0] == "--version":
        print(flags.version())
        return 0
    command = next((c for c in COMMANDS if c.name == words[0]), None)
    if command is None:
        near = difflib.get_close_matches(words[0], [c.name for c in COMMANDS], 1)
        raise InputError(
            f"no command {words[0]!r}{f', did you mean {near[0]}?' if near else ''}; `lumina` alone lists the commands"
        )
    sys.argv = [f"lumina {command.name}", *words[1:]]
    runpy.run_module(command.module, run_name="__main__")
    return 0


def listing() -> str:
    """The text of `lumina --help`: the usage and one line per command."""
    wide = max(len(c.name) for c in COMMANDS)
    rows = [f"  {c.name:{wide}}  {c.does}" for c in COMMANDS]
    return "\n".join(["usage: lumina COMMAND [flags]; lumina COMMAND --help lists a command's flags", "", *rows])


def run() -> None:
    """The entry point of the console script `lumina`."""
    entry.run(main)


if __name__ == "__main__":
    run()
