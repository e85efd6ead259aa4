"""A command from its start to its exit code: 0 done, 2 a user's mistake in one line, 130 Ctrl-C, 1 anything else."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO

from lumina_fn.errors import InputError, printable
from lumina_fn.process import out_of_memory, startup

LONGEST = 4000  # characters of an error's line, which may quote a foreign file


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a command and exit: 0 done, 2 for an InputError and 1 for failed memory allocation (each one line on stderr), 130 for Ctrl-C.

    If standard output is closed (`| head`) the command exits with 0; if it cannot be written, with 1 and a line.
    """
    if signal.getsignal(signal.SIGINT) in (startup.end_at_once, signal.default_int_handler):
        signal.signal(signal.SIGINT, startup.interrupt)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _watched(stream))
    code = _code(main)
    _lost_output()  # before Python flushes the rest at exit and prints an error of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what remains takes milliseconds
    sys.exit(code)


def _code(main: Callable[[Sequence[str] | None], int | None]) -> int:
    try:
        code = main(None) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except InputError as error:
        refused = out_of_memory.line(error)  # if so, the InputError may name a file that is not at fault
        tell(f"error: {printable((refused or str(error))[:LONGEST])}")
        return 1 if refused else 2
    except KeyboardInterrupt:
        tell("stopped")
        return 130
    except SystemExit as asked:  # --help
        return _written(asked.code if isinstance(asked.code, int) else 1 if asked.code else 0)
    except Exception as error:
        if _interrupted(error):
            tell("stopped")
            return 130
        if refused := out_of_memory.line(error):
            tell(f"error: {printable(refused)}")
            return 1
        lost = _lost_output() if isinstance(error, OSError) else None
        if lost is not None:
            return _unheard(lost)
        if isinstance(error, OSError) and error.filename is not None:  # such as a failing disk
            tell(f"error: {printable(error.filename)}: {error.strerror}")
            return 1
        raise


def _unheard(lost: int) -> int:
    """The exit code if standard output could not be written; prints a line unless it was closed."""
    if lost == errno.EPIPE:  # the reader, such as `| head`, has closed it
        return 0
    tell(
        f"error: cannot write to standard output: {os.strerror(lost)}; what was asked for may be done: look at its folder"
    )
    return 1


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused this error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _written(code: int) -> int:
    """The exit code after standard output is flushed: `code`, or that of lost output."""
    with suppress(OSError):
        if sys.stdout is not None:
            sys.stdout.flush()
    lost = _lost_output()
    return code if lost is None else _unheard(lost)


def tell(line: str) -> None:
    """Write a line to stderr, if it is open."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """Standard output or error, which records a failed write: the exception itself does not tell which file it was."""

    lost: int | None = None  # the errno of the failed write

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error.errno
            raise


def _watched(stream: TextIO) -> TextIO:
    raw = _Output(stream.fileno(), "w", closefd=False)
    errors = stream.errors if stream.errors != "strict" else "backslashreplace"  # a name that this terminal cannot show
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, errors, line_buffering=bool(stream.line_buffering))


def _lost_output() -> int | None:
    """The errno if standard output or error could not be written, which are then redirected to nowhere; None if both could."""
    found = None
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # the stream may be None
            stream.flush()
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, _Output) and raw.lost is not None:
            found = raw.lost
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, raw.fileno())
            os.close(null)
    return found
