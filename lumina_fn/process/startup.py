"""Preparation before PyTorch's imports, which take seconds: Ctrl-C ends them at once, and the compile cache's folder can be created.

During imports Ctrl-C ends a command without a traceback: some imports swallow KeyboardInterrupt or turn it into another error.
"""

import atexit
import getpass
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from lumina_fn.errors import printable
from lumina_fn.process import out_of_memory


def end_at_once(*_: object) -> None:
    """Signal handler: write a line to stderr and end the process with exit code 130, without any clean-up."""
    with suppress(OSError):  # standard error may be closed
        os.write(2, b"stopped\n")
    os._exit(130)


def begin() -> None:
    """Prepare a command, if `python -m` or `lumina` imports this package: Ctrl-C, failed allocation, temporary files; for __init__.

    Exits with 2 and a line if no temporary file can be written.
    """
    if sys.argv[:1] != ["-m"] and Path(*sys.argv[:1]).name != "lumina":
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
        sys.excepthook = _told
    _check_temporary_folder()


def _check_temporary_folder() -> None:
    wanted = os.environ.get("TMPDIR")
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError as error:
        _write(f"error: {error.strerror}; name a folder that can be written by TMPDIR")
        raise SystemExit(2) from None
    with suppress(OSError):  # it is not there
        if not wanted or Path(wanted).samefile(found):
            return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _write(f"note: no temporary file can be written in TMPDIR={wanted}: they are written in {found}")


def _write(line: str) -> None:
    """Write a line to stderr, if it is open, before the command's own output exists."""
    with suppress(OSError):
        os.write(2, f"{printable(line)}\n".encode(errors="backslashreplace"))


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook until `entry.run` starts: failed allocation during imports is reported in one line."""
    if (line := out_of_memory.line(error)) is None:
        sys.__excepthook__(kind, error, trace)
    else:
        _write(f"error: {line}")


def keep_compiled_code() -> None:
    """Create the folder of the compile cache, which PyTorch's imports need; if that fails, use a temporary folder of this process."""
    try:
        place = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default_cache()).absolute()
    except FileNotFoundError:  # there is no folder for temporary files
        return
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK | os.X_OK):
            return
    with suppress(OSError):
        own = tempfile.TemporaryDirectory(prefix="lumina-compiled-", ignore_cleanup_errors=True)
        atexit.register(own.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = own.name
        _write(f"note: no compile cache can be kept in {str(place)!a}: code is compiled anew each time")


def let_idle_threads_sleep() -> None:
    """Let OpenMP's idle threads sleep (OMP_WAIT_POLICY=passive) unless the user has chosen; to be called before PyTorch is imported.

    By default they spin for a while. Beside other work they then take the cores that the next threads need, and a step takes many
    times as long. Waking them costs up to 45 us for each parallel call, which is much only where calls are as short as in sampling.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _default_cache() -> str:
    """PyTorch's default folder of the compile cache, without importing PyTorch."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    return f"{tempfile.gettempdir()}/torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user)


@contextmanager
def importing() -> Iterator[None]:
    """Within the block, imports that a command makes late, Ctrl-C ends the command at once; no effect outside of a command."""
    if signal.getsignal(signal.SIGINT) is not interrupt:
        yield
        return
    signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(*_: object) -> None:
    """Signal handler while a command runs: raises KeyboardInterrupt, so that unfinished files are removed."""
    raise KeyboardInterrupt
