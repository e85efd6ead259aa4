"""finetune on many processes: the numbers of one process, and an end for all of them whatever happens to one."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from experiments import finetune
from experiments.launching import addresses, distributed
from experiments.launching.distributed import World
from lumina_fn import checkpoint
from lumina_fn.errors import InputError
from tests.support.paths import ROOT
from tests.support.small_run import write_inputs

TORCHRUN = Path(sys.executable).parent / "torchrun"
STANDALONE = ("--standalone", "--local-addr", "127.0.0.1")  # as the pages' lines for one machine
ENDLESS = ("--steps", 100_000, "--log-every", 1)
# 7 items in steps of 3, 3 and 1: one rank has less to do, then nothing.
FIVE_STEPS = ("--steps", 5, "--log-every", 1, "--batch", 3, "--caption-drop", 0.5, "--lr", 1e-2, "--dtype", "float64")
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Flags that name a model and features."""
    return (*write_inputs(tmp_path_factory.mktemp("launch")), "--compile", "off")


@pytest.fixture(scope="session")
def alone(inputs, tmp_path_factory):
    """OUT of five steps in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert finetune.main([*map(str, inputs), "--out", str(out), *map(str, FIVE_STEPS)]) == 0
    return out


class Launch:
    """A launcher, the processes it starts, and what they say."""

    def __init__(self, command, said: Path, **settings):
        with said.open("w") as file:
            self.process = subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, **settings)
        self.said, self.seen = said, {}
        self.look()

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            self.seen |= {process.pid: process for process in [root, *root.children(recursive=True)]}

    def rank(self, number: int) -> psutil.Process:
        self.look()
        children = psutil.Process(self.process.pid).children()
        return next(p for p in children if p.environ().get("RANK") == str(number))

    def alive(self) -> list[psutil.Process]:
        """Ranks live in sessions of their own: those of a launcher that is gone are known from before."""
        self.look()
        return [p for p in self.seen.values() if is_alive(p)]

    def wait(self, seconds: float) -> int:
        """Until all processes have ended; the launcher's exit code."""
        until(lambda: self.process.poll() is not None and not self.alive(), seconds, self)
        return self.process.returncode

    def text(self) -> str:
        return self.said.read_text()

    def reasons(self) -> list[str]:
        """What ranks said about the end."""
        return re.findall(r"^(?:error: )?(rank \d+ of \d+: .*)$", self.text(), re.MULTILINE)


def until(true: Callable[[], bool], seconds: float, launch: Launch) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{launch.alive()} after {seconds} s:\n{launch.text()}"
        time.sleep(0.05)


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launch]]:
    """Start a command, with its output in a file, and leave nothing of it behind."""
    started = []

    def launch(*command, **environment) -> Launch:
        settings = {
            "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            "cwd": tmp_path,
        }
        started.append(Launch(command, tmp_path / f"said{len(started)}", **settings))
        return started[-1]

    yield launch
    for each in started:
        for process in each.alive():
            process.kill()
        each.process.wait(10)


def torchrun(*flags, ranks: int = 2) -> list:
    return [TORCHRUN, "--nproc_per_node", ranks, *flags, "-m", "experiments.finetune"]


def rows(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_run(out: Path, launch: Launch) -> None:
    """Wait for three steps, so that all that follows is in the middle of one."""
    until(lambda: len(rows(out)) >= 3 or launch.process.poll() is not None, 60, launch)
    assert launch.process.poll() is None, launch.text()


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ends while it is looked at
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_about(process: psutil.Process, path: Path) -> bool:
    """Whether a process works on files in there."""
    with contextlib.suppress(psutil.Error):  # it ends while it is looked at
        return any(str(path) in word for word in process.cmdline())
    return False


def assert_same_run(out: Path, other: Path) -> None:
    for row, expected in zip(rows(out), rows(other), strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"tokens_per_second"}:
            assert row[name] == pytest.approx(expected[name], abs=1e-10), name
    params, expected = (checkpoint.load_model(folder / "model")[0] for folder in (out, other))
    for a, b in zip(pytree.tree_leaves(params), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # stored as float32


@slow
@pytest.mark.parametrize("flags", [(), ("--strategy", "hybrid_zero2", "--shard-size", 1, "--no-sync")], ids=str)
def test_two_ranks_do_what_one_process_does(flags, launch, inputs, alone, tmp_path):
    run = launch(*torchrun(), *inputs, "--out", tmp_path / "run", *FIVE_STEPS, *flags)
    assert run.wait(90) == 0, run.text()
    assert_same_run(tmp_path / "run", alone)
    assert run.text().count("5 steps, 0 skipped") == 1


@slow
def test_a_mistake_that_all_ranks_meet_is_said_once(launch, inputs, tmp_path):
    run = launch(*torchrun(ranks=3), *inputs, "--out", tmp_path / "run", "--model", tmp_path / "nowhere")
    assert run.wait(90) == 1
    assert run.text().count("error:") == 1
    assert len(run.reasons()) == 1
    assert f"{tmp_path / 'nowhere'} does not exist" in run.reasons()[0]
    assert not (tmp_path / "run").exists()


@slow
def test_a_mistake_that_one_rank_meets_is_said_with_its_rank(launch, inputs, tmp_path):
    """Rank 1 looks for the features, named by a relative path, from another folder."""
    (tmp_path / "here").symlink_to(inputs[3])
    script = f"if [ $RANK = 1 ]; then cd /; fi; exec {sys.executable} -m experiments.finetune " + '"$@"'
    command = [TORCHRUN, "--nproc_per_node", 2, "--no-python", "sh", "-c", script, "sh"]
    run = launch(*command, *inputs, "--out", tmp_path / "run", "--features", "here")
    assert run.wait(90) == 1
    assert len(run.reasons()) == 1
    assert run.reasons()[0].startswith("rank 1 of 2: here/features.json: No such file")


@slow
def test_a_failure_of_one_rank_has_one_traceback(launch, inputs, tmp_path):
    script = (
        "import os\nfrom experiments import finetune\nfrom experiments.finetuning import loop\nfrom experiments.launching import distributed\n"
        "if os.environ['RANK'] == '0':\n    loop.main = lambda *_: [][0]\ndistributed.run(finetune.main)"
    )
    command = [TORCHRUN, "--nproc_per_node", 2, "--no-python", sys.executable, "-c", script]
    run = launch(*command, *inputs, "--out", tmp_path / "run")
    assert run.wait(90) == 1
    assert run.reasons() == ["rank 0 of 2: failed"]
    assert run.text().count("IndexError") == 1


@slow
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_killing_a_rank_ends_all(compile, launch, inputs, tmp_path):
    """In the middle of a step; with blocks, of the first one, while there are compilers that must end too."""
    flags, cache = ("--compile", compile, "--out", tmp_path / "run", *ENDLESS), tmp_path / "compiled"
    run = launch(*torchrun(ranks=3), *inputs, *flags, TORCHINDUCTOR_CACHE_DIR=str(cache))
    if compile == "off":
        steps_run(tmp_path / "run", run)
    else:
        until(lambda: any(is_about(process, cache) for process in run.alive()), 60, run)
    run.rank(0).kill()
    assert run.wait(30) == 1
    assert len(run.reasons()) == 1
    assert run.reasons()[0].startswith("rank 2 of 3: lost contact with rank 0")


@slow
def test_killing_the_launcher_ends_all(launch, inputs, tmp_path):
    run = launch(*torchrun(), *inputs, "--out", tmp_path / "run", *ENDLESS)
    steps_run(tmp_path / "run", run)
    run.look()
    run.process.kill()
    run.wait(5)
    assert run.reasons() == ["rank 0 of 2: the launcher is gone: the run is over"]


@slow
def test_ctrl_c_ends_all(launch, inputs, tmp_path):
    run = launch(*torchrun(), *inputs, "--out", tmp_path / "run", *ENDLESS)
    steps_run(tmp_path / "run", run)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(30) == 1  # torchrun's own, whatever its ranks return
    assert checkpoint.steps(tmp_path / "run/checkpoints")
    assert run.text().count("stopped by SIGINT after step") == 1, run.text()
    assert run.reasons() == []


@slow
def test_a_run_that_is_started_again_finishes(launch, inputs, tmp_path):
    run = launch(*torchrun("--max-restarts", 1), *inputs, "--out", tmp_path / "run", "--steps", 40, "--log-every", 1)
    steps_run(tmp_path / "run", run)
    run.rank(1).kill()
    assert run.wait(90) == 0, run.text()
    assert [reason.split(":")[1] for reason in run.reasons()] == [" lost contact with rank 1"]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 41))
    checkpoint.load_model(tmp_path / "run" / "model")


@slow
def test_starting_again_does_not_overwrite_what_was_there_before(launch, inputs, alone):
    before = (alone / "metrics.jsonl").read_bytes()
    run = launch(*torchrun("--max-restarts", 1), *inputs, "--out", alone, *FIVE_STEPS, "--resume", "no")
    assert run.wait(90) == 1
    assert [f"{alone} holds a run" in reason for reason in run.reasons()] == [True, True]  # by each attempt
    assert (alone / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable whose ends are called cable."""
    names = f"lumina-{os.getpid()}-0", f"lumina-{os.getpid()}-1"
    ip = lambda *words: subprocess.run(["ip", *words], check=True, timeout=10)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{1 + i}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=10, stderr=subprocess.DEVNULL)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def on_hosts(names, launch, *flags) -> list[Launch]:
    """The script for two machines, with a process on each."""
    script = ROOT / "experiments" / "launch" / "ascend_2x8.sh"
    settings = {"PATH": f"{TORCHRUN.parent}:{os.environ['PATH']}", "MASTER_ADDR": "10.77.0.1", "NPUS_PER_NODE": "1"}
    command = lambda name: ("ip", "netns", "exec", name, "bash", script, *flags)
    return [launch(*command(name), **settings, NODE_RANK=str(i)) for i, name in enumerate(names)]


@slow
@needs_root
def test_two_hosts_do_what_one_does(hosts, launch, inputs, alone, tmp_path):
    runs = on_hosts(hosts, launch, *inputs, "--out", tmp_path / "run", *FIVE_STEPS)
    assert [run.wait(90) for run in runs] == [0, 0], [run.text() for run in runs]
    assert_same_run(tmp_path / "run", alone)


@slow
@needs_root
def test_a_host_that_is_cut_away_ends_all(hosts, launch, inputs, tmp_path):
    runs = on_hosts(hosts, launch, *inputs, "--out", tmp_path / "run", *ENDLESS)
    steps_run(tmp_path / "run", runs[0])
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "cable", "down"], check=True, timeout=10)
    assert [run.wait(30) for run in runs] == [1, 1]
    for i, run in enumerate(runs):
        assert [reason.split(":")[:2] for reason in run.reasons()] == [
            [f"rank {i} of 2", f" lost contact with rank {1 - i}"]
        ]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@slow
@pytest.mark.parametrize("script", ["ascend_1x8.sh", "ascend_slurm.sh"])
def test_scripts_for_one_launcher(script, launch, inputs, tmp_path):
    """As they are, but with two processes on one machine without NPUs, where Slurm's two commands are stood in for."""
    commands = {"srun": 'shift; exec "$@"', "scontrol": "echo 127.0.0.1"}
    for name, does in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    run = launch(
        "bash", ROOT / "experiments" / "launch" / script, *inputs, "--out", tmp_path / "run", "--steps", 2,
        PATH=f"{TORCHRUN.parent}:{tmp_path}:{os.environ['PATH']}", NPUS_PER_NODE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="here",
    )  # fmt: skip
    assert run.wait(90) == 0, run.text()
    assert [row["step"] for row in rows(tmp_path / "run")] == [2]


@pytest.mark.parametrize("script", ["ascend_1x8.sh", "ascend_2x8.sh", "ascend_slurm.sh"])
def test_scripts_take_their_place_from_the_environment(script, launch, tmp_path):
    commands = {"srun": 'shift; exec "$@"', "torchrun": 'echo "$@"'}
    for name, does in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    run = launch(
        "bash", ROOT / "experiments" / "launch" / script, PATH=f"{tmp_path}:{os.environ['PATH']}",
        NNODES="3", NODE_RANK="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234", SLURM_NODEID="4",
        SLURM_JOB_ID="7", SLURM_NNODES="5", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="here", MAX_RESTARTS="3",
    )  # fmt: skip
    assert run.wait(10) == 0, run.text()
    assert "--nnodes 3 " in run.text()
    assert "--rdzv_backend lumina --rdzv_endpoint 10.0.0.1:1234 " in run.text()
    assert f"--rdzv_conf rank={4 if 'slurm' in script else 2} " in run.text()
    assert "--max-restarts 3 " in run.text()
    assert "--local-addr" not in run.text()


def test_the_script_of_one_machine_takes_any_port_and_looks_up_no_name(launch, tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    run = launch("bash", ROOT / "experiments/launch/ascend_1x8.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert run.wait(10) == 0, run.text()
    assert "--local-addr 127.0.0.1 --rdzv_backend lumina --rdzv_endpoint 127.0.0.1:0 " in run.text()
    assert "--max-restarts 0 " in run.text()


def meet(store: dist.Store, size: int) -> list[str]:
    tokens = [""] * size

    def rank(number: int) -> None:
        tokens[number] = distributed._meet(store, number, size)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return tokens


def test_ranks_that_are_started_again_meet_each_other_and_not_the_dead():
    store = dist.HashStore()  # of a launcher: what is in it stays
    attempts = [meet(store, 4) for _ in range(3)]
    assert all(len(set(tokens)) == 1 for tokens in attempts)
    assert len({tokens[0] for tokens in attempts}) == 3


def test_a_device_is_named_by_its_kind_where_there_are_many_ranks():
    assert World(1, 2, 1, 2).device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"--device cpu:0: each of the 2 ranks"):
        World(1, 2, 1, 2).device("cpu:0")
    with pytest.raises(InputError, match=r"abacus:1"):
        World(1, 2, 1, 2).device("abacus")


def test_an_address_that_other_hosts_do_not_find_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with pytest.raises(RuntimeError, match="GLOO_SOCKET_IFNAME"):
        addresses.own_address("127.0.0.1", many_hosts=True)
    assert addresses.own_address("127.0.0.1", many_hosts=False) == "127.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
