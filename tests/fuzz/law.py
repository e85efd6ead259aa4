"""What a reader may do with any bytes: return, or refuse them; soon, in little memory, and without touching anything outside its folder.

`arm` once in a process of its own; then every `judge` runs a reader under the law. An audit hook sees what Python does, a timer
and a limit of the address space hold time and memory, and a canary outside of the folder tells of reads that are not Python's.
"""

import faulthandler
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS = 2.0  # of the process's CPU time, for one input
STUCK = 180  # seconds without `alive` after which a process ends: a reader waits for something, or is lost in C
MEMORY = 1 << 30  # bytes that one input may take
CANARY = "canary-7c1f"  # stands in every file outside of the folder

_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    | {str(Path(__file__).parents[2])}
)
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn", "socket.",
    "pickle.find_class", "ctypes.dlopen", "webbrowser.", "urllib.", "ftplib.", "os.chmod", "os.chown", "os.link",
    "os.symlink", "os.putenv", "os.kill", "os.truncate", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.", "tempfile.",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Violation(AssertionError):
    """A reader did what no file may make it do."""


class _Stopped(BaseException):
    """Not an Exception: a reader that catches those must not hide it."""


_folder: list[str] = []  # what may be read now; empty: nothing is judged
_writes: list[bool] = []  # whether the folder may be written to
_seen: list[str] = []  # what was done against the law


def arm(limited: bool = True) -> None:
    """Look at all that this process does from now on."""
    sys.addaudithook(_audit)
    signal.signal(signal.SIGPROF, _late)
    Path("/proc/self/clear_refs").write_text("5")  # the most memory is counted from now on
    if limited:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 * MEMORY, resource.RLIM_INFINITY))


def warm(read: Callable[[], object]) -> None:
    """Have a reader import what it imports late."""
    with suppress(ValueError):
        read()


def alive() -> None:
    """To be called every few cases."""
    faulthandler.dump_traceback_later(STUCK, exit=True)


def _audit(event: str, args: tuple) -> None:
    if not _folder:
        return
    if event == "open":
        path, _, flags = args
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        inside = (real + os.sep).startswith(_folder[0] + os.sep) or not Path(os.fsdecode(path)).is_absolute()
        if flags & _WRITES and not (_writes[0] and inside):
            _forbid(f"writes {real}")
        elif not (real + os.sep).startswith((_folder[0] + os.sep, *_LIBRARIES)):
            _forbid(f"reads {real}")
    elif event.startswith(_FORBIDDEN) and not (_writes[0] and event == "os.truncate"):
        _forbid(f"{event}{args!r:.200}")


def _forbid(what: str) -> None:
    _seen.append(what)
    raise _Stopped(what)


def _late(signum: int, frame: object) -> None:
    if _folder:
        _forbid(f"takes more than {SECONDS:g} s")


@contextmanager
def _watched(folder: Path, writes: bool) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _folder.append(os.path.realpath(folder))
    _writes.append(writes)
    try:
        yield
    finally:
        _folder.clear()
        _writes.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)


def judge(
    read: Callable[[], object], folder: Path, outside: Path, refusal: type[Exception], writes: bool = False
) -> bool:
    """Whether the reader accepts what lies in `folder` (it may refuse by this exception alone). Raises Violation for anything else.

    `outside` holds what must neither be read nor changed.
    """
    _seen.clear()
    watched = (outside,) if writes else (outside, folder)
    before, told, wrong = _listing(*watched), "", ""
    memory = _most_memory()
    try:
        with _watched(folder, writes):
            told = str(read())
        accepted = True
    except refusal as error:
        accepted, told = False, str(error)
        if type(error) is not refusal and refusal is not ValueError:
            wrong = f"raises {type(error).__name__}: {error!s:.300}"
    except _Stopped:
        accepted = False
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        accepted, wrong = False, f"raises {type(error).__name__}: {error!s:.300}"
    grown = _most_memory() - memory
    found = [*_seen, *([wrong] if wrong else [])]
    found += [f"takes {grown} bytes"] * (grown > MEMORY)
    found += ["reads the canary"] * (CANARY in told)
    found += ["changes files"] * (_listing(*watched) != before)
    if found:
        raise Violation("; ".join(found))
    return accepted


def _most_memory() -> int:
    """Bytes that this process has had resident at the most; getrusage counts what the one that started it had."""
    text = Path("/proc/self/status").read_bytes()
    return int(text.split(b"VmHWM:")[1].split(None, 1)[0]) << 10


def _listing(*folders: Path) -> list[tuple[str, int, int]]:
    return sorted(
        (entry.path, entry.stat(follow_symlinks=False).st_size, entry.stat(follow_symlinks=False).st_mtime_ns)
        for folder in folders
        for entry in os.scandir(folder)
    )
