"""The command: features and a model in, a folder that samples and converts out; and what it says to bad input."""

import fcntl
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file

from experiments import finetune
from experiments.finetuning import loop
from experiments.planning import memory
from lumina_fn import checkpoint, convert, data, prompt, sources, train
from lumina_fn.costs import cost, footprint
from lumina_fn.process import entry
from tests.support import folders
from tests.support.small_run import CODES, write_features, write_lm


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A tokenizer's folder and its ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, folders.write_tokenizer(folder, CODES)


@pytest.fixture(scope="session")
def lm(tokens, tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm") / "lm", *tokens)


@pytest.fixture
def call(tmp_path, lm, tokens, monkeypatch, capsys):
    """Run the command in this process: exit code and the lines on stderr."""
    features = write_features(tmp_path / "features", *tokens)

    def call(*flags, out=tmp_path / "run", features=features, model=lm):
        argv = ["--model", model, "--features", features, "--out", out, "--compile", "off", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            entry.run(finetune.main)
        return ended.value.code, capsys.readouterr().err.splitlines()

    return call


def test_a_run_leaves_metrics_and_a_model(call, tmp_path, lm):
    code, _ = call("--steps", 25, "--batch", 4, "--micro-batch", 2, "--log-every", 10, "--lr", 1e-2)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert {"step", "loss", "ce", "z", "grad_norm", "lr", "tokens_per_second"} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    tuned, cfg = checkpoint.load_model(tmp_path / "run" / "model")
    before, _ = checkpoint.load_model(lm)
    assert cfg.ids is not None
    assert all((a != b).any() for a, b in zip(pytree.tree_leaves(tuned), pytree.tree_leaves(before), strict=True))
    prompt.load_tokenizer(tmp_path / "run" / "model")
    convert.main([str(tmp_path / "run" / "model"), str(tmp_path / "hf"), "--to", "hf"])
    again, _ = checkpoint.load_model(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(tuned), pytree.tree_leaves(again), strict=True))


def test_the_model_folder_is_not_opened_for_every_tensor(call, monkeypatch):
    """Opening the released folder takes a second or two (its tokenizer and config have 17 MB), and it has 419 tensors."""
    opened, open_source = [], sources.open_source
    monkeypatch.setattr(sources, "open_source", lambda path: opened.append(path) or open_source(path))
    assert call("--steps", 1)[0] == 0
    assert len(opened) <= 3


def test_a_model_without_a_tokenizer_is_tuned_and_takes_one_later(call, tmp_path, lm, tokens):
    """A folder that MindSpeed-MM's mm-convert wrote holds the weights alone."""
    bare = tmp_path / "mindspeed"
    convert.main([str(lm), str(bare), "--to", "mindspeed"])
    for path in bare.glob("*.json"):
        path.unlink()
    code, lines = call("--steps", 1, model=bare)
    assert code == 0
    assert any(f"{bare} has no tokenizer" in line for line in lines)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lm / name, tmp_path / "run" / "model" / name)
    assert prompt.load_tokenizer(tmp_path / "run" / "model").ids == tokens[1]


def test_the_loop_is_the_step(call, tmp_path, lm, tokens):
    """The command's model is what make_train_step gives on the same items in one big batch."""
    call("--steps", 1, "--batch", 7, "--micro-batch", 2, "--caption-drop", 0, "--lr", 1e-2, "--dtype", "float64")
    features = data.FeatureSet(tmp_path / "features")
    params, cfg = checkpoint.load_model(lm, dtype=torch.float64)
    opt = train.AdamW(lr=1e-2)
    batch = data.batch([features[i] for i in range(7)], max_positions=cfg.max_positions)
    state, metrics = train.make_train_step(cfg, opt)(train.init_state(params, opt), batch)
    tuned, _ = checkpoint.load_model(tmp_path / "run" / "model", dtype=torch.float64)
    for a, b in zip(pytree.tree_leaves(tuned), pytree.tree_leaves(state.params), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # saved as float32
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-12)


@pytest.mark.parametrize(
    "flags", [[], ["--remat", "all"], pytest.param(["--compile", "blocks"], marks=pytest.mark.slow)], ids=str
)
def test_same_seed_same_model(call, tmp_path, flags):
    settings = ["--steps", 3, "--batch", 4, "--lr", 1e-2, "--caption-drop", 0.5]
    call(*settings, *flags, out=tmp_path / "a")
    call(*settings, out=tmp_path / "b")
    call(*settings, "--seed", 1, out=tmp_path / "c")
    a, b, c = (load_file(tmp_path / run / "model" / "model.safetensors") for run in "abc")
    assert all((a[key] - b[key]).abs().max() < 1e-5 for key in a)
    assert any((a[key] - c[key]).abs().max() > 1e-4 for key in a)


@pytest.mark.slow
def test_a_profile_shows_the_steps_that_were_asked_for_and_changes_nothing(call, tmp_path):
    flags = ("--steps", 6, "--batch", 4, "--last", "drop", "--log-every", 1, "--lr", 1e-2)
    assert call(*flags, out=tmp_path / "plain")[0] == 0
    code, said = call(*flags, "--profile", 2, out=tmp_path / "profiled")
    assert code == 0
    assert any(f"profile of steps 3 to 4: {tmp_path / 'profiled/profile'}" in line for line in said)
    losses = lambda out: [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses(tmp_path / "profiled") == losses(tmp_path / "plain")
    trace = json.loads((tmp_path / "profiled/profile/trace.json").read_text())
    backwards = [event for event in trace["traceEvents"] if event.get("name") == "aten::embedding_dense_backward"]
    assert len(backwards) == 2 * 4  # one of each micro batch
    assert "aten::mm" in (tmp_path / "profiled/profile/ops.txt").read_text()


def test_a_run_that_is_too_short_for_its_profile_says_so(call, tmp_path):
    code, said = call("--steps", 3, "--profile", 2)
    assert code == 0
    assert "note: nothing is profiled: 2 steps of warm-up and 2 more are asked of 3" in said
    assert not (tmp_path / "run/profile").exists()


def test_what_is_for_many_processes_is_accepted_in_one(call, tmp_path):
    """A command of a cluster runs on a laptop; what has no effect there is said."""
    flags = [
        "--strategy",
        "hybrid",
        "--shard-size",
        8,
        "--param-dtype",
        "bfloat16",
        "--reduce-dtype",
        "bfloat16",
        "--no-sync",
    ]
    code, lines = call("--steps", 1, *flags, "--forward-prefetch", "--backward-prefetch", "--remat", "0")
    assert code == 0
    assert sum("no effect on a CPU" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("above", "flags", "expected"),
    [(0, [], 2), (1, [], 0), (0, ["--remat", "0"], 0), (1, ["--remat", "all"], 2), (1, ["--remat", "1"], 1)],
    ids=str,
)
def test_from_a_size_on_remat_is_the_default_where_what_is_free_is_not_known(
    call, monkeypatch, lm, above, flags, expected
):
    params, _ = checkpoint.load_model(lm)
    size = sum(leaf.numel() for leaf in pytree.tree_leaves(params))
    monkeypatch.setattr(cost, "REMAT_FROM", size + above)
    monkeypatch.setattr(memory, "free", lambda *args: None)
    given, make = [], train.make_train_step
    monkeypatch.setattr(train, "make_train_step", lambda *args, **kw: given.append(kw["remat"]) or make(*args, **kw))
    assert call("--steps", 1, *flags)[0] == 0
    assert set(given) == {expected}


def test_remat_is_of_the_fewest_blocks_that_fit(call, tmp_path, monkeypatch, lm):
    cfg, given, make = checkpoint.read_config(lm), [], train.make_train_step
    monkeypatch.setattr(train, "make_train_step", lambda *args, **kw: given.append(kw["remat"]) or make(*args, **kw))
    monkeypatch.setattr(cost, "most_memory", lambda *args: 10**12)
    peak = lambda n: 10**6 * (10 - n)
    monkeypatch.setattr(footprint, "peak", lambda cfg, setup: peak(setup.recomputed(cfg)))
    for fits in range(cfg.layers + 1):
        monkeypatch.setattr(memory, "free", lambda *args, fits=fits: peak(fits) / memory.USABLE + 1)
        code, said = call("--steps", 1, out=tmp_path / f"{fits}")
        assert code == 0
        assert set(given) == {fits}
        assert (f"note: {fits} of {cfg.layers} blocks are computed again" in "".join(said)) == (fits > 0)
        given.clear()


@pytest.mark.parametrize("said", ["3", "-1", "1.5", "none", ""])
def test_a_number_of_blocks_that_the_model_does_not_have(call, said):
    code, lines = call("--steps", 1, f"--remat={said}")
    assert code == 2
    assert lines[-1].endswith(f"--remat {said}: expected auto, all, or a number of blocks from 0 to 2")


def test_noise_is_measured_when_asked_for(call, tmp_path):
    call("--steps", 7, "--batch", 4, "--log-every", 5, "--noise-scale-every", 3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5, 6, 7]
    assert ["noise" in row for row in rows] == [True, False, True, False]
    measured = [row for row in rows if "noise" in row]
    noise, signal = (sum(row[name] for row in measured) for name in ("noise", "signal"))
    assert measured[-1]["noise_scale"] == (pytest.approx(4 * noise / signal) if signal > 0 else None)
    assert (
        "one micro batch" in call("--steps", 1, "--micro-batch", 8, "--noise-scale-every", 1, out=tmp_path / "b")[1][-1]
    )


@pytest.mark.parametrize("steps", [6, 100])
def test_a_broken_run_stops_and_keeps_the_last_good_state(call, tmp_path, monkeypatch, steps):
    """The fifth step throws the parameters so far that no loss after it is finite: those of step 3 are the last that were seen good."""
    rate = lambda step: torch.where(step == 4, 1e38, 1e-5)
    monkeypatch.setattr(loop, "_optimizer", lambda run: train.AdamW(rate))
    code, (*_, line) = call("--steps", steps, "--log-every", 10, "--save-every", 4, "--keep", 9)
    assert code == 1
    assert "no finite loss and gradient since step 6; those of step 4" in line
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1  # noticed at the first log interval
    assert json.loads(rows[0])["loss"] is None
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3, 4]
    assert not (tmp_path / "run" / "model").exists()
    good, _ = checkpoint.load_model(tmp_path / "run" / "last_good")
    state, _ = checkpoint.restore(tmp_path / "run" / "checkpoints", 4)
    assert all(
        torch.equal(a, b) for a, b in zip(pytree.tree_leaves(good), pytree.tree_leaves(state.params), strict=True)
    )


def test_a_last_step_that_leaves_numbers_that_are_none_is_not_a_model(call, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loop, "_optimizer", lambda run: train.AdamW(lambda step: torch.where(step == 1, math.inf, 1e-5))
    )
    code, (*_, line) = call("--steps", 2)
    assert code == 1
    assert "step 2 left parameters" in line
    assert "what it began with" in line
    assert not (tmp_path / "run" / "model").exists()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_image_logits_are_unmasked_for_training(call, tmp_path, lm):
    """A model folder that masks image logits (the default of a Hugging Face config) is trained, and saved, without."""
    masking = tmp_path / "masking"
    params, cfg = checkpoint.load_model(lm)
    checkpoint.save_model(masking, params, replace(cfg, masked_ids=tuple(range(cfg.ids.code0, cfg.vocab))), source=lm)
    assert call("--steps", 1, model=masking)[0] == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"] < 100
    assert checkpoint.load_model(tmp_path / "run" / "model")[1].masked_ids == ()


BAD_FLAGS = [
    (["--steps", "0"], "--steps"), (["--batch", "0"], "--batch"), (["--lr", "nan"], "--lr"), (["--lr", "-1"], "--lr"),
    (["--lr", "inf"], "--lr"), (["--weight-decay", "inf"], "--weight-decay"), (["--z-weight", "nan"], "--z-weight"), (["--device", "meta"], "meta"),
    (["--caption-drop", "2"], "--caption-drop"), (["--schedule", "step"], "--schedule"), (["--device", "abacus"], "abacus"),
    (["--param-dtype", "float16"], "loss scaling"), (["--reduce-dtype", "float16"], "loss scaling"), (["--shard-size", "0"], "--shard-size"),
    (["--strategy", "ddp"], "--strategy"), (["--noise-scale-every", "-1"], "--noise-scale-every"), (["--steps", "many"], "--steps"), (["--colour", "red"], "--colour"), (["--last", "drop", "--batch", "8"], "--batch 8"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS, ids=str)
def test_bad_flags(call, tmp_path, flags, named):
    code, lines = call(*flags)
    assert code == 2
    assert len(lines) == 1
    assert named in lines[0]
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_touched(call, tmp_path):
    settings = ["--steps", 1]
    call(*settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, (line,) = call(*settings, "--resume", "no")
    assert code == 2
    assert "--overwrite" in line
    assert call(*settings)[0] == 0  # it is finished
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert (
        "--overwrite" in call(*settings, "--resume", "no", model=tmp_path / "nowhere")[1][0]
    )  # before a model is looked for
    assert call(*settings, "--overwrite")[0] == 0


def test_a_folder_of_something_else_is_never_removed(call, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    code, (line,) = call("--steps", 1, "--overwrite")
    assert code == 2
    assert "thesis.txt" in line
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_run_does_not_remove_the_model_it_starts_from(call, tmp_path):
    call("--steps", 1)
    code, (line,) = call("--steps", 1, "--overwrite", model=tmp_path / "run" / "model")
    assert code == 2
    assert "holds" in line
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_places_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file/run", "a" * 300, "link"):
        code, lines = call("--steps", 1, out=tmp_path / name)
        assert (code, len(lines)) == (2, 1), lines
    for out in (".", "/"):
        code, lines = call("--steps", 1, "--overwrite", out=out)
        assert (code, len(lines)) == (2, 1), lines


def test_a_second_writer_is_told_who_is_first(call, tmp_path):
    with (tmp_path / ".run.lock").open("w") as file:
        file.write("4242")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        code, (line,) = call("--steps", 1)
    assert code == 2
    assert "4242" in line


def test_features_of_another_model(call, tmp_path, tokens):
    larger = replace(tokens[1], code0=tokens[1].code0 + 1)
    code, (line,) = call(features=write_features(tmp_path / "larger", *tokens, ids=larger))
    assert code == 2
    assert f"id {larger.code0 + CODES - 1}" in line
    code, (line,) = call(features=write_features(tmp_path / "other", *tokens, tokenizer="abcdef"))
    assert code == 2
    assert "tokenizer abcdef" in line


def test_features_that_are_not_there(call, tmp_path, tokens):
    empty = write_features(tmp_path / "empty", *tokens, count=0)
    damaged = write_features(tmp_path / "damaged", *tokens)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    for folder in (empty, damaged, tmp_path, tmp_path / "nowhere"):
        code, lines = call(features=folder)
        assert code == 2
        assert len(lines) == 1
        assert str(folder) in lines[0]


def test_a_model_that_is_none(call, tmp_path, lm):
    (tmp_path / "truncated").mkdir()
    for path in lm.iterdir():
        content = path.read_bytes()
        (tmp_path / "truncated" / path.name).write_bytes(content[:-9] if path.suffix == ".safetensors" else content)
    for folder in (tmp_path / "truncated", tmp_path, tmp_path / "nowhere"):
        code, lines = call(model=folder)
        assert code == 2
        assert len(lines) == 1
        assert str(folder) in lines[0]


@pytest.mark.slow
def test_as_a_program(tmp_path, lm, tokens):
    features = write_features(tmp_path / "features", *tokens)
    run = lambda *flags: subprocess.run(
        [sys.executable, "-m", "experiments.finetune", *map(str, flags)], capture_output=True, text=True, check=False
    )
    good = run("--model", lm, "--features", features, "--out", tmp_path / "run", "--steps", 2)
    assert good.returncode == 0, good.stderr
    bad = run("--model", lm, "--features", features, "--out", tmp_path / "run", "--resume", "no")
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
    assert run("--help").returncode == 0
