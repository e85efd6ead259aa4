"""Prepare items ahead in a thread, so that a step does not wait for its batch."""

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
    """An iterator of the items, of which a thread makes up to `depth` in advance. An error of the thread is raised by the iterator.

    The thread ends with the block, even if not all items were read.
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
        except BaseException as error:  # of any kind: it is raised again for the reader
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
    """The tree with tensors in pinned memory, from which `device` copies asynchronously; unchanged for a CPU."""
    if device.type == "cpu":
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda x: x.pin_memory(), tree)
