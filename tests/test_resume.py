"""A run that is ended and started again is the run that was not ended."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from experiments import finetune as command
from experiments import processes, resuming, run_folder, stopping
from experiments.distributed import World
from experiments.stopping import Stop
from lumina_fn import checkpoint, convert, files, manifest, model, saved_state, sharding, train
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from tests.small_run import write_features, write_inputs
from tests.test_launch import launch, rows, torchrun, until  # noqa: F401

TINY = ModelConfig(vocab=53, width=16, layers=2, heads=2, kv_heads=1, hidden=24)
OPT = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)
SLOW = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("resume"))


# 7 items in steps of 3, 3 and 1.
RUN = ["--log-every", 1, "--batch", 3, "--caption-drop", 0.5, "--lr", 1e-2, "--noise-scale-every", 2, "--keep", 3]


def finetune(inputs, out: Path, *flags, code: int = 0) -> str:
    """The command in a process of its own; what it says."""
    command = [sys.executable, "-m", "experiments.finetune", *inputs, "--out", out, *RUN, *flags]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def numbers(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows(out)]


def assert_same_bits(a, b) -> None:
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)


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


def random_state(seed: int = 0) -> train.TrainState:
    state = train.init_state(model.init(TINY, seed=seed), OPT)
    generator = torch.Generator().manual_seed(seed)
    noise = lambda tree: pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator), tree)
    return state._replace(step=torch.tensor(9), mu=noise(state.mu), nu=noise(state.nu), skipped=torch.tensor(2))


def cut(state: train.TrainState, mesh) -> train.TrainState:
    parts = lambda tree: model.over_units(lambda unit: sharding.shard(unit, mesh), tree)
    return state._replace(params=parts(state.params), mu=parts(state.mu), nu=parts(state.nu))


def moved(rank: int, size: int, folder: Path, strategy: str, shard_size: int | None, step: int) -> None:
    """Restore the step before, compare, and save this one."""
    mesh = sharding.Mesh(dist.group.WORLD, rank, size, "cpu", strategy, shard_size=shard_size)
    want = cut(random_state(), mesh)
    if manifest.steps(folder):
        state, meta = checkpoint.restore(folder, mesh=mesh)
        assert meta == {"step": step - 1}
        assert_same_bits(state, want)
    barrier = dist.new_group(backend="gloo")
    checkpoint.save(folder, step, want, {"step": step}, mesh, barrier=lambda: dist.barrier(barrier)).wait()
    dist.barrier()


@SLOW
def test_any_mesh_restores_what_any_other_saved(tmp_path):
    meshes = [
        (4, "fsdp", None),
        (2, "hybrid", 1),
        (3, "sdp", None),
        (4, "hybrid_zero2", 2),
        (1, "fsdp", None),
        (2, "no", None),
    ]
    for step, (size, strategy, shard_size) in enumerate(meshes):
        processes.run(size, moved, tmp_path, strategy, shard_size, step)
    state, _ = checkpoint.restore(tmp_path)
    assert_same_bits(state, random_state())
    checkpoint.save(tmp_path, 99, state, {"step": 98}).wait()
    processes.run(3, moved, tmp_path, "fsdp", None, 99)


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


def test_a_save_is_of_the_moment_it_began(tmp_path):
    state = random_state()
    want = pytree.tree_map(torch.clone, state)
    saving = checkpoint.save(tmp_path, 9, state, {})
    for leaf in pytree.tree_leaves(state):
        leaf.zero_()  # as the next step does
    saving.wait()
    assert_same_bits(checkpoint.restore(tmp_path)[0], want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(tmp_path, dtype):
    state = train.init_state(model.init(TINY, dtype=dtype), OPT)
    checkpoint.save(tmp_path, 0, state, {}).wait()
    assert_same_bits(checkpoint.restore(tmp_path, 0)[0], state)


def test_what_is_kept(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, random_state(), {}, keep=2, keep_every=3).wait()
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "7"]
    assert checkpoint.verify(tmp_path) == dict.fromkeys([3, 6, 7])


def test_a_step_that_is_saved_again_is_exchanged(tmp_path, monkeypatch):
    """At no moment there is neither."""
    checkpoint.save(tmp_path, 9, random_state(), {}).wait()
    monkeypatch.delattr(Path, "rename")
    checkpoint.save(tmp_path, 9, random_state(1), {}).wait()
    assert [p.name for p in tmp_path.iterdir()] == ["9"]
    assert_same_bits(checkpoint.restore(tmp_path)[0], random_state(1))


def test_the_folder_of_checkpoints_is_forced_onto_the_disk(tmp_path, monkeypatch):
    synced, sync = [], files.sync_one
    monkeypatch.setattr(files, "sync_one", lambda path: (synced.append(path), sync(path)))
    checkpoint.save(tmp_path / "checkpoints", 9, random_state(), {}).wait()
    assert {tmp_path, tmp_path / "checkpoints"} <= set(synced)


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


@pytest.fixture(scope="session")
def trained(inputs, tmp_path_factory):
    """A finished run of eight steps with checkpoints at 3, 6 and 8."""
    out = tmp_path_factory.mktemp("trained") / "run"
    finetune(inputs, out, "--compile", "off", "--steps", 8, "--save-every", 6)
    assert manifest.steps(out / "checkpoints") == [3, 6, 8]
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


OTHERS = [
    ["--lr", "2e-2"],
    ["--seed", "1"],
    ["--batch", "2"],
    ["--dtype", "float64"],
    ["--schedule", "cosine"],
    ["--clip", "2"],
]


@SLOW
@pytest.mark.parametrize("flags", OTHERS, ids=str)
def test_another_run_is_not_mixed_in(inputs, run, flags):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = finetune(inputs, run, "--compile", "off", "--steps", 20, *flags, code=2)
    assert f"{flags[0]} was" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@SLOW
def test_other_features_are_not_continued(inputs, run, tmp_path):
    tokenizer = Path(inputs[1]).parent / "tokenizer"
    write_features(tmp_path / "others", tokenizer, checkpoint.read_config(inputs[1]).ids, count=6)
    said = finetune(inputs, run, "--steps", 20, "--compile", "off", "--features", tmp_path / "others", code=2)
    assert f"{tmp_path / 'others'} is not the feature set that it began with" in said


@SLOW
def test_a_checkpoint_tells_how_it_was_made(inputs, trained):
    meta = manifest.read(trained / "checkpoints", 8)["meta"]
    assert meta["flags"].keys() == {field.name for field in fields(command.Settings)}
    assert (meta["flags"]["out"], meta["flags"]["save_every"]) == (str(trained), "6")
    head = subprocess.run(
        ["git", "-C", ROOT, "cat-file", "-t", meta["code"][:40]], capture_output=True, text=True, check=True
    )
    assert head.stdout == "commit\n"


@SLOW
def test_another_run_is_told_before_its_arrays_are_read(inputs, run, monkeypatch):
    """84 GB, for 7B."""
    monkeypatch.setattr(saved_state.Stored, "fill", None)
    flags = [*inputs, "--out", run, *RUN, "--compile", "off", "--steps", 20, "--lr", "2e-2"]
    with pytest.raises(InputError, match="--lr was"):
        command.main([*map(str, flags)])


@SLOW
def test_what_was_saved_while_another_run_began_is_not_removed(inputs, trained, tmp_path, monkeypatch, capsys):
    """A run that is started while the one before it ends: what there is to go on from is known only under the lock."""
    out, features = tmp_path / "run", command.checks.features
    out.mkdir()
    shutil.copy(trained / "metrics.jsonl", out)
    assert run_folder.check(out, "auto", overwrite=False)

    def meanwhile(*args) -> None:
        shutil.copytree(trained / "checkpoints/3", out / "checkpoints/3")
        features(*args)

    monkeypatch.setattr(command.checks, "features", meanwhile)
    flags = [*inputs, "--out", out, *RUN, "--compile", "off", "--steps", 4, "--save-every", 6]
    assert command.main([*map(str, flags)]) == 0
    assert "going on after step 3" in capsys.readouterr().err
    assert manifest.steps(out / "checkpoints") == [3, 4]


@SLOW
def test_a_rank_that_is_lost_while_it_restores_restores_the_same_again(inputs, run, monkeypatch, capsys):
    """--resume STEP holds until OUT is cut back, for what torchrun starts again."""
    world, cut_back = World(launch=dist.HashStore()), resuming.cut_back
    flags = [*inputs, "--out", run, *RUN, "--compile", "off", "--steps", 4, "--save-every", 6, "--resume", 3]

    def lost(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resuming, "cut_back", lost)
    with pytest.raises(KeyboardInterrupt):
        command.main([*map(str, flags)], world)
    monkeypatch.setattr(resuming, "cut_back", cut_back)
    assert command.main([*map(str, flags)], world) == 0
    assert "going on after step 3" in capsys.readouterr().err
    assert command.main([*map(str, flags)], world) == 0
    assert "4 steps are done" in capsys.readouterr().out  # from its own last checkpoint, once it has gone on


@SLOW
def test_fewer_steps_than_were_done(inputs, run):
    (run / "finished").unlink()
    assert "8 steps, 0 skipped" in finetune(inputs, run, "--compile", "off", "--steps", 4)


@SLOW
def test_a_model_of_other_sizes_is_not_continued(inputs, run, tmp_path):
    _, cfg = checkpoint.load_model(inputs[1])
    larger = replace(cfg, hidden=cfg.hidden + 8)
    checkpoint.save_model(tmp_path / "larger", model.init(larger), larger, source=inputs[1])
    said = finetune(["--model", tmp_path / "larger", *inputs[2:]], run, "--steps", 20, "--compile", "off", code=2)
    assert "another model" in said


@SLOW
def test_going_on_from_an_earlier_step_sets_later_ones_aside(inputs, run, trained):
    said = finetune(inputs, run, "--compile", "off", "--steps", 8, "--save-every", 6, "--resume", 3)
    assert said.count("set aside") == 2
    assert manifest.steps(run / "checkpoints") == [3, 6, 8]
    assert numbers(run) == numbers(trained)
    assert_same_bits(*(checkpoint.restore(out / "checkpoints", 8)[0] for out in (run, trained)))
    assert "there are checkpoints of the steps 3, 6, 8" in finetune(inputs, run, "--resume", 4, code=2)


@SLOW
def test_a_kill_while_the_model_was_written(inputs, run, trained):
    """What was unfinished goes, and a model of an earlier step is not taken for the run's."""
    (run / ".model.lumina-tmp-0123").mkdir()
    (run / ".metrics.jsonl.lumina-tmp-4567").write_text("{")
    (run / "finished").write_text("3\n")
    (run / "model/model.safetensors").write_bytes(b"of step 3")
    said = finetune(inputs, run, "--compile", "off", "--steps", 8, "--save-every", 6)
    assert "going on after step 8" in said
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    for path in (trained / "model").iterdir():
        assert (run / "model" / path.name).read_bytes() == path.read_bytes()
    assert "8 steps are done" in finetune(inputs, run, "--compile", "off", "--steps", 8)


@SLOW
def test_a_damaged_checkpoint_is_named_and_passed_over_only_when_asked(inputs, run):
    [data] = [path for path in (run / "checkpoints/8").rglob("d/*") if path.stat().st_size > 10_000][:1]
    content = bytearray(data.read_bytes())
    content[777] ^= 1
    data.write_bytes(content)
    flags = ["--compile", "off", "--steps", 10, "--save-every", 6]
    said = finetune(inputs, run, *flags, code=2)
    assert str(data) in said
    assert "the last good one is 6" in said
    said = finetune(inputs, run, *flags, "--resume", "last-good")
    assert "going on after step 6" in said
    assert [row["step"] for row in rows(run)] == list(range(1, 11))


@SLOW
def test_a_run_s_folder_becomes_a_model(trained, tmp_path, monkeypatch):
    """Float32 masters stored as the model that it began with: what finetune writes at the end."""
    monkeypatch.chdir(trained.parent)
    for kind in ("native", "hf", "mindspeed"):
        convert.main([trained.name, str(tmp_path / kind), "--to", kind])
        got, cfg = checkpoint.load_model(tmp_path / kind)
        want, want_cfg = checkpoint.load_model(trained / "model")
        assert_same_bits(got, want)
        assert cfg.ids == want_cfg.ids
    for path in (trained / "model").iterdir():
        assert (tmp_path / "native" / path.name).read_bytes() == path.read_bytes(), path.name


@SLOW
def test_a_newer_format_says_so(run):
    path = run / "checkpoints/8" / manifest.MANIFEST
    content = json.loads(path.read_bytes())["content"] | {"format": "lumina_fn/checkpoint/2"}
    digest = hashlib.sha256(manifest._text(content)).hexdigest()
    path.write_bytes(manifest._text({"sha256": digest, "content": content}))
    with pytest.raises(InputError, match="use a newer version; the last good one is 6"):
        checkpoint.restore(run / "checkpoints")
    found = checkpoint.verify(run / "checkpoints")
    assert found.pop(8)
    assert found == dict.fromkeys([3, 6])


def converting(rank: int, size: int, run: str, to: str) -> tuple[int, int]:
    """Bytes at the peak above those before, and of the model."""
    convert.main([run, f"{to}/once", "--to", "native"])  # imports jax
    processes.reset_peak()
    before = processes.resident()
    convert.main([run, f"{to}/again", "--to", "native"])
    return processes.peak() - before, (Path(to) / "again/model.safetensors").stat().st_size


@SLOW
def test_a_run_s_folder_is_converted_a_unit_at_a_time(tmp_path):
    cfg = replace(TINY, width=512, layers=16, heads=8, kv_heads=8, hidden=1024)
    meta = {"model": asdict(cfg), "stored_dtype": "float32"}
    checkpoint.save(tmp_path / "run/checkpoints", 1, train.init_state(model.init(cfg), OPT), meta).wait()
    [(above, whole)] = processes.run(1, converting, str(tmp_path / "run"), str(tmp_path))
    assert whole > 160e6
    assert above < 64e6  # of 160: four units of 10 MB: what is read, a view of it, and Orbax's own


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
