"""Graceful stop: after SIGTERM or SIGINT all ranks end after the same step, and the run saves its state."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from experiments.launching.abort import ECHO, STOP, Ending

ASKED = (signal.SIGTERM, signal.SIGINT)  # of a process on its own; a rank's are abort.STOP, which torchrun passes on
_WORDS = {
    str(int(number)).encode(): number for number in STOP
}  # values of the store's key `stop`; any other value is ignored
MOST_DIGITS = 12  # of a step's number in the store
POLL = 0.5  # seconds between checks of whether a stop was requested on another rank


class Stop:
    """Whether a stop was requested, and the last step that the run takes.

    Ranks may be in different steps, and a rank that waits in a collective needs the others to reach it. After a request each rank
    therefore writes the number of its current step, and the largest of these is the last step of all ranks.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: dist.Store | None = None, fail: Callable[[str], object] | None = None
    ):
        self.number: int | None = None  # of the signal that requested a stop
        self._rank, self._size, self._store, self._fail = rank, size, store, fail
        self._begun, self._last = 0, 0
        self._lock, self._agreed = threading.Lock(), threading.Event()

    def before(self, step: int) -> bool:
        """Whether the run ends before this step; called before every step."""
        with self._lock:
            if self.number is None:
                self._begun = step
                return False
        self._agreed.wait()
        return step > self._last

    def ask(self, number: int) -> None:
        """Request a stop: called for the first signal, on the rank that receives it. Does not block."""
        if self._store is not None:
            try:
                self._store.set("stop", str(int(number)))
            except RuntimeError as error:
                self._give_up(error)
            return
        self.number, self._last = number, self._begun
        self._agreed.set()

    def listen(self, over: threading.Event) -> None:
        """Wait until a stop is requested on any rank, then agree with all ranks on the last step; returns once `over` is set."""
        try:
            while (number := _WORDS.get(self._word("stop"))) is None:
                if over.wait(POLL):
                    return
            with self._lock:
                self.number = number
            self._store.set(f"in step {self._rank}", str(self._begun))
            self._last = max(self._step_of(rank) for rank in range(self._size))
            self._agreed.set()
        except RuntimeError as error:
            if not over.is_set():
                self._give_up(error)

    def _word(self, key: str) -> bytes:
        """The value of this key in the store; empty if there is none."""
        return self._store.get(key) if self._store.check([key]) else b""

    def _step_of(self, rank: int) -> int:
        """The current step of a rank; waits until that rank has written it."""
        deadline = time.monotonic() + self._store.timeout.total_seconds()
        while not (word := self._word(f"in step {rank}")).isdigit() or len(word) > MOST_DIGITS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {rank} does not say which step it is in")
            time.sleep(0.02)
        return int(word)

    def _give_up(self, error: RuntimeError) -> None:
        """End the run: without an agreement `before` would wait forever."""
        time.sleep(ECHO)  # if the launcher or a rank has died, its watcher reports that first
        self._fail(f"the ranks cannot agree where to stop: {str(error).splitlines()[0]}")


@contextmanager
def alone() -> Iterator[Stop]:
    """The Stop of a process on its own: the first SIGTERM or SIGINT requests a stop, the second one ends the process at once."""
    stop = Stop()

    def asked(number: int, _) -> None:
        signal.signal(number, before[number])
        stop.ask(number)

    before = {number: signal.signal(number, asked) for number in ASKED}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def together(rank: int, size: int, store: dist.Store, ending: Ending) -> Iterator[Stop]:
    """The Stop of one rank of many; its `Ending` receives the signals."""
    stop, over = Stop(rank, size, store.clone(), lambda why: ending(1, why)), threading.Event()
    listener = threading.Thread(target=stop.listen, args=(over,), daemon=True)
    listener.start()
    ending.graceful = stop.ask
    try:
        yield stop
    finally:
        ending.graceful = None
        over.set()
