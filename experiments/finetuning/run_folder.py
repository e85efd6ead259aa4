"""OUT, the folder of a run: one process writes it at a time, and only files of a run are removed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_fn.disk import files, locks, marks, places, reading
from lumina_fn.errors import InputError
from lumina_fn.state import manifest
from lumina_fn.state.manifest import CHECKPOINTS, ORIGIN

KIND = "run"
METRICS, MODEL, LAST_GOOD, PROFILE = "metrics.jsonl", "model", "last_good", "profile"
FINISHED = "finished"  # holds the step whose parameters are in model/
CONTENTS = {METRICS, CHECKPOINTS, ORIGIN, MODEL, LAST_GOOD, FINISHED, PROFILE}
# Each of them but the first has a mark of its own.
_FOLDERS = re.compile(rf"({CHECKPOINTS}|{ORIGIN}|{MODEL}|{LAST_GOOD}|{PROFILE})/")


def is_ours(path: str) -> bool:
    """Whether a run writes this path below OUT (a folder's path ends with "/"). Files in result folders are listed in their marks."""
    if path in (METRICS, FINISHED) or _FOLDERS.fullmatch(path) or files.is_unfinished(Path(path)):
        return True
    return path.startswith(f"{CHECKPOINTS}/") and manifest.is_ours(path.removeprefix(f"{CHECKPOINTS}/"))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A context in which only this process writes OUT. Raises InputError that names another process that does."""
    with places.writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with locks.one_writer(out):
        yield


@contextmanager
def held(out: Path, resume: str, overwrite: bool) -> Iterator[bool]:
    """A context in which OUT exists and is locked by this process; True if the run begins afresh in OUT, which is then emptied."""
    with locked(out):
        afresh = check(out, resume, overwrite)  # with the lock: a run that has just ended may have saved something
        with places.writable(out):
            out.mkdir(exist_ok=True)
        with locks.held_folder(out):
            with places.writable(out):
                if afresh:
                    files.empty(out, is_ours)
                files.remove_unfinished(out)
                if marks.read(out) is None:
                    files.write_atomic(out / marks.NAME, marks.text(KIND, []))
                files.sync_one(out.parent)
            yield afresh


def check(out: Path, resume: str, overwrite: bool) -> bool:
    """Whether a run begins afresh in OUT. Raises InputError if OUT holds something else, or a run that this one would damage."""
    with places.writable(out):
        if not out.exists():
            if resume not in ("no", "auto"):
                raise InputError(f"--resume {resume}: {out} does not exist, there is nothing to go on from")
            return True
        if not out.is_dir():
            raise InputError(f"{out} is no run's folder: give another place")
        if overwrite:
            marks.check(out, KIND, is_ours)
            return True
        mark = marks.read(out)
        if mark is not None and mark.kind != KIND:
            raise InputError(f"{out} is no run's folder ({mark.kind}): give another place")
        if mark is None and (
            strangers := sorted(p.name for p in out.iterdir() if p.name not in CONTENTS and not files.is_unfinished(p))
        ):
            raise InputError(f"{out} is no run's folder (it holds {strangers[0]}): give another place")
        if resume == "no" and any(path.name != marks.NAME for path in out.iterdir()):
            raise InputError(
                f"{out} holds a run: give a new place, --overwrite to start afresh there, or --resume auto"
            )
        saved = manifest.steps(out / CHECKPOINTS)
        for name in (MODEL, LAST_GOOD):
            if not saved and (out / name).exists():
                raise InputError(
                    f"{out} holds a model and no checkpoint to go on from: give a new place, or --overwrite to start afresh there"
                )
        afresh = not saved and not any((out / CHECKPOINTS).glob("*.aside"))
        if afresh and mark is None:  # without a mark, only files of a run may be there
            marks.check(out, KIND, is_ours)
        return afresh


def finish(out: Path, step: int) -> None:
    """Record that model/ holds the parameters after this step. A continued run that was killed may have left those of an earlier step."""
    files.write_atomic(out / FINISHED, f"{step}\n")


def is_finished(out: Path, step: int) -> bool:
    """Whether model/ holds the parameters after this step."""
    path = out / FINISHED
    return path.exists() and reading.text(path, 100, "the step of a finished run").strip() == str(step)
