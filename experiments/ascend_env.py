"""The environment variables of an Ascend NPU: those of the MindSpeed-MM guide's table, with their allowed values and meanings.

    lumina ascend-env

prints all of them with their current values, and exits with 2 if a value is out of its range. Commands that compute on an NPU make
the same check when they start. PyTorch is not needed, so this also runs where torch_npu finds no CANN.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lumina_fn import errors
from lumina_fn.errors import InputError
from lumina_fn.process import entry, flags


@dataclass(frozen=True)
class Pattern:
    """Allowed values given by a regular expression, and the same in words."""

    regex: str
    words: str


@dataclass(frozen=True)
class Variable:
    """An environment variable: its meaning, the values it may have, and its default."""

    name: str
    meaning: str
    allowed: tuple[str, ...] | range | Pattern
    default: str | None  # the value that the library which reads it uses if it is not set; None: it depends

    @property
    def values(self) -> str:
        """The allowed values in words."""
        match self.allowed:
            case range(start=least, stop=end):
                return f"a whole number from {least} to {end - 1}"
            case Pattern(words=words):
                return words
            case names:
                return f"{', '.join(names[:-1])} or {names[-1]}"

    def allows(self, value: str) -> bool:
        """Whether the variable may have this value."""
        match self.allowed:
            case range():
                return re.fullmatch("[0-9]{1,9}", value) is not None and int(value) in self.allowed
            case Pattern(regex=regex):
                return re.fullmatch(regex, value) is not None
            case names:
                return value in names


SWITCH = ("0", "1")
TABLE = (
    Variable("ASCEND_SLOG_PRINT_TO_STDOUT", "CANN's log on the terminal (1) or in files (0)", SWITCH, "0"),
    Variable(
        "ASCEND_GLOBAL_LOG_LEVEL",
        "the log's level: 0 debug, 1 info, 2 warning, 3 error, 4 nothing",
        ("0", "1", "2", "3", "4"),
        "3",
    ),
    Variable("TASK_QUEUE_ENABLE", "how much of an op's dispatch is queued: 0 nothing", ("0", "1", "2"), "1"),
    Variable("COMBINED_ENABLE", "two ops on non-contiguous tensors are joined (1)", SWITCH, "0"),
    Variable(
        "CPU_AFFINITY_CONF",
        "host threads are bound to cores: 0 not, 1 to a device's, 2 each to its own",
        ("0", "1", "2"),
        "0",
    ),
    Variable("HCCL_CONNECT_TIMEOUT", "seconds to wait for another device's connection", range(120, 7201), "120"),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "memory in segments that can grow, or not",
        Pattern("expandable_segments:(True|False)", "expandable_segments:True or expandable_segments:False"),
        "expandable_segments:False",
    ),
    Variable("HCCL_EXEC_TIMEOUT", "seconds to wait for other devices in a collective", range(68, 17341), "1800"),
    Variable("ACLNN_CACHE_LIMIT", "descriptions of ops kept on the host", range(1, 10_000_001), "10000"),
    Variable(
        "TOKENIZERS_PARALLELISM",
        "the tokenizer's threads; read on a CPU as well",
        Pattern("(?i:true|false)", "True or False"),
        None,
    ),
    Variable("MULTI_STREAM_MEMORY_REUSE", "memory of one stream serves another (1)", SWITCH, "1"),
    Variable(
        "NPU_ASD_ENABLE",
        "silent errors are looked for: 0 not, 1 logged, 2 warned of, 3 with the data",
        ("0", "1", "2", "3"),
        "0",
    ),
    Variable("ASCEND_LAUNCH_BLOCKING", "ops run one by one (1), to find the one that fails", SWITCH, "0"),
    Variable("NPUS_PER_NODE", "devices of a machine that the launch scripts use", range(1, 1025), "8"),
)


def problems(environment: Mapping[str, str]) -> list[str]:
    """One line for each variable whose value is out of its range."""
    return [
        f"{variable.name}={environment[variable.name]}: expected {variable.values}"
        for variable in TABLE
        if variable.name in environment and not variable.allows(environment[variable.name])
    ]


def effective(environment: Mapping[str, str]) -> list[str]:
    """One line for each variable: its value, or its default if it is not set."""
    of = lambda variable: f"{variable.name} is not set ({variable.default or 'as its reader chooses'})"
    return [f"{v.name}={environment[v.name]}" if v.name in environment else of(v) for v in TABLE]


def check(environment: Mapping[str, str], mode: str, say: Callable[[str], None]) -> None:
    """Raises InputError if a variable is out of its range; with mode `warn` it calls `say` with a warning instead."""
    found = problems(environment)
    if found and mode == "error":
        raise InputError(f"{'; '.join(found)}. Where this CANN is newer and takes it: --env-check warn")
    for problem in found:
        say(f"warning: {problem}")


@dataclass(frozen=True)
class Settings:
    """The command has no flags of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print every variable with its value, meaning and range; returns the exit code. Raises InputError if one is out of range."""
    flags.parse(Settings, __doc__, argv)
    for variable, line in zip(TABLE, effective(os.environ), strict=True):
        print(f"{errors.printable(line)}\n    {variable.meaning}; {variable.values}")
    check(os.environ, "error", print)
    return 0


if __name__ == "__main__":
    entry.run(main)
