"""Ctrl-C before and while a command imports: its end at once, without the traceback of whatever import it falls into.

PyTorch's imports take seconds, and parts of them swallow a KeyboardInterrupt or turn it into another error.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def end_at_once(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


def begin() -> None:
    """For a package's own __init__: while `python -m` looks for a module in it, argv says so."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


@contextmanager
def importing() -> Iterator[None]:
    """The same for what a command imports late; elsewhere than in a command nothing changes."""
    if signal.getsignal(signal.SIGINT) is not interrupt:
        yield
        return
    signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(*_: object) -> None:
    """Ctrl-C while a command runs: what it writes is tidied up on the way out."""
    raise KeyboardInterrupt
