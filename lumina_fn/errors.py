"""What happens when somebody hands us something unusable: one line, exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class InputError(ValueError):
    """A user's mistake. The message says what, where, what was expected and what to do, on one line."""


def printable(text: object) -> str:
    """`text` with control characters (terminal escapes, newlines) escaped, so that a stranger's file name or caption prints inert."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Parser(argparse.ArgumentParser):
    """Arguments that cannot be used are a user's mistake like any other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a command and exit: 0 done, 2 for an InputError (its one line on stderr), 130 for Ctrl-C."""
    try:
        code = main(None) or 0
    except InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
