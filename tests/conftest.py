"""Before anything of the house is imported: shapes and types of every call are checked in tests, and only there."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

from tests import shapes

# Compiled code of the tests stays in the project, and out of what the user's own runs have cached.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "inductor"))

install_import_hook(["ops", "lumina_fn"], f"{shapes.__name__}.checked")
