"""A run's folder, or a checkpoint in it, wherever a model is asked for."""

import pytest
import torch
from torch.utils import _pytree as pytree

from experiments import finetune
from lumina_fn import checkpoint, prompt
from lumina_fn.errors import InputError
from lumina_fn.state import runs
from tests.support import small_run


def words(*args):
    return [str(arg) for arg in args]


@pytest.fixture(scope="module", name="trained")
def training(tmp_path_factory):
    at = tmp_path_factory.mktemp("run")
    flags = small_run.write_inputs(at)
    finetune.main(words(*flags, "--out", at / "run", "--steps", 3, "--save-every", 2, "--batch", 2, "--micro-batch", 2, "--lr", 1e-3, "--compile", "off"))  # fmt: skip
    return at, flags


@pytest.mark.parametrize(
    ("place", "step"), [("run", 3), ("run/checkpoints", 3), ("run/checkpoints/3", 3), ("run/checkpoints/2", 2)]
)
def test_its_parameters_its_sizes_and_its_tokenizer_are_a_model_s(trained, place, step):
    at, _ = trained
    params, cfg = checkpoint.load_model(at / place)
    whole, same = checkpoint.load_model(at / "run/model")
    assert cfg == same
    equal = [torch.equal(a, b) for a, b in zip(pytree.tree_leaves(params), pytree.tree_leaves(whole), strict=True)]
    assert all(equal) == (step == 3)
    assert runs.checkpoint(at / place).step == step
    known = prompt.load_tokenizer(at / place)
    assert (known.fingerprint, known.ids) == (prompt.load_tokenizer(at / "lm").fingerprint, cfg.ids)


def test_a_run_begins_with_what_another_has_reached(trained, tmp_path):
    at, flags = trained
    rest = [*flags[2:], "--steps", 1, "--batch", 2, "--micro-batch", 2, "--compile", "off", "--save-every", 0]
    for place, name in (("run", "a"), ("run/model", "b")):
        finetune.main(words("--model", at / place, *rest, "--out", tmp_path / name))
    a, b = (checkpoint.load_model(tmp_path / name / "model")[0] for name in "ab")
    assert all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))
    assert prompt.load_tokenizer(tmp_path / "a/model").fingerprint == prompt.load_tokenizer(at / "lm").fingerprint


def test_what_is_no_checkpoint_is_no_run(trained, tmp_path):
    at, _ = trained
    assert runs.checkpoint(at / "lm") is None
    assert runs.checkpoint(at / "run/model") is None
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="a run's folder without a checkpoint"):
        checkpoint.load_model(tmp_path)
