"""Batches made ahead are the same batches; what goes wrong is heard of; no thread stays."""

import threading
import time
from itertools import count

import pytest
import torch

from lumina_fn.features import prefetch
from lumina_fn.loss import Batch


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 4])
def test_items_come_in_order(depth):
    with prefetch.ahead(range(100), depth) as items:
        assert list(items) == list(range(100))
    assert not alive()


def test_no_more_than_the_depth_is_made_ahead():
    made = []
    with prefetch.ahead((made.append(i) or i for i in count()), 3) as items:
        for i in range(5):
            assert next(items) == i
            assert len(made) <= i + 1 + 3
        deadline = time.monotonic() + 10
        while len(made) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made) == 8
    assert not alive()


def test_an_error_is_raised_where_its_item_is_read():
    def source():
        yield 1
        raise OSError("the disk is gone")

    with prefetch.ahead(source()) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)
    assert not alive()


def test_a_reader_that_fails_leaves_no_thread():
    with pytest.raises(ZeroDivisionError), prefetch.ahead(count(), 2) as items:
        1 / next(items)
    assert not alive()


def test_what_was_not_read_is_not_made(monkeypatch):
    with prefetch.ahead(count(), 2):
        pass
    assert not alive()


def test_tensors_are_pinned_where_a_device_copies_them(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    assert prefetch.pinned(batch, torch.device("cpu")) is batch
    assert not pinned
    assert isinstance(prefetch.pinned(batch, torch.device("cuda")), Batch)
    assert len(pinned) == 2
