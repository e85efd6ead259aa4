"""Work that is done ahead by a thread, so that a step does not wait for its batch."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils._pytree as pytree

T = TypeVar("T")


class _Made(NamedTuple):
    value: Any


class _Ended(NamedTuple):
    error: BaseException | None


@contextmanager
def ahead(items: Iterable[T], depth: int = 4) -> Iterator[Iterator[T]]:
    """The items, of which a thread makes up to `depth` before they are asked for. What it raises is raised where they are read.

    The thread ends with the context, whether all items were read or not.
    """
    made: SimpleQueue[_Made | _Ended] = SimpleQueue()
    room, stopped = threading.Semaphore(depth), threading.Event()

    def make() -> None:
        source = iter(items)
        try:
            while room.acquire() and not stopped.is_set():
                made.put(_Made(next(source)))
        except StopIteration:
            made.put(_Ended(None))
        except BaseException as error:  # whatever it is, the reader is who can act on it
            made.put(_Ended(error))

    def read() -> Iterator[T]:
        while isinstance(item := made.get(), _Made):
            room.release()
            yield item.value
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        stopped.set()
        room.release()
        thread.join()


def pinned(tree: T, device: torch.device) -> T:
    """The tree with its tensors where `device` copies them from while the host goes on; for a CPU as it is."""
    if device.type == "cpu":
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda x: x.pin_memory(), tree)
