"""What two flags say together: a note where one leaves the other without its effect, and nothing where they fit."""

from pathlib import Path

import pytest
import torch

from experiments.finetuning import checks
from experiments.finetuning.settings import Settings
from experiments.launching import distributed
from lumina_fn import optim


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"warmup": 100, "steps": 10}, "--warmup 100 lasts as long as --steps 10: its last step has 10% of --lr"),
        ({"warmup": 10, "steps": 10}, "only the last step has --lr"),
        ({"warmup": 9, "steps": 10}, None),
        ({"keep_every": 100, "save_every": 0}, "--keep-every 100 has no effect with --save-every 0"),
        ({"keep_every": 100, "save_every": 40}, "those of each 200 steps"),
        ({"keep_every": 100, "save_every": 50}, None),
    ],
)
def test_pairs_without_effect_are_said(capsys, flags, said):
    run = Settings(model=Path("m"), features=(Path("f"),), out=Path("o"), **flags)
    checks.pairs(run, distributed.ALONE)
    printed = "".join(capsys.readouterr())
    assert printed == "" if said is None else printed.startswith("note: ") and said in printed
    assert printed.count("\n") == (said is not None)


def test_the_rate_of_the_last_step_is_what_the_note_says():
    assert float(optim.constant(1.0, 100)(torch.tensor(9))) == pytest.approx(0.1)
