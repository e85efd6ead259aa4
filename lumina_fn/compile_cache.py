"""Inductor's cache of compiled graphs, which may be damaged: by a full disk, a kill, or whoever else writes to /tmp.

Inductor looks again at libraries that do not load, and trusts the rest: a Python file that was cut short ends every later run.
"""

import logging
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import clear_caches, fresh_cache
from torch.fx import GraphModule

from lumina_fn.disk import locks
from lumina_fn.errors import printable

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"[a-z2-7]{2}|locks|precompiled_headers")
_FILE = re.compile(r"c?[a-z2-7]{40,}\.[a-z0-9.]+")  # a hash and endings: .py, .main.so, .cpp, .h.gch, .lock


def compiled(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """`torch._inductor.compile`. Where it fails and, without what lies in the cache, does not, the cache is emptied and that is said."""
    kept = GraphModule(graph, deepcopy(graph.graph))  # compiling rewrites the graph
    try:
        return torch._inductor.compile(graph, examples)
    except Exception as error:
        why, where = str(error).strip().splitlines() or [type(error).__name__], _place()
        with fresh_cache(delete=False):  # its own folder: what is loaded from there stays in use
            made = torch._inductor.compile(kept, examples)
        if where is not None:
            discard(where)
        clear_caches()
        log.warning(
            printable(
                f"note: the compile cache in {where} was damaged ({why[-1]:.200}): it is emptied, and compiled anew"
            )
        )
        return made


def discard(folder: Path) -> None:
    """Remove what Inductor wrote into its cache's folder, and nothing else: it may be any folder."""
    for inner in _folders(folder):
        locks.remove_own(inner, _FILE)


def _folders(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if _FOLDER.fullmatch(inner.name) and inner.is_dir() and not inner.is_symlink():
            yield inner


def _place() -> Path | None:
    try:
        return Path(cache_dir())
    except OSError:  # it cannot be made there
        return None
