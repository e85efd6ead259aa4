"""How a run goes on from its folder, what it refuses to go on with, and what else becomes of such a folder."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from experiments import finetune as command
from experiments.finetuning import loop, resuming, run_folder
from experiments.launching.distributed import World
from lumina_fn import checkpoint, convert, model
from lumina_fn.errors import InputError
from lumina_fn.state import manifest, saved_state
from tests.experiments.launching.test_launch import rows
from tests.support.paths import ROOT
from tests.support.resumed_runs import RUN, assert_same_bits, finetune, numbers, written_inputs  # noqa: F401
from tests.support.small_run import write_features

SLOW = pytest.mark.slow


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
    out, features = tmp_path / "run", loop.checks.features
    out.mkdir()
    shutil.copy(trained / "metrics.jsonl", out)
    shutil.copy(trained / ".lumina.json", out)
    assert run_folder.check(out, "auto", overwrite=False)

    def meanwhile(*args) -> int:
        shutil.copytree(trained / "checkpoints/3", out / "checkpoints/3")
        return features(*args)

    monkeypatch.setattr(loop.checks, "features", meanwhile)
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
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == [".lumina.json"]
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
