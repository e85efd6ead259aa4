"""How a process of many ends before its time: at once, together with all others, and with one of them saying why."""

import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist
from rich.console import Console

from experiments.launching.start import Guard

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # what torchrun passes on, or sends itself
KEEPALIVE = (  # notices a host that is off or cut away after 20 seconds
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 2),
)
GONE = "the launcher is gone: the run is over"
ECHO = 2.0  # seconds in which a rank hears that another one is gone; its own failure may come from that


class Ending:
    """The way out, for any thread of this rank. Of all ranks the first one to take it says why; the others' reasons are echoes."""

    def __init__(self, name: str, local_rank: int, guard: Guard):
        self.name, self.local_rank, self.guard = name, local_rank, guard
        self.store: dist.Store | None = None  # which knows the first one, once ranks have met
        self.where: tuple[str, int] | None = None  # that store's host and port, unless it is a file
        self.taken = threading.Lock()
        self.graceful: Callable[[int], None] | None = None  # takes a signal while a run can save its state

    def __call__(self, code: int, reason: str) -> NoReturn:
        self.taken.acquire()  # and never given back
        if self.guard.launcher_is_gone():
            code, reason = 1, GONE
        if self._is_first():
            Console(stderr=True).show_cursor()  # a progress bar may have hidden it
            print(f"{'' if code > 128 else 'error: '}{self.name}: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # whatever other threads wait for, in whatever library

    def _is_first(self) -> bool:
        """Whether no rank has asked before; where there is nobody to ask, one rank of each host is taken for the first."""
        answer = queue.SimpleQueue()

        def ask(store: dist.Store) -> None:
            with suppress(OSError, RuntimeError):  # it went with the launcher that held it
                if self.where is not None:  # torch itself would fill the screen where a store is gone
                    socket.create_connection(self.where, ECHO).close()
                answer.put(store.add("ended", 1) == 1)

        if self.store is not None and not self.guard.launcher_is_gone():
            threading.Thread(target=ask, args=(self.store,), daemon=True).start()
            with suppress(queue.Empty):  # out of reach
                return answer.get(timeout=ECHO)
        return self.local_rank == 0


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
                if ending.graceful is not None:
                    graceful, ending.graceful = ending.graceful, None  # a second signal ends it at once
                    graceful(number)
                    continue
                time.sleep(ECHO)  # where a rank is lost, the launcher stops the others: that loss is the reason then
                ending(128 + number, f"stopped by {signal.Signals(number).name}")
            if ending.guard.launcher_is_gone():
                ending(1, GONE)

    threading.Thread(target=watch, daemon=True).start()


def watch_neighbour(store: dist.Store, rank: int, size: int, address: str, ending: Ending) -> Callable[[], None]:
    """End this rank as soon as the next one is gone, so that none is left; returns what tells the one before that this is done.

    The kernel closes a dead process's connections, which is noticed in milliseconds, during long computations too and whatever
    a device's own collectives wait for; keepalive probes find a host that is off or cut away.
    """
    following = (rank + 1) % size
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.settimeout(60)
        store.set(f"address {rank}", f"{address} {server.getsockname()[1]}")
        host, port = store.get(f"address {following}").decode().split()
        ahead = socket.create_connection((host, int(port)))
        behind, _ = server.accept()
    for option, value in KEEPALIVE:
        ahead.setsockopt(*option, value)
    ending.guard.watch(ahead)

    def watch() -> None:
        try:
            if ahead.recv(1):
                return
            what = "its process ended; was it killed, or out of memory?"
        except OSError as error:
            what = error.strerror
        ending(1, f"lost contact with rank {following}: the run is over ({what})")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def done() -> None:
        behind.sendall(b".")
        thread.join()
        ending.guard.done()

    return done
