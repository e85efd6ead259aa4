"""Every launcher's variables make one run of many processes, the same one, or one line that says what is wrong with them."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from experiments.launching import addresses, distributed, launchers, neighbours, place
from experiments.launching.place import Place
from lumina_fn import checkpoint, vq
from lumina_fn.config import VQConfig
from lumina_fn.errors import InputError
from tests.experiments.launching import test_launch
from tests.experiments.launching.test_launch import STANDALONE, TORCHRUN, free_port, needs_root, slow
from tests.support import small_run
from tests.support.paths import ROOT

launch, hosts = test_launch.launch, test_launch.hosts  # fixtures


def job(rank: int, size: int, port: str = "29500") -> dict[str, str]:
    """As Kubernetes' PyTorchJob sets them."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "PET_NPROC_PER_NODE": "auto", **where}


def slurm(rank: int, size: int, job: str = "7") -> dict[str, str]:
    """As Slurm 22.05 set them for `srun -n SIZE`, on one machine."""
    of_step = {
        "STEP_ID": "0", "STEP_NUM_TASKS": size, "STEP_NUM_NODES": 1, "STEP_TASKS_PER_NODE": size, "STEP_NODELIST": "a",
        "PROCID": rank, "NTASKS": size, "NPROCS": size, "LOCALID": rank, "NODEID": 0, "JOB_ID": job, "NNODES": 1,
        "TASK_PID": 1, "SUBMIT_DIR": "/",
    }  # fmt: skip
    return {f"SLURM_{name}": str(value) for name, value in of_step.items()}


def open_mpi(rank: int, size: int, run: str = "prterun-a-1@1") -> dict[str, str]:
    """As Open MPI 5 set them for `mpirun -n SIZE`, on one machine."""
    of_world = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size, "NODE_RANK": rank}
    return {"PMIX_NAMESPACE": run} | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in of_world.items()}


def mpich(rank: int, size: int, port: str = "29500") -> dict[str, str]:
    """As MPICH's Hydra sets them."""
    numbers = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | where


TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
MANY = {"SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_STEP_NODELIST": "rack[1-2]node[07,09],other", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "numbers"),
    [
        (job(1, 2), (1, 2, None, None, True)),
        (job(1, 2) | {"MASTER_ADDR": "job-master-0"}, (1, 2, None, None, False)),
        (slurm(1, 2), (1, 2, 1, 2, True)),
        (slurm(3, 4) | MANY, (3, 4, 1, 2, False)),
        (slurm(1, 2) | {"SLURM_NTASKS": "8"}, (1, 2, 1, 2, True)),  # the whole job's
        (open_mpi(1, 2), (1, 2, 1, 2, True)),
        (mpich(1, 2), (1, 2, 1, 2, True)),
        (slurm(0, 2) | open_mpi(1, 2), (1, 2, 1, 2, True)),  # mpirun starts its daemons as a step
        (slurm(0, 2) | TORCH, (1, 4, 1, 2, False)),
        (open_mpi(0, 2) | TORCH, (1, 4, 1, 2, False)),
        (slurm(1, 2) | {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2, True)),  # a job's script set them
        (slurm(1, 2) | {"WORLD_SIZE": "2"}, (1, 2, 1, 2, True)),
        (slurm(0, 1) | job(1, 2), (1, 2, None, None, True)),
        (slurm(1, 2) | {"SLURM_PTY_PORT": "1", "SLURM_TASK_PID": "this process"}, (1, 2, 1, 2, True)),
    ],
    ids=str,
)
def test_a_rank_knows_its_place(environ, numbers):
    found = place.find({name: value.replace("this process", str(os.getpid())) for name, value in environ.items()})
    assert (found.rank, found.size, found.local_rank, found.local_size, found.one_host) == numbers


BATCH = {name: value for name, value in slurm(0, 4).items() if "STEP" not in name}


@pytest.mark.parametrize(
    "environ",
    [
        BATCH,  # sbatch's script
        BATCH | {"SLURM_STEP_ID": str(0xFFFF_FFFB)},
        slurm(0, 4) | {"SLURM_STEP_ID": str(0xFFFF_FFFA), "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "1"},  # salloc's shell
        slurm(0, 4) | {"SLURM_PTY_PORT": "1"},  # what is typed into the shell of srun -n 4 --pty bash
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NPROCS": "4"},  # salloc on a login node
        slurm(0, 1),
        open_mpi(0, 1),
        mpich(0, 1),
        {"PMI_RANK": "1", "PMI_SIZE": "2"},  # no more of them: srun's, or nobody's
    ],
    ids=str,
)  # fmt: skip
def test_a_process_on_its_own(environ):
    assert place.find(environ) is None


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (job(3, 2), "RANK=3 in the environment: expected a number from 0 to 1 (with WORLD_SIZE=2)"),
        (job(0, 2) | {"MASTER_PORT": "x"}, "MASTER_PORT=x "),
        (without(job(0, 2), "MASTER_PORT"), "MASTER_PORT= "),
        (without(job(0, 2), "MASTER_ADDR"), "MASTER_ADDR=: "),
        (job(0, 16) | {"PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE=8 in the environment without LOCAL_RANK"),
        (job(0, 2) | {"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without LOCAL_WORLD_SIZE"),
        (slurm(2, 2), "SLURM_PROCID=2 in the environment: expected a number from 0 to 1 (with SLURM_STEP_NUM_TASKS=2"),
        (slurm(0, 2) | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1 "),
        (slurm(3, 4) | {**MANY, "SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 "),
        (slurm(1, 2) | {"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS=two "),
        (without(slurm(1, 2), "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID=1 without SLURM_NTASKS"),
        (without(slurm(1, 2), "SLURM_STEP_ID"), "SLURM_PROCID=1 without SLURM_STEP_ID"),
        (without(slurm(1, 2), "SLURM_STEP_NODELIST"), "MASTER_ADDR=: "),
        (slurm(1, 2) | {"RANK": "0"}, "RANK=0 in the environment, but SLURM_PROCID=1"),
        (slurm(1, 2) | {"RANK": "1", "WORLD_SIZE": "1"}, "WORLD_SIZE=1 in the environment, but SLURM_STEP_NUM_TASKS=2"),
        (open_mpi(1, 2) | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 in the environment, but OMPI_COMM_WORLD_RANK=1"),
        (open_mpi(5, 2), "OMPI_COMM_WORLD_RANK=5 "),
        (without(open_mpi(1, 2), "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_RANK=1 without OMPI_COMM_WORLD_SIZE"),
        (without(open_mpi(1, 2), "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_SIZE=2 without OMPI_COMM_WORLD_LO"),
        (open_mpi(1, 4) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR=: "),  # over two machines
        (without(open_mpi(1, 2), "PMIX_NAMESPACE"), "MASTER_ADDR=: "),
        (open_mpi(1, 2) | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 "),
        (without(mpich(1, 2), "PMI_SIZE"), "PMI_RANK=1 without PMI_SIZE"),
    ],
    ids=str,
)  # fmt: skip
def test_variables_that_contradict_each_other_are_one_line(environ, said):
    with pytest.raises(InputError) as error:
        place.find(environ)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_ranks_of_one_run_meet_where_others_do_not():
    """Where no MASTER_ADDR is told: all ranks find the same place, and another run another one."""
    for of, other in ((slurm, {"SLURM_STEP_ID": "1"}), (open_mpi, {"PMIX_NAMESPACE": "another"})):
        where = {(found.address, found.port, found.run) for found in (place.find(of(rank, 3)) for rank in range(3))}
        assert len(where) == 1
        another = place.find(of(0, 3) | other)
        assert another.port != next(iter(where))[1]
        assert another.run != next(iter(where))[2]
        told = place.find(of(0, 3) | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
        assert (told.address, told.port) == ("10.0.0.1", 1234)
    assert place.find(slurm(3, 4) | MANY).address == "rack1node07"
    assert place.find(slurm(3, 4) | MANY | {"SLURM_STEP_NODELIST": "gpu-[003-005]-x,b"}).address == "gpu-003-x"


@pytest.mark.parametrize("names", ["aabb", "abab", "aaaa", "abcd"])
def test_ranks_count_who_is_on_their_host(names, monkeypatch):
    """Four ranks, to which only their ranks are told, on hosts of these names."""
    here = threading.local()
    monkeypatch.setattr(addresses, "this_host", lambda: hashlib.sha256(here.name.encode()).digest()[:16])
    store, found = dist.HashStore(), {}

    def rank(number: int) -> None:
        here.name = names[number]
        group = dist.ProcessGroupGloo(dist.PrefixStore("all", store), number, 4, distributed.MEET)
        found[number] = neighbours.of_this_rank(
            group, Place(number, 4, None, None, "127.0.0.1", 1, torchrun=False, stored=False)
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for number, name in enumerate(names):
        assert found[number] == (names[:number].count(name), names.count(name))


def test_the_host_is_the_same_for_all_its_processes():
    assert addresses.this_host() == addresses.this_host()
    assert len(addresses.this_host()) == 16


def test_a_port_that_is_taken_is_a_mistake_of_the_user():
    with socket.create_server(("127.0.0.1", 0)) as other:
        here = Place(0, 2, None, None, "localhost", other.getsockname()[1], torchrun=False, stored=False)
        guard = type("Guard", (), {"folder": None})()
        with pytest.raises(InputError, match=r"MASTER_PORT=\d+: rank 0 cannot listen there \(Address already in use\)"):
            distributed._store(here, distributed.Ending("rank 0", 0, guard))


OTHERS = """
from experiments.launching import start
start.run(lambda argv, world=None: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [("a", "a"), ("a", "b")])
def test_ranks_with_other_arguments_are_no_run(words):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OTHERS, word],
            env=without(os.environ, *launchers.NAMES) | job(rank, 2, port=str(port)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, word in enumerate(words)
    ]
    said = "".join(process.communicate(timeout=60)[0] for process in started)
    assert [process.returncode for process in started] == ([0, 0] if words[0] == words[1] else [2, 2]), said
    assert ("rank 1 has other arguments than rank 0" in said) == (words[0] != words[1])


THREE = """
import json, os
from experiments import finetune, pretokenize, sample
from experiments.launching import start
def main(argv, world=None):
    assert world is not None and world.size == 2, world
    assert (world.local_rank, world.local_size) == (world.rank, 2), world
    for command, flags in json.loads(os.environ["THREE"]):
        {"pretokenize": pretokenize, "finetune": finetune, "sample": sample}[command].main(flags, world)
start.run(main)
"""


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A small model, a VQ, and five pictures with captions."""
    folder = tmp_path_factory.mktemp("materials")
    small_run.write_inputs(folder)
    cfg = VQConfig(channels=8, multipliers=(1, 1, 1, 1), res_blocks=1, codes=small_run.CODES, groups=4)
    checkpoint.save_vq(folder / "vq", vq.init(cfg), cfg)
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    rows = [{"file": f"{i}.png", "prompt": f"picture {i}"} for i in range(5)]
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "prompts.txt").write_text("a\nb\nc\n")
    return folder


def three(materials: Path, out: Path) -> dict[str, str]:
    """The environment of THREE: a feature set, a model trained on it and pictures drawn by a model, all in OUT."""
    model, codec = ["--model", str(materials / "lm")], ["--vq", str(materials / "vq")]
    on = ["--device", "cpu"]
    set_ = [str(materials / "data.json"), str(out / "features"), *model, *codec, "--size", "64", "--shard", "2", *on]
    run = [*model, "--features", str(out / "features"), "--out", str(out / "run"), "--steps", "2", "--batch", "3", "--log-every", "1"]  # fmt: skip
    drawn = [*model, *codec, "--prompts", str(materials / "prompts.txt"), "--width", "32", "--height", "32", "--out", str(out / "pictures"), "--batch", "2"]  # fmt: skip
    commands = [("pretokenize", set_), ("finetune", [*run, "--compile", "off", *on]), ("sample", [*drawn, *on])]
    return {"THREE": json.dumps(commands)}


def made(out: Path) -> dict[str, str]:
    """A hash of every file in OUT; of metrics without the time that they took."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    rows = [json.loads(line) for line in files["run/metrics.jsonl"].splitlines()]
    files["run/metrics.jsonl"] = repr([row | {"tokens_per_second": 0} for row in rows]).encode()
    passing = (".", "run/checkpoints")  # locks, and what a folder of checkpoints says about its writer
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if not name.startswith(passing)}


@slow
def test_all_launchers_make_the_same_run(launch, materials, tmp_path):
    """Two processes pretokenize, train and draw: each launcher leaves the same bytes."""
    out = tmp_path / "torchrun"
    run = launch(
        TORCHRUN,
        *STANDALONE,
        "--nproc_per_node",
        2,
        "--no-python",
        sys.executable,
        "-c",
        THREE,
        **three(materials, out),
    )
    assert run.wait(90) == 0, run.text()
    wanted = made(out)
    assert {name.partition("/")[0] for name in wanted} == {"features", "run", "pictures"}
    ways = {
        "job": lambda rank: job(rank, 2, port=port), "slurm": lambda rank: slurm(rank, 2, job=str(os.getpid())),
        "mpi": lambda rank: open_mpi(rank, 2, run=f"of test {os.getpid()}"),
    }  # fmt: skip
    port = free_port()
    for name, told in ways.items():
        command, do = (sys.executable, "-c", THREE), three(materials, tmp_path / name)
        runs = [launch(*command, **do, **told(rank)) for rank in (1, 0)]
        assert [run.wait(90) for run in runs] == [0, 0], [run.text() for run in runs]
        assert made(tmp_path / name) == wanted, name


PODS = """
from experiments.launching import start
def main(argv, world):
    print("of one pod:", world.total(world.local_size), world.total(world.local_rank))
start.run(main)
"""


@slow
@needs_root
@pytest.mark.parametrize("told", [job, slurm], ids=["job", "slurm"])
def test_ranks_on_two_hosts_are_each_the_first_of_its_own(told, hosts, launch):
    """Pods are told no LOCAL_RANK; a Slurm step tells it, on two nodes whose names nobody knows here."""
    nodes = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    where = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    runs = [
        launch(
            "ip",
            "netns",
            "exec",
            host,
            sys.executable,
            "-c",
            PODS,
            **{**told(i, 2), **nodes, "SLURM_NODEID": str(i), **where},
        )
        for i, host in enumerate(hosts)
    ]
    assert [run.wait(60) for run in runs] == [0, 0], [run.text() for run in runs]
    assert runs[0].text().splitlines()[-1] == "of one pod: 2 0"


@slow
def test_a_port_that_is_taken_ends_all_ranks_with_one_line(launch, materials, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        told = job(0, 2, port=str(other.getsockname()[1]))
        run = launch(sys.executable, "-c", THREE, **three(materials, tmp_path), **told)
        assert run.wait(60) == 2
        assert run.text().startswith("error: rank 0 of 2: MASTER_ADDR=127.0.0.1, MASTER_PORT=")
        assert run.text().count("\n") == 1


def test_every_variable_of_the_table_is_kept_from_a_guard():
    assert {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} <= set(launchers.NAMES)
    assert replace(place.find(job(0, 2)), rank=1) == place.find(job(1, 2))
