"""One command on many processes: who they are, how they meet, and what they share.

torchrun starts a process for each device, a rank, and tells it its place in the environment. Ranks meet through the launcher's
key-value store. It outlives ranks that are started again, so what belongs to one attempt is kept under a token of its own.
"""

import fcntl
import io
import ipaddress
import os
import secrets
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from experiments import settings, stopping
from experiments.ending import ECHO, Ending, watch_launcher, watch_neighbour
from experiments.stopping import Stop
from lumina_fn import errors
from lumina_fn.errors import InputError
from lumina_fn.sharding import Mesh

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what torchrun tells
CONNECT = timedelta(seconds=15)  # to the launcher's store, which is there before its ranks are
MEET = timedelta(minutes=5)  # from the first rank to the last one: imports over a network disk
COMPUTE = timedelta(hours=1)  # from the first rank to the last one in a collective: it may be compiling
FOREVER = timedelta(days=365)  # while rank 0 writes a model, say
_GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR


@dataclass(frozen=True)
class World:
    """The ranks of a run, as seen by one of them; by default, a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this host
    local_size: int = 1
    launch: dist.Store | None = None  # what earlier attempts of this launch left is still there
    attempt: dist.Store | None = None
    control: dist.ProcessGroupGloo | None = None  # on the CPU, whatever device computes
    ending: Ending | None = None

    def say(self, text: str) -> None:
        """A line on the terminal, once."""
        if self.rank == 0:
            print(errors.printable(text), file=sys.stderr)

    def barrier(self) -> None:
        """Wait for all ranks; one that fails instead ends them all."""
        if self.control is not None:
            self.control.barrier().wait()

    def background_barrier(self) -> Callable[[], None]:
        """A `barrier` for threads of their own, which says nothing to the others'. Every rank asks for it at the same place."""
        if self.size == 1:
            return lambda: None
        store = dist.PrefixStore("background", self.attempt)
        group = dist.ProcessGroupGloo(store, self.rank, self.size, FOREVER)
        return lambda: group.barrier().wait()

    def stopping(self) -> AbstractContextManager[Stop]:
        """While it lasts, who asks this run to stop gets an end after a step instead of one at once."""
        if self.ending is None:
            return stopping.alone()
        return stopping.together(self.rank, self.size, self.attempt, self.ending)

    def total(self, n: int) -> int:
        """The sum over ranks."""
        sum_ = torch.tensor([n])
        if self.control is not None:
            self.control.allreduce([sum_]).wait()
        return int(sum_)

    def remember(self, fact: str) -> None:
        """Keep this in mind until the launcher ends, for ranks that it starts again."""
        if self.launch is not None:
            self.launch.set(fact, "")

    def remembers(self, fact: str) -> bool:
        """Whether any rank of this launch was told so."""
        return self.launch is not None and self.launch.check([fact])

    def device(self, name: str) -> torch.device:
        """The device of that kind which is this rank's own; `auto` is an NPU if there is one, else a GPU, else the CPU."""
        if self.size == 1:
            return settings.device(name)
        kind = settings.kind(name) if name == "auto" else name
        if ":" in kind:
            raise InputError(
                f"--device {name}: each of the {self.size} ranks takes a device of its own; expected a kind, such as cpu or npu"
            )
        device = settings.device(kind if kind == "cpu" else f"{kind}:{self.local_rank}")
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        return device


ALONE = World()


def run(main: Callable[..., int | None]) -> None:
    """Run main(None, world) on every rank that torchrun started, or main(None) in a process on its own, and exit.

    Exit codes are those of `errors.run`. A rank that fails ends all others; why is printed once, with its rank.
    """
    if not os.environ.keys() >= set(PLACE):
        errors.run(main)
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in PLACE)
    ending = Ending(f"rank {rank} of {size}", local_rank)
    watch_launcher(ending)
    world, done = _join(rank, size, local_rank, local_size, ending)
    try:
        with nullcontext() if rank == 0 else redirect_stdout(io.StringIO()):
            code = main(None, world) or 0
        world.barrier()
    except SystemExit as asked:  # --help
        code = asked.code
    except InputError as error:
        ending(2, errors.printable(error))
    except Exception:
        failure = traceback.format_exc()
        time.sleep(ECHO)  # a collective fails where another rank is lost: then `watch_neighbour` says so
        ending(1, f"failed\n{failure}")
    done()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def _join(rank: int, size: int, local_rank: int, local_size: int, ending: Ending) -> tuple[World, Callable[[], None]]:
    """This rank's world, and what to call when all ranks are done."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=CONNECT))
        store.set_timeout(MEET)
        launch = dist.PrefixStore("lumina", store)
        attempt = dist.PrefixStore(_meet(launch, rank, size), launch)
        ending.where = (store.host, store.port)
        ending.store = attempt.clone()  # a connection of its own: the other may be waiting
        world = World(rank, size, local_rank, local_size, launch, attempt, ending=ending)
        if size == 1:
            return world, lambda: None
        address = _own_address(os.environ["MASTER_ADDR"], many_hosts=size > local_size)
        done = watch_neighbour(attempt, rank, size, address, ending)
        control = dist.ProcessGroupGloo(dist.PrefixStore("control", attempt), rank, size, FOREVER)
    except (RuntimeError, OSError) as error:
        ending(1, f"cannot meet the other ranks: {str(error).splitlines()[0]}")
    return replace(world, control=control), done


def _meet(launch: dist.Store, rank: int, size: int) -> str:
    """A token that all ranks of this attempt hold, and none of an earlier one.

    What a rank reads in the launcher's store may come from an earlier attempt, unless it answers what this rank has just made up.
    """
    own, deadline = secrets.token_hex(8), time.monotonic() + MEET.total_seconds()
    if rank != 0:
        launch.set(f"hello {rank}", own)
        token = launch.get(f"welcome {own}").decode()
        launch.set(f"{token} {rank}", "")
        return token
    missing = set(range(1, size))
    while missing := {other for other in missing if not launch.check([f"{own} {other}"])}:
        for other in missing:
            if launch.check([f"hello {other}"]):
                launch.set(f"welcome {launch.get(f'hello {other}').decode()}", own)
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(missing)} did not start within {MEET.total_seconds():.0f} seconds")
        time.sleep(0.02)
    return own


def _own_address(launcher: str, many_hosts: bool) -> str:
    """This host's address on the network that leads to the launcher; gloo is told to use it too, unless the user has told it.

    Left alone it takes whatever the host's name stands for.
    """
    interfaces = _interfaces()
    told = os.environ.get("GLOO_SOCKET_IFNAME")
    if told in interfaces:
        return interfaces[told]
    found = socket.getaddrinfo(launcher, 1, type=socket.SOCK_DGRAM)
    family, kind, _, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing
        own = probe.getsockname()[0]
    if many_hosts and ipaddress.ip_address(own).is_loopback:
        raise RuntimeError(f"{launcher} means {own} on this host, where others do not find it; set GLOO_SOCKET_IFNAME")
    for name in [name for name, address in interfaces.items() if address == own]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return own


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(any_socket, _GET_ADDRESS, struct.pack("256s", name.encode()))
                addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def mesh(
    world: World, device: torch.device, *, strategy: str, param_dtype: torch.dtype, reduce_dtype: torch.dtype,
    shard_size: int | None, forward_prefetch: bool, backward_prefetch: bool,
) -> Mesh | None:  # fmt: skip
    """Who shares what; None for a process on its own. hybrid strategies shard within a host, or groups of shard_size ranks."""
    if world.size == 1:
        return None
    shard_size = shard_size or world.local_size
    if strategy.startswith("hybrid") and world.size % shard_size:
        raise InputError(f"--shard-size {shard_size}: expected a divisor of the {world.size} ranks")
    dist.init_process_group(
        dist.get_default_backend_for_device(device), store=dist.PrefixStore("group", world.attempt), rank=world.rank,
        world_size=world.size, timeout=COMPUTE,
    )  # fmt: skip
    return Mesh(
        dist.group.WORLD, world.rank, world.size, device, strategy, param_dtype, reduce_dtype, shard_size,
        forward_prefetch, backward_prefetch,
    )  # fmt: skip
