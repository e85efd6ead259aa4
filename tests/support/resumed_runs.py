"""A small run of the command `finetune`, and training states to save, restore and compare.

The fixture's function has a name of its own, so that a test's argument hides no import.
"""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

from experiments import finetune as command
from lumina_fn import model, sharding, train
from lumina_fn.config import ModelConfig
from lumina_fn.process import entry
from tests.experiments.launching.test_launch import rows
from tests.support.small_run import write_inputs

TINY = ModelConfig(vocab=53, width=16, layers=2, heads=2, kv_heads=1, hidden=24)
OPT = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)


@pytest.fixture(scope="session", name="inputs")
def written_inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("resume"))


# 7 items in steps of 3, 3 and 1.
RUN = ["--log-every", 1, "--batch", 3, "--caption-drop", 0.5, "--lr", 1e-2, "--noise-scale-every", 2, "--keep", 3]


def finetune(inputs, out: Path, *flags, code: int = 0) -> str:
    """The command, in this process; what it prints."""
    argv = [str(word) for word in (*inputs, "--out", out, *RUN, *flags)]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        ended = entry._code(lambda _: command.main(argv))
    assert ended == code, printed.getvalue()
    return printed.getvalue()


def numbers(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows(out)]


def assert_same_bits(a, b) -> None:
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)


def random_state(seed: int = 0, step: int = 9) -> train.TrainState:
    state = train.init_state(model.init(TINY, seed=seed), OPT)
    generator = torch.Generator().manual_seed(seed)
    noise = lambda tree: pytree.tree_map(lambda x: torch.randn(x.shape, generator=generator), tree)
    return state._replace(step=torch.tensor(step), mu=noise(state.mu), nu=noise(state.nu), skipped=torch.tensor(2))


def cut(state: train.TrainState, mesh) -> train.TrainState:
    parts = lambda tree: model.over_units(lambda unit: sharding.shard(unit, mesh), tree)
    return state._replace(params=parts(state.params), mu=parts(state.mu), nu=parts(state.nu))
