"""A guard process beside each rank: it ends the rank when another process of the run dies, so that none is left running.

A rank ends by itself when its launcher or a neighbour dies, unless it is stopped (SIGSTOP) or hangs. Then its guard wakes it with
SIGCONT, and kills it ten seconds later. The guard is a separate script that imports Python's standard library only: it runs within
milliseconds, before its rank imports PyTorch, and shares no lock with it.
"""

import ctypes
import fcntl
import os
import select
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK = 1.0  # seconds between two checks
GRACE = (
    10  # checks after which a rank that should end is killed; counted, not timed, since a guard may be stopped as well
)
TOUCH = 3600  # checks between two touches of the store: cleaners of /tmp remove files that were not touched for days
NEIGHBOUR, DONE = b"n", b"d"  # a rank's messages: the connection to its neighbour; that it has finished
# Files in a launch's folder: the id of the guard that waits for the launcher, and the ranks' store.
KEEPER, STORE = "keeper", "store"
_SET_DEATH_SIGNAL = 1  # Linux's PR_SET_PDEATHSIG

Process = tuple[int, int]  # its id and its start time, since an id may be used again


def wake_with_parent() -> None:
    """Have the kernel send SIGCONT when the parent dies: it wakes this process if it is stopped, else it has no effect."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGCONT, 0, 0, 0)


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third one on: state, parent, ...; empty if there is no such process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []


def identify(pid: int) -> Process | None:
    """The id and start time of a process; None if it has ended."""
    fields = _stat(pid)
    return (pid, int(fields[19])) if fields and fields[0] not in (b"Z", b"X") else None


def is_gone(process: Process) -> bool:
    """Whether a process has ended; False if that cannot be read, for example at the limit of open files."""
    try:
        return identify(process[0]) != process
    except OSError:
        return False


def launcher_above(parent: int, variable: str) -> Process | None:
    """The torchrun above `parent`: the nearest ancestor that was started without the variable. A wrapper's shell may be between them.

    None if that ancestor does not run Python: then torchrun has died, and another process has adopted its children.
    """
    pid = parent
    while _has(pid, variable):
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    if pid == 0:  # all ancestors have the variable: it is set for the whole machine
        return identify(parent)
    with suppress(OSError):  # a process of another user cannot be read
        if "python" not in Path(f"/proc/{pid}/exe").readlink().name:
            return None
    return identify(pid)


def _has(pid: int, variable: str) -> bool:
    """Whether a process was started with this variable in its environment."""
    with suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(entry.startswith(f"{variable}=".encode()) for entry in entries)
    return False


def wake(launcher: Process) -> None:
    """Send SIGCONT to a launcher and all its descendants, so that they notice which process died."""
    parents = {int(path.name): _stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    family, found = set(), {launcher[0]}
    while found:
        family |= found
        found = {pid for pid, fields in parents.items() if fields and int(fields[1]) in found} - family
    if not is_gone(launcher):
        for pid in family:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)


def _is_lost(neighbour: socket.socket) -> bool:
    """Whether a readable connection was closed without a message. A message stays in it for the rank to read."""
    try:
        return not neighbour.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def guard(rank: int, launcher: Process | None, channel: socket.socket, folder: Path | None) -> bool:
    """Watch a rank, this process's parent, until it ends; returns whether it had finished."""
    sources, neighbour = [channel], None
    lost, done, late, looks = False, False, 0, 0
    while os.getppid() == rank:
        ready = select.select(sources, [], [], LOOK if channel in sources else LOOK / 20)[0]
        if channel in ready:
            word, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            done |= word == DONE
            if descriptors:
                neighbour = socket.socket(fileno=descriptors[0])
                sources.append(neighbour)
            if not word:
                sources.remove(channel)
        if neighbour in ready:
            sources.remove(neighbour)
            lost = _is_lost(neighbour)
        if (lost and not done) or (launcher is not None and is_gone(launcher)):
            late += 1
            with suppress(OSError):
                os.kill(rank, signal.SIGKILL if late > GRACE else signal.SIGCONT)
        looks += 1
        if folder is not None and looks % TOUCH == 0:
            with suppress(OSError):
                os.utime(folder / STORE)
    return done


def hold(folder: Path) -> int:
    """A descriptor with a shared lock: until it is closed or this process ends, `tidy` does not remove the folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def tidy(folder: Path, launcher: Process) -> None:
    """Remove a launch's folder once the launcher is gone and no rank holds the folder, which the last rank's guard finds.

    A living launcher may start ranks again: the first rank's guard waits for its end, unless a guard of a later attempt takes over.
    """
    with suppress(OSError):  # another guard removed it
        while not is_gone(launcher) and _keeps(folder):
            time.sleep(LOOK / 5)
    if not is_gone(launcher):
        return
    with suppress(OSError):  # another guard was first
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for _ in range(10):  # a rank's files may be closed shortly after the rank has ended
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return shutil.rmtree(folder)
            time.sleep(LOOK / 10)


def _keeps(folder: Path) -> bool:
    """Whether this guard is the one that waits for the launcher: the one of the first rank, or the first to check if that one never ran."""
    with suppress(FileExistsError), (folder / KEEPER).open("x") as file:
        file.write(str(os.getpid()))
    return (folder / KEEPER).read_text() == str(os.getpid())


def main() -> None:
    """Guard a rank until it ends, then clean up; `start.Guard` passes the arguments."""
    wake_with_parent()
    rank, descriptor, folder, keeps, *launcher = sys.argv[1:]
    launcher = (int(launcher[0]), int(launcher[1])) if launcher else None
    folder = Path(folder) if folder else None
    if folder is not None and keeps == KEEPER:
        (folder / KEEPER).write_text(str(os.getpid()))
    done = guard(int(rank), launcher, socket.socket(fileno=int(descriptor)), folder)
    if launcher is not None and not done:
        wake(launcher)
    if folder is not None:
        tidy(folder, launcher)


if __name__ == "__main__":
    main()
