"""A run that is ended and started again is the run that was not ended."""

import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from experiments.finetuning import resuming
from experiments.launching import stopping
from experiments.launching.stopping import Stop
from lumina_fn import checkpoint
from lumina_fn.state import manifest
from tests.experiments.launching.test_launch import launch, rows, torchrun, until  # noqa: F401
from tests.support.paths import ROOT
from tests.support.resumed_runs import RUN, assert_same_bits, finetune, numbers, written_inputs  # noqa: F401

SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_seven_steps_and_thirteen_are_twenty(inputs, tmp_path, compile):
    flags = ["--compile", compile, "--save-every", 7]
    finetune(inputs, tmp_path / "straight", *flags, "--steps", 20)
    finetune(inputs, tmp_path / "run", *flags, "--steps", 7)
    said = finetune(inputs, tmp_path / "run", *flags, "--steps", 20)
    assert "going on after step 7" in said
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    states = [checkpoint.restore(tmp_path / name / "checkpoints", 20)[0] for name in ("run", "straight")]
    assert_same_bits(*states)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run/model" / name).read_bytes() == (tmp_path / "straight/model" / name).read_bytes()


@SLOW
def test_four_processes_then_two_then_three_then_one(inputs, tmp_path, launch):  # noqa: F811
    """The loss curve is that of one process, whatever number goes on."""
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
        flags = ["--compile", "off", "--dtype", dtype, "--save-every", 100]
        finetune(inputs, tmp_path / f"straight {dtype}", *flags, "--steps", 12)
        out = tmp_path / dtype
        for ranks, steps in ((4, 3), (2, 6), (3, 9)):
            run = launch(*torchrun(ranks=ranks), *inputs, "--out", out, *RUN, *flags, "--steps", steps)
            assert run.wait(180) == 0, run.text()
        finetune(inputs, out, *flags, "--steps", 12)
        for row, expected in zip(rows(out), rows(tmp_path / f"straight {dtype}"), strict=True):
            for name in ("loss", "ce", "z", "grad_norm"):
                assert row[name] == pytest.approx(expected[name], abs=tolerance), (row["step"], name)


@SLOW
def test_jax_is_loaded_only_by_who_saves_or_restores():
    code = "import sys, experiments.finetune; sys.exit(bool({'jax', 'orbax'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_saved_and_goes_on(inputs, tmp_path, launch, number):  # noqa: F811
    flags = [*inputs, "--out", tmp_path / "run", *RUN, "--compile", "off", "--save-every", 10_000, "--steps", 100_000]
    run = launch(sys.executable, "-m", "experiments.finetune", *flags)
    until(lambda: len(rows(tmp_path / "run")) >= 5 or run.process.poll() is not None, 60, run)
    run.process.send_signal(number)
    assert run.wait(30) == 128 + number
    [line] = [line for line in run.text().splitlines() if "stopped by" in line]
    assert "resume with: python -m experiments.finetune --model" in line
    [*_, at] = manifest.steps(tmp_path / "run/checkpoints")
    assert rows(tmp_path / "run")[-1]["step"] == at
    assert not (tmp_path / "run/model").exists()


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_ranks_stop_after_the_same_step(inputs, tmp_path, launch, number):  # noqa: F811
    flags = [*inputs, "--out", tmp_path / "run", *RUN, "--compile", "off", "--save-every", 10_000]
    run = launch(*torchrun(ranks=3), *flags, "--steps", 100_000)
    until(lambda: len(rows(tmp_path / "run")) >= 5 or run.process.poll() is not None, 120, run)
    run.process.send_signal(number)
    assert run.wait(40) == 1  # torchrun's own, whatever its ranks return
    assert run.text().count("resume with: torchrun ... -m experiments.finetune") == 1, run.text()
    [*_, at] = manifest.steps(tmp_path / "run/checkpoints")
    assert checkpoint.verify(tmp_path / "run/checkpoints")[at] is None
    assert f"after step {at}, which is saved" in run.text()
    again = launch(*torchrun(ranks=2), *flags, "--steps", at + 2)
    assert again.wait(120) == 0, again.text()
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, at + 3))


@SLOW
def test_a_killed_rank_is_started_again_and_nothing_is_lost(inputs, tmp_path, launch):  # noqa: F811
    """torchrun --max-restarts: the parameters are those of an undisturbed run, to the bit."""
    flags = [*inputs, *RUN, "--compile", "off", "--save-every", 5, "--steps", 300]
    calm = launch(*torchrun(), *flags, "--out", tmp_path / "calm")
    assert calm.wait(200) == 0, calm.text()
    run = launch(*torchrun("--max-restarts", 1), *flags, "--out", tmp_path / "run")
    until(lambda: manifest.steps(tmp_path / "run/checkpoints")[-1:] > [20] or run.process.poll() is not None, 120, run)
    run.rank(1).kill()
    assert run.wait(200) == 0, run.text()
    assert "going on after step" in run.text()
    assert numbers(tmp_path / "run") == numbers(tmp_path / "calm")
    assert_same_bits(*(checkpoint.restore(tmp_path / name / "checkpoints", 300)[0] for name in ("run", "calm")))


class Gone:
    """A store whose launcher has ended."""

    def set(self, *_) -> None:
        raise RuntimeError("Broken pipe")


@pytest.mark.parametrize("asked", [True, False])
def test_ranks_that_cannot_agree_where_to_stop_do_not_wait_for_ever(monkeypatch, asked):
    """Rank 1 never says which step it is in; or the store is gone when the signal comes."""
    monkeypatch.setattr(stopping, "ECHO", 0)
    store, said = dist.HashStore(), []
    store.set_timeout(timedelta(seconds=0.1))
    if asked:
        stop = Stop(0, 2, store, said.append)
        stop.ask(signal.SIGTERM)
        stop.listen(threading.Event())
    else:
        Stop(0, 2, Gone(), said.append).ask(signal.SIGTERM)
    assert ["cannot agree where to stop" in why for why in said] == [True]


def test_a_stop_before_the_first_step_says_so():
    said = resuming.farewell([], signal.SIGTERM, 0, saved=True, alone=True)
    assert said.startswith("stopped by SIGTERM before the first step, with nothing to save; resume with: python -m")


def test_the_command_that_goes_on_does_not_begin_again():
    argv = ["--out", "my run", "--overwrite", "--resume", "7", "--steps", "9", "--resume=3"]
    said = resuming.farewell(argv, signal.SIGTERM, 5, saved=True, alone=True)
    assert said.endswith("resume with: python -m experiments.finetune --out 'my run' --steps 9")
