"""Which sets a run reads, and how: said by flags, held by the run's identity, refused where it makes no sense."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

from experiments import finetune
from experiments.finetuning import feature_folders
from lumina_fn import checkpoint, data
from lumina_fn.errors import InputError
from tests.support.small_run import write_features, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model's flags, and a second set beside the first."""
    folder = tmp_path_factory.mktemp("inputs")
    flags = write_inputs(folder)
    ids = checkpoint.read_config(folder / "lm").ids
    write_features(folder / "more", folder / "tokenizer", ids, count=4)
    write_features(folder / "other", folder / "tokenizer", ids, count=4, tokenizer="abcdef")
    write_features(folder / "empty", folder / "tokenizer", ids, count=0)
    return [
        *flags[:2],
        "--device",
        "cpu",
        "--compile",
        "off",
        "--batch",
        4,
        "--lr",
        1e-2,
        "--caption-drop",
        0.5,
    ], folder


@pytest.fixture
def run(inputs, tmp_path):
    """Run the command: its metrics, and its model's parameters."""

    def run(*flags, out="run"):
        argv = [*inputs[0], "--out", tmp_path / out, "--save-every", 0, "--log-every", 1, "--dtype", "float64", *flags]
        assert finetune.main([*map(str, argv)]) == 0
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], checkpoint.load_model(tmp_path / out / "model")[0]

    return run


def assert_same(a, b, abs=1e-12):
    for one, other in zip(a[0], b[0], strict=True):
        assert [one[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [other[name] for name in ("loss", "grad_norm")], abs=abs
        )
    for one, other in zip(*(pytree.tree_leaves(params) for _, params in (a, b)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)  # saved as float32


def test_flags_name_folders_and_weights(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    flags = [Path("a=0.7"), Path("b/c=1/3"), Path("d=.5"), tmp_path / "lr=0.1=2"]
    assert feature_folders.named(flags) == [
        (Path("a"), Fraction(7, 10)),
        (Path("b/c"), Fraction(1, 3)),
        (Path("d"), Fraction(1, 2)),
        (tmp_path / "lr=0.1", Fraction(2)),
    ]
    assert feature_folders.named([tmp_path / "lr=0.1"]) == [(tmp_path / "lr=0.1", None)]


@pytest.mark.parametrize("weight", ["", "0", "0.0", "-1", "inf", "nan", "1e9", "1/0", "a", "9" * 40])
def test_weights_that_say_nothing(weight):
    with pytest.raises(InputError, match=f"--features a={weight}: weight"):
        feature_folders.named([Path(f"a={weight}")])


def test_packed_steps_are_the_same_steps(inputs, run):
    features = ["--features", inputs[1] / "features", "--features", inputs[1] / "more=2", "--steps", 4]
    features[1] = f"{features[1]}=1"
    plain = run(*features, out="plain")
    assert_same(run(*features, "--pack", 160, "--micro-batch", 2, out="packed"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["blocks", "step"])
def test_packed_rows_are_compiled(inputs, run, compile):
    features = ["--features", inputs[1] / "features", "--steps", 1]
    packed = run(*features, "--pack", 120, "--compile", compile, out="compiled")
    assert_same(packed, run(*features, out="plain"), abs=1e-9)  # compiled cosines, in float32, are others


def test_sets_without_weights_are_one_set(inputs, run, tmp_path):
    """The same items, in another folder: one epoch visits all of them."""
    features = [flag for name in ("features", "more") for flag in ("--features", inputs[1] / name)]
    metrics, _ = run(*features, "--steps", 3, "--last", "partial", "--caption-drop", 0)
    items = [item for name in ("features", "more") for item in data.FeatureSet(inputs[1] / name)]
    assert sum(row["tokens"] for row in metrics) == sum(sum(i != -100 for i in labels) for _, labels in items)


def test_clustered_batches_are_trained_on(inputs, run):
    features = ["--features", inputs[1] / "features", "--steps", 3, "--batch", 2]
    losses = lambda *flags, out: [row["loss"] for row in run(*features, *flags, out=out)[0]]
    assert losses("--order", "clustered", out="clustered") != losses(out="plain")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--features", "features", "--pack", "50"], "--pack 50: the longest item, row 1 of .*features, has [0-9]+ tokens"),
        (["--features", "features", "--pack", "161"], "--pack 161: .* takes 160: give --pack [0-9]+ to 160"),
        (["--features", "features", "--pack", "0"], "--pack 0: expected at least 1"),
        (["--features", "features=1", "--features", "more"], "more: other sets have weights"),
        (["--features", "features=1", "--features", "empty=1"], "empty is empty"),
        (["--features", "features", "--features", "other"], "other was made with tokenizer abcdef"),
        (["--features", "features", "--order", "sorted"], "--order"),
        (["--features", "features", "--features", "nowhere"], "nowhere"),
        (["--features", "features=x"], "weight 'x'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused(inputs, tmp_path, flags, said):
    argv = [
        inputs[1] / flag if before == "--features" else flag for before, flag in zip(["", *flags], flags, strict=False)
    ]
    with pytest.raises(InputError, match=said) as refused:
        finetune.main([*map(str, [*inputs[0], "--out", tmp_path / "run", *argv])])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_another_mixture_is_another_run(inputs, tmp_path):
    one, other = inputs[1] / "features", inputs[1] / "more"
    begin = [*inputs[0], "--save-every", 2, "--log-every", 1]
    mixed = ["--features", f"{one}=0.7", "--features", f"{other}=0.3"]
    call = lambda out, steps, *flags: finetune.main(
        [*map(str, [*begin, "--out", tmp_path / out, "--steps", steps, *flags])]
    )
    assert call("run", 2, *mixed) == 0
    for flags, said in [
        (["--features", f"{one}=0.6", "--features", f"{other}=0.4"], "not the feature set"),
        (["--features", one, "--features", other], "not the feature set"),
        (["--features", one], "not the feature set"),
        ([*mixed, "--pack", 160], "--pack was None, is 160"),
        ([*mixed, "--order", "clustered"], "--order was shuffled, is clustered"),
    ]:
        with pytest.raises(InputError, match=said):
            call("run", 4, *flags)
    assert call("run", 4, "--features", f"{one}=7/10", "--features", f"{other}=0.30") == 0
    assert call("straight", 4, *mixed) == 0
    again, straight = (checkpoint.load_model(tmp_path / out / "model")[0] for out in ("run", "straight"))
    for a, b in zip(*map(pytree.tree_leaves, (again, straight)), strict=True):
        assert torch.equal(a, b)
