"""One command on many processes: who they are, how they meet, and what they share.

torchrun starts a process for each device, a rank, and tells it its place in the environment. Ranks meet through the launcher's
key-value store. It outlives ranks that are started again, so what belongs to one attempt is kept under a token of its own.
"""

import io
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from experiments import devices
from experiments.launching import addresses, guard, start, stopping
from experiments.launching.abort import ECHO, Ending, watch_launcher, watch_neighbour
from experiments.launching.place import Place
from experiments.launching.stopping import Stop
from lumina_fn import errors
from lumina_fn.errors import InputError
from lumina_fn.process import out_of_memory
from lumina_fn.sharding import Mesh

CONNECT = timedelta(seconds=15)  # to the launcher's store, which is there before its ranks are
MEET = timedelta(minutes=5)  # from the first rank to the last one: imports over a network disk
COMPUTE = timedelta(hours=1)  # from the first rank to the last one in a collective: it may be compiling
FOREVER = timedelta(days=365)  # while rank 0 writes a model, say


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
            return devices.device(name)
        kind = devices.kind(name) if name == "auto" else name
        if ":" in kind:
            raise InputError(
                f"--device {name}: each of the {self.size} ranks takes a device of its own; expected a kind, such as cpu or npu"
            )
        device = devices.device(kind if kind == "cpu" else f"{kind}:{self.local_rank}")
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)
        return device


ALONE = World()


def run(main: Callable[..., int | None]) -> None:
    """`launching.start.run`, for a program that has imported PyTorch already."""
    start.run(main)


def run_rank(main: Callable[..., int | None], here: Place, own: start.Guard) -> int:
    """Run main(None, world) on this rank; its exit code, if no rank failed."""
    ending = Ending(f"rank {here.rank} of {here.size}", here.local_rank, own)
    watch_launcher(ending)
    world, done = _join(here, ending)
    try:
        with nullcontext() if here.rank == 0 else redirect_stdout(io.StringIO()):
            code = main(None, world) or 0
        world.barrier()
    except SystemExit as asked:  # --help
        code = asked.code
    except InputError as error:
        if refused := out_of_memory.line(error):  # of which something was made, as in `errors.run`
            ending(1, errors.printable(refused))
        ending(2, errors.printable(error))
    except Exception as error:
        if refused := out_of_memory.line(error):
            ending(1, errors.printable(refused))
        failure = traceback.format_exc()
        time.sleep(ECHO)  # a collective fails where another rank is lost: then `watch_neighbour` says so
        ending(1, f"failed\n{failure}")
    done()
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _join(here: Place, ending: Ending) -> tuple[World, Callable[[], None]]:
    """This rank's world, and what to call when all ranks are done."""
    try:
        store = _store(here, ending)
        store.set_timeout(MEET)
        launch = dist.PrefixStore("lumina", store)
        attempt = dist.PrefixStore(_meet(launch, here.rank, here.size), launch)
        ending.store = attempt.clone()  # a connection of its own: the other may be waiting
        world = World(here.rank, here.size, here.local_rank, here.local_size, launch, attempt, ending=ending)
        if here.size == 1:
            return world, ending.guard.done
        launcher = addresses.LOOPBACK if here.one_host else here.address
        address = addresses.own_address(launcher, many_hosts=not here.one_host)
        done = watch_neighbour(attempt, here.rank, here.size, address, ending)
        control = dist.ProcessGroupGloo(dist.PrefixStore("control", attempt), here.rank, here.size, FOREVER)
    except (RuntimeError, OSError, ValueError) as error:
        ending(1, f"cannot meet the other ranks: {str(error).splitlines()[0]}")
    return replace(world, control=control), done


def _store(here: Place, ending: Ending) -> dist.Store:
    """Where all ranks of a launch meet.

    On one machine under torchrun that is a file of this user's alone: torchrun's own store listens on all addresses, and whoever
    reaches it reads and writes it. Over several machines it is the launcher's store, else one that rank 0 holds, which listens at
    MASTER_ADDR alone.
    """
    if ending.guard.folder is not None:
        path = ending.guard.folder / guard.STORE
        path.touch()  # an error where the folder is gone: FileStore waits for it, and holds up all threads of this process
        return dist.FileStore(str(path), -1)
    if here.size == 1:
        return dist.HashStore()
    host = here.address if here.stored or not here.one_host else addresses.LOOPBACK
    if not here.stored and here.rank == 0:
        listener = addresses.listening(host, here.port, many_hosts=not here.one_host)
        host = listener.getsockname()[0]
        store = dist.TCPStore(
            host, here.port, here.size, True, CONNECT, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    else:
        _reach(host, here.port, CONNECT if here.stored else MEET)
        store = dist.TCPStore(host, here.port, here.size, False, CONNECT)
    ending.where = (host, here.port)
    return store


def _reach(host: str, port: int, timeout: timedelta) -> None:
    """Wait until somebody listens there. PyTorch itself would say a line for each attempt."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            return socket.create_connection((host, port), timeout.total_seconds()).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens at MASTER_ADDR={host}, MASTER_PORT={port} ({error})") from error
        time.sleep(0.2)


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


class Sharing(NamedTuple):
    """How ranks share parameters: lumina_fn.sharding.Mesh says what each field means."""

    strategy: str
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    shard_size: int | None
    forward_prefetch: bool
    backward_prefetch: bool


def mesh(world: World, device: torch.device, sharing: Sharing) -> Mesh | None:
    """Who shares what; None for a process on its own. hybrid strategies shard within a host, or groups of shard_size ranks."""
    if world.size == 1:
        return None
    shard_size = sharing.shard_size or world.local_size
    if sharing.strategy.startswith("hybrid") and world.size % shard_size:
        raise InputError(f"--shard-size {shard_size}: expected a divisor of the {world.size} ranks")
    dist.init_process_group(
        dist.get_default_backend_for_device(device), store=dist.PrefixStore("group", world.attempt), rank=world.rank,
        world_size=world.size, timeout=COMPUTE,
    )  # fmt: skip
    return Mesh(dist.group.WORLD, world.rank, world.size, device, **sharing._replace(shard_size=shard_size)._asdict())
