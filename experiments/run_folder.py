"""OUT, the folder of a run: one process writes it at a time, and what is not a run's is never removed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_fn import manifest
from lumina_fn.disk import files
from lumina_fn.errors import InputError
from lumina_fn.manifest import CHECKPOINTS, ORIGIN

METRICS, MODEL, LAST_GOOD, PROFILE = "metrics.jsonl", "model", "last_good", "profile"
FINISHED = "finished"  # holds the step whose parameters are in model/
CONTENTS = {METRICS, CHECKPOINTS, ORIGIN, MODEL, LAST_GOOD, FINISHED, PROFILE}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """OUT is written by this process alone, while it lasts. Raises InputError that names the other one."""
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
        yield


@contextmanager
def held(out: Path, resume: str, overwrite: bool) -> Iterator[bool]:
    """OUT, made and locked by this process; whether the run begins afresh there, else what an earlier one left stays."""
    with locked(out):
        afresh = check(out, resume, overwrite)  # under the lock: a run that ended just now saved something
        with files.writable(out):
            if afresh and out.exists():
                shutil.rmtree(out)
            out.mkdir(exist_ok=True)
            files.sync_one(out.parent)
            for path in filter(files.is_unfinished, list(out.iterdir())):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield afresh


def check(out: Path, resume: str, overwrite: bool) -> bool:
    """Whether a run begins afresh there: InputError where OUT holds something else, or a run that this one would spoil."""
    with files.writable(out):
        if not out.exists():
            if resume not in ("no", "auto"):
                raise InputError(f"--resume {resume}: {out} does not exist, there is nothing to go on from")
            return True
        strangers = (
            []
            if not out.is_dir()
            else sorted(p.name for p in out.iterdir() if p.name not in CONTENTS and not files.is_unfinished(p))
        )
        if strangers or not out.is_dir():
            raise InputError(
                f"{out} is no run's folder{f' (it holds {strangers[0]})' if strangers else ''}: give another place"
            )
        if overwrite:
            return True
        if resume == "no" and any(out.iterdir()):
            raise InputError(
                f"{out} holds a run: give a new place, --overwrite to start afresh there, or --resume auto"
            )
        saved = manifest.steps(out / CHECKPOINTS)
        for name in (MODEL, LAST_GOOD):
            if not saved and (out / name).exists():
                raise InputError(
                    f"{out} holds a model and no checkpoint to go on from: give a new place, or --overwrite to start afresh there"
                )
        return not saved and not any((out / CHECKPOINTS).glob("*.aside"))


def finish(out: Path, step: int) -> None:
    """Note that model/ holds the parameters after a step: one of an earlier step may be there when a run that goes on is killed."""
    files.write_atomic(out / FINISHED, f"{step}\n")


def is_finished(out: Path, step: int) -> bool:
    path = out / FINISHED
    return path.exists() and path.read_text().strip() == str(step)
