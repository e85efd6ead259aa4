"""A launch that nobody outside disturbs, of which nothing is left, and whose variables are believed only if they agree."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters

from experiments.launching import guard, place, rendezvous
from experiments.launching.stopping import Stop
from lumina_fn.errors import InputError
from tests.experiments.launching import test_launch
from tests.experiments.launching.test_launch import (
    ENDLESS,
    ROOT,
    free_port,
    is_alive,
    needs_root,
    on_hosts,
    rows,
    slow,
    steps_run,
    until,
)

launch, inputs, hosts = test_launch.launch, test_launch.inputs, test_launch.hosts  # fixtures
WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
ALONE = {**WHOLE, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
LOOPBACK, LISTENS = "0100007F", "0A"  # in /proc/net/tcp


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
        (without("LOCAL_RANK", "LOCAL_WORLD_SIZE"), "RANK=1 and WORLD_SIZE=4 without LOCAL_RANK"),
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
    """Two ranks of a launcher that is not torchrun are no two runs."""
    for rank in ("0", "1"):
        run = finetune(launch, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        assert run.wait(3) == 2
        assert run.text().startswith(f"error: RANK={rank} and WORLD_SIZE=2 without LOCAL_RANK in the environment")
        assert run.text().count("\n") == 1


@pytest.mark.parametrize("word", ["x", "99999", "", b"\xff\xfe", " 15", "15 ", "9", "-15", "0" * 5000])
def test_only_the_numbers_of_signals_that_ask_for_it_stop_a_run(word):
    store, over = dist.HashStore(), threading.Event()
    store.set("stop", word)
    store.set("in step 1", b"\xff")
    stop = Stop(0, 2, store)
    assert not stop.before(7)
    listener = threading.Thread(target=stop.listen, args=(over,), daemon=True)
    listener.start()
    time.sleep(0.1)
    assert listener.is_alive()
    assert stop.number is None
    stop.ask(signal.SIGTERM)
    time.sleep(0.6)
    assert listener.is_alive()  # the other rank has not said in which step it is
    store.set("in step 1", "9")
    listener.join(2)
    assert stop.number == signal.SIGTERM
    assert [stop.before(step) for step in (9, 10)] == [False, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_every_signal_that_torchrun_passes_on_stops_a_run(number):
    store = dist.HashStore()
    stop = Stop(0, 1, store)
    listener = threading.Thread(target=stop.listen, args=(threading.Event(),), daemon=True)
    listener.start()
    stop.ask(number)
    listener.join(5)
    assert stop.number == number


def listening(pids) -> set[tuple[str, int]]:
    """Addresses, as /proc writes them, and ports on which processes listen, in the network of the first of them."""
    sockets = set()
    for file in [file for pid in pids for file in Path("/proc").glob(f"{pid}/fd/*")]:
        with contextlib.suppress(OSError):  # it is closed meanwhile
            sockets.add(str(file.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{next(iter(pids))}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in sockets:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def parameters(endpoint: str, hosts: int = 1, **told: str) -> RendezvousParameters:
    return RendezvousParameters("lumina", endpoint, "some run", hosts, hosts, **told)


def test_torchrun_listens_on_the_loopback_alone():
    port = int(free_port())
    handler = rendezvous.handler()(parameters(f"no.such.host:{port}", rank="0"))
    info = handler.next_rendezvous()
    assert (LOOPBACK, port) in listening([os.getpid()])
    assert [address for address, at in listening([os.getpid()]) if at == port] == [LOOPBACK]
    assert (info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) == ("127.0.0.1", port)
    assert (info.rank, info.world_size) == (0, 1)
    assert handler.get_backend() == "lumina"


@pytest.mark.parametrize(
    "told",
    [
        parameters("10.255.255.1:29500", hosts=2, rank="0"),  # another machine's
        parameters("127.0.0.1:29500", hosts=2, rank="0"),  # where others do not find it
        parameters("127.0.0.1:29500", hosts=2),
        parameters("127.0.0.1:29500", hosts=2, rank="2"),
        parameters("127.0.0.1:29500", rank="x"),
        parameters("127.0.0.1:abc", rank="0"),
        parameters("127.0.0.1", rank="0"),
        parameters("", rank="0"),
    ],
    ids=lambda told: f"{told.endpoint} {told.max_nodes} {told.config}",
)
def test_a_mistake_in_the_meeting_of_machines_is_one_line(told, capsys, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(SystemExit) as end:
        rendezvous.handler()(told)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --rdzv_")


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit):
        rendezvous.handler()(parameters(f"127.0.0.1:{other.getsockname()[1]}", rank="0"))
    assert "a port that is free" in capsys.readouterr().err


def torchrun(*flags, ranks: int = 2) -> list:
    return test_launch.torchrun("--shutdown-timeout", 900, *flags, ranks=ranks)


@slow
def test_nothing_in_torchruns_store_disturbs_a_run(launch, inputs, tmp_path):
    """Whoever reaches it overwrites every key, and says what ranks say to each other under every name."""
    port, out = free_port(), tmp_path / "run"
    run = launch(*torchrun("--master_port", port), *inputs, "--out", out, "--steps", 40, "--log-every", 1)
    steps_run(out, run)
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=5))
    names = [name.strip("/") for name in store.list_keys()]
    assert names  # torchrun's own
    for folder in ["", *names, *(name.rsplit("/", 1)[0] for name in names), "lumina", "none/lumina"]:
        for word in ("", "/stop", "/ended", "/in step 0", "/hello 1"):
            store.set(folder + word, "15")
    with socket.create_connection(("127.0.0.1", int(port))) as stranger:
        stranger.sendall(bytes(range(256)) * 20)
    run.look()
    assert {address for address, at in listening(run.seen) if at != int(port)} == {LOOPBACK}
    assert run.wait(60) == 0, run.text()
    assert [row["step"] for row in rows(out)] == list(range(1, 41))


@slow
def test_a_script_on_one_machine_listens_on_the_loopback_alone(launch, inputs, tmp_path):
    port, out = free_port(), tmp_path / "run"
    environment = {"PATH": f"{test_launch.TORCHRUN.parent}:{os.environ['PATH']}", "NPUS_PER_NODE": "2"}
    script = ROOT / "experiments/launch/ascend_1x8.sh"
    run = launch(
        "bash",
        script,
        *inputs,
        "--out",
        out,
        *ENDLESS,
        **environment,
        MASTER_ADDR=socket.gethostname(),
        MASTER_PORT=port,
    )
    steps_run(out, run)
    run.look()
    assert {address for address, _ in listening(run.seen)} == {LOOPBACK}
    assert (LOOPBACK, int(port)) in listening(run.seen)
    assert_nothing_is_left(run, [psutil.Process(run.process.pid)], 15)


@slow
@needs_root
def test_over_two_machines_a_run_listens_on_their_network_alone(hosts, launch, inputs, tmp_path):
    runs = on_hosts(hosts, launch, *inputs, "--out", tmp_path / "run", *ENDLESS)
    steps_run(tmp_path / "run", runs[0])
    for run, own in zip(runs, ("01004D0A", "02004D0A"), strict=True):  # 10.77.0.1 and 10.77.0.2
        run.look()
        assert {address for address, _ in listening(run.seen)} == {own}
    runs[0].rank(0).send_signal(signal.SIGSTOP)
    runs[1].rank(1).kill()
    assert [run.wait(30) for run in runs] == [1, 1]


def assert_nothing_is_left(run, killed: list[psutil.Process], seconds: float) -> None:
    """Neither a process nor the folder in which ranks met."""
    run.look()
    assert len(folders(run)) == 1
    for process in killed:
        process.kill()
    run.wait(seconds)
    assert folders(run) == []


def folders(run) -> list[Path]:
    found = []
    for keeper in Path(tempfile.gettempdir()).glob(f"lumina-*/{guard.KEEPER}"):
        with contextlib.suppress(FileNotFoundError):  # another run's
            found += [keeper.parent] if keeper.read_text() in map(str, run.seen) else []
    return found


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
