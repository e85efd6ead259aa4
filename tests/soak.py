"""Kill a training run again and again, and look whether anything it saved was lost.

    python -m tests.soak 100

Two ranks save after every step and keep two checkpoints, so that they are always stepping, saving or pruning. Each trial goes on
from what the one before left, kills a rank, the launcher, or all of them at a random moment, and then demands that no process is
left, that every checkpoint that is listed is whole, that the newest is no older than any that was ever listed, and that it is to
the bit what an undisturbed run had at its step.
"""

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import torch.utils._pytree as pytree

from lumina_fn import checkpoint, model
from lumina_fn.config import ModelConfig
from lumina_fn.state import manifest
from tests.support import folders
from tests.support.paths import ROOT
from tests.support.small_run import CODES, write_features

STEPS = 40  # of a run; then the next one begins
START, TRAINING = 8.0, 4.0  # seconds of which a moment is drawn: since the launch, and since the first new checkpoint
LAUNCH, END = 120, 30  # seconds at the most, until a first checkpoint and until all processes are gone


def flags(folder: Path, out: Path) -> list[str]:
    (folder / "tokenizer").mkdir(exist_ok=True)
    ids = folders.write_tokenizer(folder / "tokenizer", CODES)
    if not (folder / "lm").exists():
        cfg = ModelConfig(
            vocab=ids.code0 + CODES, width=96, layers=4, heads=4, kv_heads=2, hidden=192, max_positions=160, ids=ids
        )
        checkpoint.save_model(folder / "lm", model.init(cfg), cfg, source=folder / "tokenizer")
        write_features(folder / "features", folder / "tokenizer", ids)
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2, "-m", "experiments.finetune"]
    run = [
        "--model",
        folder / "lm",
        "--features",
        folder / "features",
        "--out",
        out,
        "--device",
        "cpu",
        "--compile",
        "off",
    ]
    how = ["--batch", 3, "--caption-drop", 0.5, "--lr", 1e-2, "--log-every", 1, "--steps", STEPS, "--save-every", 1]
    return [str(word) for word in (*torchrun, *run, *how)]


def digest(checkpoints: Path, step: int) -> str:
    """Of every number of a state."""
    state, _ = checkpoint.restore(checkpoints, step)
    whole = hashlib.sha256()
    for leaf in pytree.tree_leaves(state):
        whole.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def started(command: list[str], said: Path) -> psutil.Popen:
    with said.open("w") as file:
        return psutil.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def ranks_of(launcher: psutil.Popen) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [p for p in launcher.children(recursive=True) if "RANK" in p.environ()]
    return []


def newest(checkpoints: Path) -> int:
    """The last step that is listed, 0 where none is."""
    return max(manifest.steps(checkpoints), default=0)


def about(out: Path) -> list[psutil.Process]:
    """All processes whose command names a run, whoever started them."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(out) in (p.info["cmdline"] or [])]


def killed(command: list[str], out: Path, said: Path, pick: random.Random) -> tuple[str | None, int]:
    """Start the run and kill some of it: what, in the middle of what (None where it was done before), and the newest step just before."""
    checkpoints = out / "checkpoints"
    before = manifest.steps(checkpoints)[-1:]
    launcher = started(command, said)
    deadline = time.monotonic() + LAUNCH
    if pick.random() < 0.15:
        time.sleep(pick.uniform(0, START))
    else:
        while manifest.steps(checkpoints)[-1:] == before and launcher.poll() is None:
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.01)
        time.sleep(pick.uniform(0, TRAINING))
    ranks = ranks_of(launcher)
    victims = pick.choice([ranks[:1], ranks[1:2], [launcher], [launcher, *ranks], [*ranks, launcher]])
    if launcher.poll() is not None:
        return None, newest(checkpoints)
    reached = newest(checkpoints)
    for victim in victims or [launcher]:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    names = [path.suffix for path in checkpoints.iterdir()] if checkpoints.exists() else []
    launcher.wait(END)
    _, left = psutil.wait_procs(ranks, END)
    assert not left, f"{left} outlived {victims}"
    psutil.wait_procs(about(out), END)  # ranks that the launcher had begun when it was looked at
    assert not about(out), f"{about(out)} outlived {victims}"
    doing = "pruning" if ".old" in names else "saving" if ".tmp" in names else "between"
    who = "all" if len(victims) > 1 else "launcher" if launcher in victims or not victims else "one rank"
    return f"{who}, {doing}", reached


def soak(trials: int, seed: int, say: Callable[[str], None]) -> Counter[str]:
    """What was killed how often, and in the middle of what; AssertionError where something was lost."""
    pick, seen = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calm = started([*flags(folder, folder / "calm"), "--keep", str(STEPS)], folder / "said")
        assert calm.wait(600) == 0, (folder / "said").read_text()
        expected = {step: digest(folder / "calm/checkpoints", step) for step in range(1, STEPS + 1)}
        run, reached = 0, 0
        while seen.total() < trials:
            out = folder / f"run{run}"
            what, listed = killed(flags(folder, out), out, folder / "said", pick)
            reached = max(reached, listed)
            found = checkpoint.verify(out / "checkpoints")
            assert not any(found.values()), found
            last = max(found, default=0)
            assert last >= reached, f"step {reached} was lost: {list(found)}"
            assert not last or digest(out / "checkpoints", last) == expected[last], f"step {last} differs"
            reached = last
            if what is None:
                assert last == STEPS, (folder / "said").read_text()
            else:
                seen[what] += 1
                say(f"{seen.total()}: killed {what}; the newest of {list(found)} is as it should be")
            if last == STEPS:
                run, reached = run + 1, 0
    return seen


if __name__ == "__main__":
    counts = soak(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0, say=print)
    for moment in ("saving", "pruning"):
        assert any(moment in what for what in counts), f"no kill came while {moment}: {dict(counts)}; give another seed"
    print(f"{counts.total()} trials, nothing lost: {dict(sorted(counts.items()))}")
