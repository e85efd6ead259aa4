"""The walk of `make demo`, from drawn pictures to a graded sheet."""

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import finetune, pretokenize, sample
from experiments.demo import report, shapes, splits, tasks
from experiments.demo.grader import grade
from lumina_fn import convert, errors
from lumina_fn.disk import files

SHOWN_NEW, SHOWN_OLD = 32, 8  # prompts on the sheet, the first of each list


def main(run: Path) -> int:
    """Everything is written below the folder `run`."""
    begun = time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    new, old = splits.new_reported(), splits.old_reported()
    specs = new + old
    prompts = run / "prompts.txt"
    files.write_atomic(prompts, "".join(shapes.caption(spec) + "\n" for spec in specs))
    print(f"{len(new)} prompts of a {shapes.NEW}, which the model has never seen, and {len(old)} of what it knows")

    data = tasks.prepare(run / "data", splits.fine_tuning())
    command("lumina_fn.convert", convert.main, tasks.convert_arguments(run))
    command("experiments.pretokenize", pretokenize.main, tasks.pretokenize_arguments(data, run))
    command("experiments.sample", sample.main, tasks.sample_arguments(run / "lm", prompts, run / "before"))
    if command("experiments.finetune", finetune.main, tasks.finetune_flags(run)):
        return 1
    command("experiments.sample", sample.main, tasks.sample_arguments(run / "finetune/model", prompts, run / "after"))

    before, after = (pictures(run / name, len(specs)) for name in ("before", "after"))
    right_before, right_after = ([grade(p, s) for p, s in zip(drawn, specs, strict=True)] for drawn in (before, after))
    share = lambda right: sum(right) / len(right)
    n = len(new)
    summary = {
        "accuracy_before": share(right_before[:n]), "accuracy_after": share(right_after[:n]),
        "accuracy_after_wilson_lower": round(report.wilson(sum(right_after[:n]), n), 4),
        "accuracy_old_before": share(right_before[n:]), "accuracy_old_after": share(right_after[n:]),
        "new_prompts": n, "old_prompts": len(old), "new_concept": shapes.NEW, "sampling": " ".join(tasks.SAMPLING),
        "pictures": "one per prompt; random numbers of (seed 0, prompts 0, 1, 2, ...); none left out", "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    show(run, specs, n, list(zip(before, right_before, after, right_after, strict=True)), summary)
    shutil.copyfile(run / "finetune/metrics.jsonl", run / "metrics.jsonl")
    report.loss_curve(run / "loss.png", run / "metrics.jsonl")
    files.write_atomic(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    print(f"look at {errors.printable(run / 'before_after.png')}")
    return 0


def command(name: str, run: Callable[[Sequence[str]], int | None], arguments: list[str]) -> int:
    """Run one of the commands here, saying which: what it prints below is what it would print on its own."""
    print(f"\n$ python -m {name} {shlex.join(arguments)}", flush=True)
    begun = time.perf_counter()
    code = run(arguments) or 0
    print(f"({time.perf_counter() - begun:.0f} s)", flush=True)
    return code


def pictures(folder: Path, n: int) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / f"{i:04d}_00.png")) for i in range(n)]


def show(run: Path, specs: list[shapes.Spec], n: int, drawn: list, summary: dict) -> None:
    chosen = [*range(SHOWN_NEW), *range(n, n + SHOWN_OLD)]
    image = Image.fromarray
    shown = [
        report.Shown(shapes.caption(specs[i]), image(b), b_right, image(a), a_right)
        for i, (b, b_right, a, a_right) in ((i, drawn[i]) for i in chosen)
    ]
    training = [image(shapes.draw(s)) for pair in zip(*halves(splits.fine_tuning()), strict=True) for s in pair]
    percent = {name: f"{100 * value:.1f} %" for name, value in summary.items() if name.startswith("accuracy")}
    footer = [
        f"all {n} prompts of the new shape: {percent['accuracy_before']} right before, {percent['accuracy_after']} after "
        f"(95 % sure of at least {percent['accuracy_after_wilson_lower']})",
        f"all {len(specs) - n} prompts of the old shapes: {percent['accuracy_old_before']} before, {percent['accuracy_old_after']} after",
        f"first {SHOWN_NEW} of the new and first {SHOWN_OLD} of the old prompts shown; none was trained on; "
        f"{summary['seconds']:.0f} s on this machine",
    ]
    report.sheet(
        run / "before_after.png",
        f"A model that has never seen a {shapes.NEW} learns to draw it",
        training,
        shown,
        footer,
    )


def halves(specs: list[shapes.Spec]) -> tuple[list[shapes.Spec], list[shapes.Spec]]:
    return specs[: len(specs) // 2], specs[len(specs) // 2 :]
