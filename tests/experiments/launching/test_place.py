"""Variables of a launcher are believed only if they agree."""

import sys

import pytest

from experiments.launching import place
from lumina_fn.errors import InputError
from tests.experiments.launching import test_launch

launch, inputs, hosts = test_launch.launch, test_launch.inputs, test_launch.hosts  # fixtures
WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
ALONE = {**WHOLE, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in WHOLE.items() if name not in names}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "abc"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"},
    ],
    ids=str,
)
def test_a_process_on_its_own(environ):
    assert place.find(environ) is None


def test_a_rank_knows_its_place():
    assert place.find(WHOLE) == place.Place(1, 4, 1, 2, "10.0.0.1", 29500, torchrun=False, stored=False)
    under_torchrun = {**ALONE, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert place.find(under_torchrun) == place.Place(0, 1, 0, 1, "10.0.0.1", 29500, torchrun=True, stored=True)
    assert place.find(under_torchrun).one_host
    assert not place.find(WHOLE).one_host


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**ALONE, "RANK": "x"}, "RANK=x "),
        ({**ALONE, "RANK": ""}, "RANK= "),
        ({**ALONE, "RANK": "-1"}, "RANK=-1 "),
        ({**ALONE, "RANK": "\N{ARABIC-INDIC DIGIT ZERO}"}, "RANK="),
        ({**ALONE, "RANK": "3"}, "RANK=3 "),
        ({**ALONE, "RANK": "1"}, "RANK=1 in the environment: expected 0"),
        ({**WHOLE, "WORLD_SIZE": "0"}, "WORLD_SIZE=0 "),
        ({**WHOLE, "WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 "),
        ({**WHOLE, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9"),
        ({**WHOLE, "WORLD_SIZE": "1"}, "RANK=1 "),
        ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 "),
        ({**WHOLE, "RANK": "0"}, "LOCAL_RANK=1 "),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 "),
        ({**WHOLE, "MASTER_PORT": "abc"}, "MASTER_PORT=abc "),
        ({**WHOLE, "MASTER_PORT": "0"}, "MASTER_PORT=0 "),
        ({**WHOLE, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 "),
        ({**WHOLE, "MASTER_ADDR": " "}, "MASTER_ADDR= "),
        (without("MASTER_ADDR"), "MASTER_ADDR="),
        (without("MASTER_PORT"), "MASTER_PORT="),
        (without("RANK"), "WORLD_SIZE=4 without RANK"),
        (without("WORLD_SIZE"), "RANK=1 without WORLD_SIZE"),
        (without("LOCAL_RANK"), "LOCAL_WORLD_SIZE=2 without LOCAL_RANK"),
        (without("LOCAL_WORLD_SIZE"), "LOCAL_RANK=1 without LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK"),
    ],
    ids=str,
)
def test_variables_that_contradict_each_other_are_one_line(environ, said):
    with pytest.raises(InputError) as error:
        place.find(environ)
    assert str(error.value).startswith(said)
    assert "torchrun" in str(error.value)


def finetune(launch, **variables: str):
    return launch(sys.executable, "-m", "experiments.finetune", "--out", "run", **variables)


def test_a_contradiction_ends_a_command_before_it_imports_torch(launch):
    run = finetune(launch, RANK="3", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert run.wait(3) == 2
    assert run.text().startswith("error: RANK=3 in the environment: expected a number from 0 to 1")
    assert run.text().count("\n") == 1
