"""A run that is asked to stop ends after a step, with its state saved: every rank after the same one."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from experiments.launching.abort import ECHO, Ending

ASKED = (signal.SIGTERM, signal.SIGINT)
_WORDS = {str(int(number)).encode(): number for number in ASKED}  # what a rank says; a stranger's words are no signal
MOST_DIGITS = 12  # of the number of a step
POLL = 0.5  # seconds between looks at whether another rank was asked


class Stop:
    """Whether the run was asked to stop, and after which step it does.

    Ranks are not in step with each other, and one that waits in a collective for another needs it to go on: once asked, each says
    which step it is in, and the last of those is the last for all.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: dist.Store | None = None, fail: Callable[[str], object] | None = None
    ):
        self.number: int | None = None  # of the signal
        self._rank, self._size, self._store, self._fail = rank, size, store, fail
        self._begun, self._last = 0, 0
        self._lock, self._agreed = threading.Lock(), threading.Event()

    def before(self, step: int) -> bool:
        """Whether this step is not to be taken any more; called before each."""
        with self._lock:
            if self.number is None:
                self._begun = step
                return False
        self._agreed.wait()
        return step > self._last

    def ask(self, number: int) -> None:
        """Called for the first signal, on whatever rank it arrives. Does not wait."""
        if self._store is not None:
            try:
                self._store.set("stop", str(int(number)))
            except RuntimeError as error:
                self._give_up(error)
            return
        self.number, self._last = number, self._begun
        self._agreed.set()

    def listen(self, over: threading.Event) -> None:
        """Take part in the agreement of all ranks once one of them is asked, until the event comes."""
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
        """What the store has under this key, or nothing."""
        return self._store.get(key) if self._store.check([key]) else b""

    def _step_of(self, rank: int) -> int:
        """The step that a rank is in, once it has said so."""
        deadline = time.monotonic() + self._store.timeout.total_seconds()
        while not (word := self._word(f"in step {rank}")).isdigit() or len(word) > MOST_DIGITS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {rank} does not say which step it is in")
            time.sleep(0.02)
        return int(word)

    def _give_up(self, error: RuntimeError) -> None:
        """Nobody would ever say which step is the last, for which `before` waits."""
        time.sleep(ECHO)  # where the launcher or a rank is lost, who watches it says so
        self._fail(f"the ranks cannot agree where to stop: {str(error).splitlines()[0]}")


@contextmanager
def alone() -> Iterator[Stop]:
    """In a process on its own: the first SIGTERM or SIGINT asks, the second one ends it at once."""
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
    """On one of many ranks, whose signals its `Ending` sees."""
    stop, over = Stop(rank, size, store.clone(), lambda why: ending(1, why)), threading.Event()
    listener = threading.Thread(target=stop.listen, args=(over,), daemon=True)
    listener.start()
    ending.graceful = stop.ask
    try:
        yield stop
    finally:
        ending.graceful = None
        over.set()
