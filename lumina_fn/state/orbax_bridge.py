"""Orbax, imported at first use, with its log output suppressed: its errors reach the caller that waits."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def load() -> tuple[ModuleType, Any]:
    """The module orbax.checkpoint and a handler for trees. The import takes seconds and, with jax, 150 MB; so it is done at first use."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # else it would search for accelerators and occupy them
    import orbax.checkpoint

    handler = orbax.checkpoint.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    return orbax.checkpoint, handler


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block Orbax's log output is suppressed: its threads print each error four times, beside raising it to the caller.

    After an error it stays suppressed: other writes still under way fail later.
    """
    raised, unraisable = threading.excepthook, sys.unraisablehook
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]  # asyncio: tasks whose result was never retrieved
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
