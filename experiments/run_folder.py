"""OUT, the folder of a run: one process writes it at a time, and what an earlier run left there is never mixed with it."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_fn import files
from lumina_fn.errors import InputError

CONTENTS = {"metrics.jsonl", "model", "last_good"}


@contextmanager
def made(out: Path, overwrite: bool) -> Iterator[None]:
    """OUT, made and locked by this process; what an earlier run left there is an error, or removed with `overwrite`."""
    with files.writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # The root has no name, and is never free.
        opened = (out.parent / f".{out.name}.lock").open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{out} is being written by process {file.read().strip()}: wait for it or stop it"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        check(out, overwrite)
        with files.writable(out):
            if out.exists():
                shutil.rmtree(out)
            out.mkdir()
        yield


def check(out: Path, overwrite: bool) -> None:
    """InputError unless OUT is free, or holds a run and may be overwritten."""
    with files.writable(out):
        if not out.exists():
            return
        if not overwrite:
            raise InputError(f"{out} exists: give a new place, or --overwrite to start afresh there")
        strangers = [] if not out.is_dir() else sorted(p.name for p in out.iterdir() if p.name not in CONTENTS)
        if strangers or not out.is_dir():
            raise InputError(
                f"{out} is no run's folder{f' (it holds {strangers[0]})' if strangers else ''}: give another place"
            )
