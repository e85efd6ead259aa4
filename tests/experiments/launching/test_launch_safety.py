"""A launch that nobody outside disturbs: signals, stores and ports."""

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters

from experiments.launching import guard, rendezvous
from experiments.launching.stopping import Stop
from tests.experiments.launching import test_launch
from tests.experiments.launching.test_launch import (
    ENDLESS,
    ROOT,
    free_port,
    needs_root,
    on_hosts,
    rows,
    slow,
    steps_run,
)

launch, inputs, hosts = test_launch.launch, test_launch.inputs, test_launch.hosts  # fixtures
LOOPBACK, LISTENS = "0100007F", "0A"  # in /proc/net/tcp


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


def test_two_runs_on_one_machine_take_ports_of_their_own():
    infos = [rendezvous.handler()(parameters("127.0.0.1:0")).next_rendezvous() for _ in range(2)]
    ports = {info.bootstrap_store_info.master_port for info in infos}
    assert len(ports) == 2
    assert {(LOOPBACK, port) for port in ports} <= listening([os.getpid()])


@pytest.mark.parametrize(
    "told",
    [
        parameters("10.0.0.1:0", hosts=2, rank="0"),  # the others could not know it
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


def folders(run) -> list[Path]:
    found = []
    for keeper in Path(tempfile.gettempdir()).glob(f"lumina-*/{guard.KEEPER}"):
        with contextlib.suppress(FileNotFoundError):  # another run's
            found += [keeper.parent] if keeper.read_text() in map(str, run.seen) else []
    return found


def assert_nothing_is_left(run, killed: list[psutil.Process], seconds: float) -> None:
    """Neither a process nor the folder in which ranks met."""
    run.look()
    assert len(folders(run)) == 1
    for process in killed:
        process.kill()
    run.wait(seconds)
    assert folders(run) == []


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
