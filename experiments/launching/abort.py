"""The early end of a run of many processes: all ranks exit at once, and one of them prints the reason."""

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

# The signals that torchrun forwards to its ranks, or sends itself.
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
KEEPALIVE = (  # detects a host that is off or unreachable after 20 seconds
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 2),
)
GONE = "the launcher is gone: the run is over"
ECHO = 2.0  # seconds in which a rank detects that another rank has died, which may be the cause of its own failure


class Ending:
    """Ends this rank from any thread: `ending(code, reason)` exits with the code.

    Only the first rank of a run that ends prints its reason: the reasons of the others follow from it.
    """

    def __init__(self, name: str, local_rank: int, guard: Guard):
        self.name, self.local_rank, self.guard = name, local_rank, guard
        self.store: dist.Store | None = None  # shared by all ranks once they have met: it tells which rank ended first
        self.where: tuple[str, int] | None = None  # that store's host and port, unless it is a file
        self.taken = threading.Lock()
        # Handles the first signal instead, while a run can save its state.
        self.graceful: Callable[[int], None] | None = None

    def __call__(self, code: int, reason: str) -> NoReturn:
        self.taken.acquire()  # never released: only one thread ends this rank
        if self.guard.launcher_is_gone():
            code, reason = 1, GONE
        if self._is_first():
            Console(stderr=True).show_cursor()  # a progress bar may have hidden it
            print(f"{'' if code > 128 else 'error: '}{self.name}: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # at once: other threads may be blocked inside a library

    def _is_first(self) -> bool:
        """Whether this rank is the first to end. If the store cannot be reached, local rank 0 of each host counts as the first."""
        answer = queue.SimpleQueue()

        def ask(store: dist.Store) -> None:
            with suppress(OSError, RuntimeError):  # the store died with the launcher that held it
                if self.where is not None:  # torch itself prints many lines if a store is gone
                    socket.create_connection(self.where, ECHO).close()
                answer.put(store.add("ended", 1) == 1)

        if self.store is not None and not self.guard.launcher_is_gone():
            threading.Thread(target=ask, args=(self.store,), daemon=True).start()
            with suppress(queue.Empty):  # the store does not answer
                return answer.get(timeout=ECHO)
        return self.local_rank == 0


def watch_launcher(ending: Ending) -> None:
    """Start a thread that ends this rank on a signal of STOP, and within seconds of its launcher's death, whatever the main thread does."""
    signals, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach())  # written at once, even while the main thread runs native code
    for number in STOP:
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while True:
            if select.select([signals], [], [], 1)[0] and (number := signals.recv(1)[0]) in STOP:
                if ending.graceful is not None:
                    graceful, ending.graceful = ending.graceful, None  # a second signal ends this rank at once
                    graceful(number)
                    continue
                # If a rank died, the launcher stops the others: let its death be reported as the reason.
                time.sleep(ECHO)
                ending(128 + number, f"stopped by {signal.Signals(number).name}")
            if ending.guard.launcher_is_gone():
                ending(1, GONE)

    threading.Thread(target=watch, daemon=True).start()


def watch_neighbour(store: dist.Store, rank: int, size: int, address: str, ending: Ending) -> Callable[[], None]:
    """Start a thread that ends this rank as soon as the next rank dies, so that none is left running.

    Returns a function to call when this rank has finished: it informs the rank before, and waits until the next rank has finished.
    The kernel closes a dead process's connections. The thread detects that in milliseconds, even during long computations or while
    a device's collectives wait; keepalive probes detect a host that is off or unreachable.
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
