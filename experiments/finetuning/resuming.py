"""How a run continues after it was ended: from which checkpoint, and whether its settings are the same."""

import hashlib
import json
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.finetuning import feature_folders
from experiments.finetuning.run_folder import METRICS
from experiments.launching.distributed import World
from lumina_fn import config, train
from lumina_fn.config import ModelConfig
from lumina_fn.disk import files, reading
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.sharding import Mesh
from lumina_fn.state import manifest, saved_state
from lumina_fn.state.manifest import CHECKPOINTS
from lumina_fn.state.saved_state import Saving
from lumina_fn.train import TrainState

# Flags that decide what is computed. Flags that decide how, such as --strategy and --remat, may change when a run continues.
MATHEMATICS = (
    "batch", "lr", "warmup", "schedule", "weight_decay", "clip", "z_weight", "caption_drop", "seed", "last", "dtype",
    "param_dtype", "reduce_dtype",
)  # fmt: skip
LATER = {
    "order": "shuffled",
    "pack": None,
    "long": "cut",
}  # further such flags, with the value that runs had before the flag existed
FIRST = 3  # a run also saves after this many steps, so that a failing disk is found before hours are lost


@dataclass(frozen=True)
class OfRun:
    """The part of a checkpoint's metadata that is checked when a run continues."""

    settings: dict[str, Any]
    model: dict[str, Any]
    features: str | list[tuple[str, str]]
    totals: dict[Literal["noise", "signal"], float]


class Checkpoints:
    """The checkpoints of a run, written one at a time in the background."""

    def __init__(
        self, folder: Path, settings: Any, steps: range, mesh: Mesh | None, world: World, about: Mapping[str, Any]
    ):
        self.folder, self.every = folder, settings.save_every
        self.keep = manifest.Keep(settings.keep, settings.keep_every)
        self.steps, self.mesh, self.world, self.about = steps, mesh, world, about
        self.totals: Mapping[str, float] = {}  # sums of the metrics so far, saved in the next checkpoint
        self.last = steps.start  # the step that was saved last, or that the run started from
        self._barrier = world.background_barrier()
        self._saving: Saving | None = None

    def save_if_due(self, step: int, state: TrainState) -> None:
        """Save this step if a checkpoint is due. Raises InputError, as `save` and `wait` do, if one could not be written."""
        if self._saving is not None and self._saving.failed():
            self.wait()
        if self.every and (step % self.every == 0 or step in (self.steps.start + FIRST, self.steps.stop)):
            self.save(step, state)

    def save(self, step: int, state: TrainState) -> None:
        """Start to save this step, unless it is saved already, no checkpoints are wanted (`every` is 0) or the state is not good."""
        self.wait()
        if step == self.last or not self.every or not is_good(state, self.world):
            return
        meta = {**self.about, "totals": dict(self.totals), "data": {"steps": step}}
        self._saving = saved_state.save(self.folder, state, meta, self.mesh, barrier=self._barrier, keep=self.keep)
        self.last = step

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None


def is_good(state: TrainState, world: World) -> bool:
    """Whether the last step was taken and left finite numbers on every rank. Every rank must call this at the same place."""
    return int(state.streak) == 0 and world.total(not train.is_finite(state)) == 0


def last_good(checkpoints: Path, state: TrainState) -> int | None:
    """The last saved step whose parameters gave a finite loss in the step after it; None if there is none."""
    # The last step with a finite loss, which is the loss of the parameters before that step.
    taken = int(state.step) - int(state.streak)
    return max((step for step in manifest.steps(checkpoints) if step < taken), default=None)


def starting_step(checkpoints: Path, resume: str) -> int:
    """The step whose checkpoint a run continues from; 0 if there is none. Removes what a killed run left incomplete. Raises InputError."""
    manifest.tidy(checkpoints)
    saved = manifest.steps(checkpoints)
    if resume == "no" or (not saved and resume in ("auto", "last-good")):
        return 0
    if resume == "auto":
        return saved[-1]
    if resume == "last-good":
        good = manifest.newest_good(checkpoints)
        if good is None:
            raise InputError(
                f"{checkpoints} holds no good checkpoint: give another --out, or --overwrite to start afresh"
            )
        return good
    if int(resume) not in saved:
        raise InputError(
            f"--resume {resume}: there are checkpoints of the steps {', '.join(map(str, saved)) or '(none)'}"
        )
    return int(resume)


def identity(
    settings: Any,
    cfg: ModelConfig,
    long: str,
    stored: torch.dtype,
    compute: torch.dtype,
    exchanged: tuple[torch.dtype, torch.dtype],
) -> dict[str, Any]:
    """The settings that must stay the same when a run continues, and a record of how it was made, as values of JSON.

    long        what is done with items longer than the context, `long_items.Fitted.choice`
    exchanged   dtypes in which parameters are gathered and gradients are summed
    """
    param_dtype, reduce_dtype = exchanged
    chosen = {name: getattr(settings, name) for name in MATHEMATICS}
    chosen |= {"dtype": str(compute), "param_dtype": str(param_dtype), "reduce_dtype": str(reduce_dtype)}
    if settings.schedule == "cosine":
        chosen["steps"] = settings.steps  # the learning rate ends at 0 there
    chosen |= {name: getattr(settings, name) for name in LATER} | {"long": long}
    sets = [
        (
            hashlib.sha256(reading.contents(folder / shards.INDEX, reading.MAX_JSON, shards.EXPECTED)).hexdigest(),
            str(weight or ""),
        )
        for folder, weight in feature_folders.named(settings.features)
    ]
    about = {
        "settings": chosen,
        "flags": {name: str(value) for name, value in asdict(settings).items()},  # all flags, for people who read it
        "model": asdict(cfg),
        "features": sets[0][0] if len(sets) == 1 else sets,
        "code": _revision(),
        "torch": torch.__version__,
        "stored_dtype": str(stored).removeprefix("torch."),
    }
    return json.loads(json.dumps(about))


def check(meta: Mapping[str, Any], now: Mapping[str, Any], out: Path, features: Sequence[Path]) -> None:
    """Raises InputError that names every difference between a checkpoint's identity and this run's."""
    try:
        of_run = reading.checked(OfRun, meta, out, "checkpoints of finetune's")
    except InputError as error:
        raise InputError(f"{out} holds checkpoints that are not finetune's ({error}): give another --out") from error
    then = {"settings": LATER | of_run.settings, "model": config.LATER | of_run.model, "features": meta["features"]}
    wrong = [
        f"--{name.replace('_', '-')} was {then['settings'].get(name)}, is {now['settings'].get(name)}"
        for name in sorted(then["settings"].keys() | now["settings"].keys())
        if then["settings"].get(name) != now["settings"].get(name)
    ]
    names = sorted(then["model"].keys() | now["model"].keys())
    wrong += [f"the model's {name} differs" for name in names if then["model"].get(name) != now["model"].get(name)]
    if then["features"] != now["features"]:
        wrong.append(f"--features {', '.join(map(str, features))} is not the feature set that it began with")
    if wrong:
        raise InputError(f"{out} holds another run: {'; '.join(wrong)}; give the old ones, or another --out")


def cut_back(out: Path, step: int, world: World) -> None:
    """Remove the metrics after a step, and set later checkpoints aside."""
    for path in manifest.set_aside(out / CHECKPOINTS, step):
        world.say(f"note: a later checkpoint is set aside as {path}; remove it when it is not needed")
    path = out / METRICS
    if not path.exists():
        return
    kept = []
    for _, line in reading.lines(path, "the lines of a run's metrics"):
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
    files.write_atomic(path, "".join(kept))


def farewell(argv: Sequence[str], number: int, step: int, *, saved: bool, alone: bool) -> str:
    """The message of a run that a signal stopped, with the command that resumes it: `argv` without --resume and --overwrite."""
    name = signal.Signals(number).name
    if not saved:
        return f"stopped by {name} after step {step}; nothing was saved, as --save-every 0 asks for"
    at = f"after step {step}, which is saved" if step else "before the first step, with nothing to save"
    words, kept = iter(argv), ["python" if alone else "torchrun ...", "-m", "experiments.finetune"]
    for word in words:
        if word == "--resume":
            next(words)
        elif word != "--overwrite" and not word.startswith("--resume="):
            kept.append(shlex.quote(word))
    return f"stopped by {name} {at}; resume with: {' '.join(kept)}"


def _revision() -> str | None:
    """The commit of the running code; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None
