"""A launch of which nothing is left, whatever ends or stops one of its processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from experiments.launching import guard
from tests.experiments.launching import test_launch
from tests.experiments.launching.test_launch import (
    ENDLESS,
    free_port,
    is_alive,
    rows,
    slow,
    steps_run,
    until,
)
from tests.experiments.launching.test_launch_safety import (
    LOOPBACK,
    assert_nothing_is_left,
    folders,
    listening,
    torchrun,
)

launch, inputs = test_launch.launch, test_launch.inputs  # fixtures


@slow
@pytest.mark.parametrize(
    ("kills", "stops"),
    [("L", "0"), ("L", "01"), ("0", "1"), ("0", "L1"), ("1", "L0"), ("1", "0"), ("L0", "1"), ("01", "L")],
)
def test_a_stopped_process_does_not_outlive_its_run(kills, stops, launch, inputs, tmp_path):
    """L is the launcher, which gives ranks 900 s to end once it asked them to."""
    run = launch(*torchrun(), *inputs, "--out", tmp_path / "run", *ENDLESS)
    steps_run(tmp_path / "run", run)
    who = {"L": psutil.Process(run.process.pid), "0": run.rank(0), "1": run.rank(1)}
    for name in stops:
        who[name].send_signal(signal.SIGSTOP)
    assert_nothing_is_left(run, [who[name] for name in kills], 15)


HANGING = """
import ctypes, os
from experiments import finetune
from experiments.finetuning import loop
from experiments.launching import distributed
def hang(*_):
    open(os.environ["RANK"], "w").close()
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    while True:  # it waits for itself with Python's lock: no thread of this process does anything
        library.pthread_mutex_lock(mutex)
if os.environ["RANK"] == "1":
    loop.main = hang
distributed.run(finetune.main)
"""


@slow
def test_a_rank_that_hangs_is_killed(launch, inputs, tmp_path):
    command = [test_launch.TORCHRUN, "--nproc_per_node", 2, "--shutdown-timeout", 900, "--no-python", sys.executable]
    run = launch(*command, "-c", HANGING, *inputs, "--out", tmp_path / "run", *ENDLESS)
    until((tmp_path / "1").exists, 60, run)
    time.sleep(0.5)
    assert_nothing_is_left(run, [run.rank(0)], 25)


SAVING = """
import os, time
from experiments import finetune
from experiments.finetuning import loop
from experiments.launching import distributed
def save(run, argv, world):
    with world.stopping() as stop:
        step = 1
        while not stop.before(step):
            open(os.environ["RANK"], "w").close()
            time.sleep(0.1)
            step += 1
        time.sleep(13 if world.rank else 0)
        open("saved by " + os.environ["RANK"], "w").close()
    return 143
loop.main = save
distributed.run(finetune.main)
"""


@slow
def test_ranks_that_save_once_they_are_asked_to_stop_are_left_alone(launch, inputs, tmp_path):
    """One for longer than a guard waits for a rank that should have ended."""
    command = [test_launch.TORCHRUN, "--nproc_per_node", 2, "--no-python", sys.executable]
    run = launch(*command, "-c", SAVING, *inputs, "--out", tmp_path / "run")
    until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), 60, run)
    run.process.terminate()
    run.wait(29)
    assert (tmp_path / "saved by 0").exists()
    assert (tmp_path / "saved by 1").exists()
    assert run.reasons() == []


@slow
def test_a_launcher_is_found_above_a_shell(launch, inputs, tmp_path):
    """Whose end a rank sees though its parent lives on."""
    script = f"trap '' TERM; {sys.executable} -m experiments.finetune " + '"$@"; sleep 1000'
    command = [test_launch.TORCHRUN, "--nproc_per_node", 2, "--no-python", "sh", "-c", script, "sh"]
    run = launch(*command, *inputs, "--out", tmp_path / "run", *ENDLESS)
    steps_run(tmp_path / "run", run)
    run.look()
    ranks = [p for p in run.seen.values() if "experiments.finetune" in p.cmdline() and p.name().startswith("python")]
    ranks = [p for p in ranks if p.pid != run.process.pid]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGSTOP)
    run.process.kill()
    until(lambda: not any(map(is_alive, ranks)) and folders(run) == [], 15, run)


@slow
def test_ranks_that_torchrun_did_not_start_outlive_who_did(launch, inputs, tmp_path):
    """As nohup leaves them; rank 0 holds their store, on the loopback."""
    port, out = free_port(), tmp_path / "run"
    script = (
        'for rank in 0 1; do RANK=$rank LOCAL_RANK=$rank setsid "$@" & done; '
        "while [ ! -e stop ]; do sleep 0.1; done"
    )  # fmt: skip
    run = launch(
        "sh", "-c", script, "sh", sys.executable, "-m", "experiments.finetune", *inputs, "--out", out, "--steps", 40,
        "--log-every", 1, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="no.such.host", MASTER_PORT=port,
    )  # fmt: skip
    steps_run(out, run)
    run.look()
    assert {address for address, _ in listening(run.seen)} == {LOOPBACK}
    assert (LOOPBACK, int(port)) in listening(run.seen)
    (tmp_path / "stop").touch()
    run.wait(60)
    assert [row["step"] for row in rows(out)] == list(range(1, 41))


def test_a_guard_lives_no_longer_than_its_rank():
    ours, theirs = socket.socketpair()
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    assert guard.identify(rank.pid) is not None
    assert not guard.is_gone(guard.identify(rank.pid))
    assert guard.is_gone((rank.pid, 0))  # another process of that number
    found = guard.identify(rank.pid)
    rank.kill()
    until_gone = time.monotonic() + 5
    while not guard.is_gone(found) and time.monotonic() < until_gone:
        time.sleep(0.01)
    assert guard.is_gone(found)  # though nobody has waited for it
    rank.wait()
    assert not guard.guard(rank.pid, None, theirs, None)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("keeper", [None, str(os.getpid()), "another"], ids=["nobody", "this process", "another"])
def test_a_launch_leaves_no_folder(keeper, tmp_path):
    """It is there until the launcher is gone, and until no rank holds it; one guard waits for that."""
    folder = tmp_path / "launch"
    folder.mkdir()
    if keeper is not None:
        (folder / guard.KEEPER).write_text(keeper)
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    rank = guard.hold(folder)
    tidy = threading.Thread(target=guard.tidy, args=(folder, guard.identify(launcher.pid)), daemon=True)
    tidy.start()
    tidy.join(0.5)
    assert tidy.is_alive() == (keeper != "another")
    launcher.kill()
    launcher.wait()
    time.sleep(0.3)
    assert folder.exists()
    os.close(rank)
    tidy.join(5)
    assert not tidy.is_alive()
    assert folder.exists() == (keeper == "another")


def test_the_launcher_is_the_nearest_process_without_the_variable():
    me = guard.identify(os.getpid())
    assert guard.launcher_above(os.getpid(), "NO_SUCH_VARIABLE") == me
    shell = subprocess.Popen(
        ["sh", "-c", "sleep 1000; true"], env={**os.environ, "LUMINA_TEST": "1"}, start_new_session=True
    )
    try:
        while not Path(
            f"/proc/{shell.pid}/environ"
        ).read_bytes():  # the kernel fills it in a moment after Popen returns
            time.sleep(0.01)
        assert guard.launcher_above(shell.pid, "LUMINA_TEST") == me
        assert guard.launcher_above(shell.pid, "NO_SUCH_VARIABLE") is None  # a shell is no torchrun
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
