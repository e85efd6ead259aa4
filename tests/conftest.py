"""Before anything of the house is imported: shapes and types of every call are checked in tests, and only there."""

import atexit
import os
import signal
import tempfile

import pytest
from jaxtyping import install_import_hook

from tests.support import shapes
from tests.support.sweep import (  # noqa: F401  (pytest calls these)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_terminal_summary,
)

# Code compiled by earlier runs is not trusted: a compiler that was killed leaves an empty library, which Inductor loads ever after.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # set where this is a worker: all of a session share one
    compiled = tempfile.TemporaryDirectory(prefix="lumina-compiled-", ignore_cleanup_errors=True)
    atexit.register(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name

install_import_hook(["ops", "lumina_fn"], f"{shapes.__name__}.checked")


@pytest.fixture(autouse=True)
def ctrl_c() -> None:
    """Listened to by every test and by what it starts: a command's end ignores it, a shell's background job too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
