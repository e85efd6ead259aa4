"""Ranks that are started again leave an NPU alone until it has let go of the processes before them."""

import sys

import pytest

from experiments import devices
from experiments.ascend import checks
from experiments.launching import distributed
from experiments.launching.distributed import World
from tests.experiments.launching import test_launch
from tests.experiments.launching.test_launch import STANDALONE, TORCHRUN, slow

launch = test_launch.launch  # a fixture


@pytest.mark.parametrize(("restarts", "waits"), [(0, []), (1, [10]), (3, [10])])
@pytest.mark.parametrize("world", [World(), World(1, 2, 1, 2)], ids=["one rank", "two ranks"])
def test_a_rank_that_is_started_again_waits_before_it_opens_an_npu(restarts, waits, world, monkeypatch):
    did = []
    monkeypatch.setattr(distributed.time, "sleep", did.append)
    monkeypatch.setattr(devices, "device", lambda name: did.append(name) or distributed.torch.device("cpu"))
    again = distributed.replace(world, restarts=restarts)
    again.device("npu")
    assert did[:-1] == waits
    assert did[-1].startswith("npu")


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_cpu_is_used_at_once(name, monkeypatch):
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setattr(devices, "kind", lambda name: "cpu")
    assert World(1, 2, 1, 2, restarts=1).device(name).type == "cpu"


AGAIN = """
import os
from experiments.launching import start
def main(argv, world):
    print(f"restarts: {world.restarts}", flush=True)
    if world.restarts == 0:
        os._exit(1)
start.run(main)
"""


@slow
def test_ranks_know_that_they_were_started_again(launch):
    flags = ("--max-restarts", 1, "--nproc_per_node", 1, "--no-python")
    run = launch(TORCHRUN, *STANDALONE, *flags, sys.executable, "-c", AGAIN)
    assert run.wait(60) == 0, run.text()
    assert [line for line in run.text().splitlines() if "restarts:" in line] == ["restarts: 0", "restarts: 1"]


@slow
def test_npu_check_kills_ranks_and_starts_others_on_their_devices():
    lines = []
    assert checks.run(checks.of_a_restart("cpu", 2, pause=0.1), lines.append) == 0
    assert lines[0] == "2 ranks, 0.1 s after others were killed: ok"


@slow
def test_npu_check_tells_ranks_that_could_not_start_before_others_were_killed():
    lines = []
    assert checks.run(checks.of_a_restart("abacus", 1, pause=0.1), lines.append) == 1
    assert "FAILED: " in lines[0]
