"""Before anything of the house is imported: shapes and types of every call are checked in tests, and only there."""

import atexit
import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

from tests import shapes

# Code compiled by earlier runs is not trusted: a compiler that was killed leaves an empty library, which Inductor loads ever after.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # set where this is a worker: all of a session share one
    compiled = tempfile.TemporaryDirectory(prefix="lumina-compiled-", ignore_cleanup_errors=True)
    atexit.register(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name

install_import_hook(["ops", "lumina_fn"], f"{shapes.__name__}.checked")


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As it was: a command's end ignores SIGINT, and what later tests start would inherit that."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
