"""Run a command in one process, or on every rank that a launcher starts. The guard of a rank starts before PyTorch is imported."""

import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from experiments import LAUNCHER
from experiments.launching import guard, launchers, place
from experiments.launching.place import Place
from lumina_fn.errors import InputError
from lumina_fn.process import entry, startup


class Guard:
    """A rank's guard process, the channel to it, and what both know of the launcher."""

    def __init__(self, here: Place):
        self.torchrun = here.torchrun
        self.launcher = guard.launcher_above(LAUNCHER, place.RUN_ID) if here.torchrun else None
        # The folder of the store of a launch on one machine. On several machines ranks use torchrun's store.
        self.folder = None
        if self.launcher is not None and here.one_host:
            self.folder = _folder(self.launcher, here)
            self._hold = guard.hold(self.folder)
        self._channel, channel = socket.socketpair()
        keeps = guard.KEEPER if here.local_rank == 0 else ""
        words = [os.getpid(), channel.fileno(), self.folder or "", keeps, *(self.launcher or ())]
        environment = {name: value for name, value in os.environ.items() if name not in launchers.NAMES}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *map(str, words)], pass_fds=[channel.fileno()], cwd="/",
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        channel.close()

    def launcher_is_gone(self) -> bool:
        """Whether torchrun, which started this rank, has ended. False for other launchers, which may end before their ranks."""
        if not self.torchrun:
            return False
        return os.getppid() != LAUNCHER or self.launcher is None or guard.is_gone(self.launcher)

    def watch(self, neighbour: socket.socket) -> None:
        """Have the guard end this rank once that connection is closed, unless the rank calls `done` first."""
        with suppress(OSError):  # the guard was killed; the rank continues without it
            socket.send_fds(self._channel, [guard.NEIGHBOUR], [neighbour.fileno()])

    def done(self) -> None:
        """Tell the guard that this rank and all others end normally."""
        with suppress(OSError):
            self._channel.send(guard.DONE)


def run(main: Callable[..., int | None]) -> None:
    """Run main(None, world) on every rank that a launcher started, or main(None) in a process on its own, and exit.

    Exit codes are those of `entry.run`. A rank that fails ends all others; the reason is printed once, with the rank.
    """
    entry.run(lambda argv: _run(main, argv))


def _run(main: Callable[..., int | None], argv: None) -> int | None:
    here = place.find(os.environ)
    if here is None:
        return main(argv)
    # The guard starts first, since a rank may be stopped (SIGSTOP) while it imports PyTorch.
    own = Guard(here)
    if here.one_host or (here.local_size or 1) > 1:  # ranks that share a host's cores; torchrun does the same
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with startup.importing():
        from experiments.launching import distributed

    return distributed.run_rank(main, here, own)


def _folder(launcher: guard.Process, here: Place) -> Path:
    """A folder that only this user can access: the same for all ranks of a launch, and another for each launch. Raises InputError."""
    boot, space = Path("/proc/sys/kernel/random/boot_id").read_text(), Path("/proc/self/ns/pid").readlink()
    what = (boot, space, launcher, os.environ[place.RUN_ID], here.address, here.port)
    folder = Path(tempfile.gettempdir(), f"lumina-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}")
    try:
        with suppress(FileExistsError):  # made by another rank, or by an earlier attempt
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise InputError(f"{folder}, where ranks meet: {error.strerror}; name another place by TMPDIR") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise InputError(
            f"{folder} is not a folder of this user's alone, as ranks need it to meet in: remove it, or name another place by TMPDIR"
        )
    return folder
