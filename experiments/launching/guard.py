"""A process beside each rank, which leaves nothing of a run behind where one of its processes died.

A rank ends by itself when its launcher or a neighbour is gone, unless it is stopped (SIGSTOP) or hangs: its guard wakes it with
SIGCONT, and ten seconds later kills it. This is a script of its own on Python's library alone: it is there in milliseconds,
before its rank imports PyTorch, and shares no lock with it.
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

LOOK = 1.0  # seconds from one look to the next
GRACE = 10  # looks at a rank that should end, after which it is killed. Looks, not time: a guard may be stopped as well
TOUCH = 3600  # looks from one touch of the store to the next: who cleans /tmp removes what is untouched for days
NEIGHBOUR, DONE = b"n", b"d"  # what a rank tells: here is the connection to my neighbour; I have nothing more to do
# Files in a launch's folder: the guard that waits for its launcher, and what ranks share.
KEEPER, STORE = "keeper", "store"
_SET_DEATH_SIGNAL = 1  # Linux's PR_SET_PDEATHSIG

Process = tuple[int, int]  # its id, and when it started: an id may come again


def wake_with_parent() -> None:
    """When the parent dies the kernel wakes this process if it is stopped; to a running one SIGCONT does nothing."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGCONT, 0, 0, 0)


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third one on: state, parent, ...; none where there is no such process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []


def identify(pid: int) -> Process | None:
    """A process that has not ended."""
    fields = _stat(pid)
    return (pid, int(fields[19])) if fields and fields[0] not in (b"Z", b"X") else None


def is_gone(process: Process) -> bool:
    """Whether a process has ended; one that cannot be looked at now, where files are at their limit, has not."""
    try:
        return identify(process[0]) != process
    except OSError:
        return False


def launcher_above(parent: int, variable: str) -> Process | None:
    """torchrun: the nearest process from this one upwards that was started without the variable; a wrapper's shell may be below it.

    None where that one does not run Python, as torchrun does: then the launcher has died and somebody else adopted its children.
    """
    pid = parent
    while _has(pid, variable):
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    if pid == 0:  # a variable of the whole machine
        return identify(parent)
    with suppress(OSError):  # another user's
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
    """Wake a launcher and all that it started, so that they notice who died."""
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
    """Whether a connection that can be read was closed without a word. What is there to read is left for the rank."""
    try:
        return not neighbour.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def guard(rank: int, launcher: Process | None, channel: socket.socket, folder: Path | None) -> bool:
    """Watch over a rank, this process's parent, until it is gone; whether it was done then."""
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
    """While this process lives, or until the descriptor is closed, nobody removes the folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def tidy(folder: Path, launcher: Process) -> None:
    """Remove a launch's folder if the launcher is gone and no rank holds it any more: the last rank's guard finds it so.

    A launcher that is there may start ranks again. The first rank's guard waits for it, until another attempt's does.
    """
    with suppress(OSError):  # another guard removed it
        while not is_gone(launcher) and _keeps(folder):
            time.sleep(LOOK / 5)
    if not is_gone(launcher):
        return
    with suppress(OSError):  # another guard was first
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for _ in range(10):  # a rank's files may be closed a moment after its end is seen
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return shutil.rmtree(folder)
            time.sleep(LOOK / 10)


def _keeps(folder: Path) -> bool:
    """Whether this guard is the one that waits. The first rank may have ended before it had one: then whichever looks first is."""
    with suppress(FileExistsError), (folder / KEEPER).open("x") as file:
        file.write(str(os.getpid()))
    return (folder / KEEPER).read_text() == str(os.getpid())


def main() -> None:
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
