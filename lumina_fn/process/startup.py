"""What comes before PyTorch's imports, which take seconds: an end at once by Ctrl-C, and a folder that they can make.

Ctrl-C ends a command without the traceback of whatever import it falls into; parts of them swallow a KeyboardInterrupt or turn it
into another error.
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

from lumina_fn.process import out_of_memory


def end_at_once(*_: object) -> None:
    with suppress(OSError):  # standard error is closed
        os.write(2, b"stopped\n")
    os._exit(130)


def begin() -> None:
    """For a package's own __init__: while `python -m` looks for a module in it, argv says so."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
        sys.excepthook = _told


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's last word on an error, before `errors.run` is there: what memory was refused while it imports is a line."""
    if (line := out_of_memory.line(error)) is None:
        sys.__excepthook__(kind, error, trace)
    else:
        with suppress(OSError):
            os.write(2, f"error: {line}\n".encode(errors="backslashreplace"))


def keep_compiled_code() -> None:
    """See to it that PyTorch's imports can make the folder of the compile cache; where it cannot be there, this process has its own."""
    place = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default_cache()).absolute()
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK | os.X_OK):
            return
    with suppress(OSError):  # there is no folder for temporary files either
        own = tempfile.TemporaryDirectory(prefix="lumina-compiled-", ignore_cleanup_errors=True)
        atexit.register(own.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = own.name
        os.write(2, f"note: no compile cache can be kept in {str(place)!a}: code is compiled anew each time\n".encode())


def _default_cache() -> str:
    """PyTorch's, which only its own import would tell."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    return f"{tempfile.gettempdir()}/torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user)


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
