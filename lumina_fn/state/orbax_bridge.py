"""Orbax, imported where it is needed, and quiet where it fails: who waits for it is told, and nobody else."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def load() -> tuple[ModuleType, Any]:
    """orbax.checkpoint, and a handler of trees. With jax this takes seconds and 150 MB, which only those who save or restore pay."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # it would look for accelerators, and take them
    import orbax.checkpoint

    handler = orbax.checkpoint.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    return orbax.checkpoint, handler


@contextmanager
def quiet() -> Iterator[None]:
    """Its threads raise to who waits for them, and four times more to the terminal, with pages of traceback.

    After an error that stays shut: what was still being written fails later.
    """
    raised, unraisable = threading.excepthook, sys.unraisablehook
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]  # the second: of tasks that nobody waited for
    levels = [log.level for log in logs]

    def of_thread(error: Any) -> None:
        if not type(error.thread).__module__.startswith("orbax."):
            raised(error)

    def of_callback(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":
            unraisable(error)

    threading.excepthook, sys.unraisablehook = of_thread, of_callback
    for log in logs:
        log.setLevel(logging.CRITICAL)
    yield
    threading.excepthook, sys.unraisablehook = raised, unraisable
    for log, level in zip(logs, levels, strict=True):
        log.setLevel(level)
