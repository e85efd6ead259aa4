"""How a process of many ends before its time: at once, together with all others, and with one of them saying why."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
from rich.console import Console

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # what torchrun passes on, or sends itself
ECHO = 2.0  # seconds in which a rank hears that another one is gone; its own failure may come from that


class Ending:
    """The way out, for any thread of this rank. Of all ranks the first one to take it says why; the others' reasons are echoes."""

    def __init__(self, name: str, local_rank: int):
        self.name, self.local_rank, self.launcher = name, local_rank, os.getppid()
        self.store: dist.Store | None = None  # where the first one is known by, once ranks have met
        self.taken = threading.Lock()

    def __call__(self, code: int, reason: str) -> NoReturn:
        self.taken.acquire()  # and never given back
        if self.launcher_is_gone():
            code, reason = 1, "the launcher is gone: the run is over"
        if self._is_first():
            Console(stderr=True).show_cursor()  # a progress bar may have hidden it
            print(f"{'' if code > 128 else 'error: '}{self.name}: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # whatever other threads wait for, in whatever library

    def launcher_is_gone(self) -> bool:
        return os.getppid() != self.launcher

    def _is_first(self) -> bool:
        if self.store is not None and not self.launcher_is_gone():
            try:
                return self.store.add("ended", 1) == 1
            except RuntimeError:  # the store is gone, with the launcher that held it
                pass
        return self.local_rank == 0  # one for each host


def watch_launcher(ending: Ending) -> None:
    """End this rank within seconds of its launcher's end, and on the signals that ask for it, whatever its main thread does."""
    signals, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach())  # written to at once, even while the main thread is outside of Python
    for number in STOP:
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while True:
            if select.select([signals], [], [], 1)[0] and (number := signals.recv(1)[0]) in STOP:
                time.sleep(ECHO)  # where a rank is lost, the launcher stops the others: that loss is the reason then
                ending(128 + number, f"stopped by {signal.Signals(number).name}")
            if ending.launcher_is_gone():
                ending(1, "")

    threading.Thread(target=watch, daemon=True).start()


def watch_neighbour(group: dist.ProcessGroupGloo, rank: int, size: int, ending: Ending) -> Callable[[], None]:
    """End this rank as soon as the next one is gone, so that none is left; returns the farewell of a run that is done.

    The kernel closes a dead process's connections: that is noticed in milliseconds, during long computations too, and by
    devices whose own collectives would wait for minutes.
    """
    following, preceding = (rank + 1) % size, (rank - 1) % size

    def watch() -> None:
        try:
            group.recv([torch.zeros(1)], following, 0).wait()
        except RuntimeError as error:
            what = str(error).splitlines()[0].rpartition("] ")[2].split(". ")[0]
            ending(1, f"lost contact with rank {following} ({what}): the run is over; was it killed, or out of memory?")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def farewell() -> None:
        group.barrier().wait()
        group.send([torch.ones(1)], preceding, 0).wait()
        thread.join()

    return farewell
