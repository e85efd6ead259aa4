"""One command on many processes: how ranks connect, and the collectives that they use.

A launcher, such as torchrun, starts one process for each device, a rank, and tells it its numbers in environment variables. Ranks meet
through the launcher's key-value store, or through rank 0's if the launcher has none. The launcher's store outlives ranks that are
started again, so the keys of each attempt have a prefix of their own.
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
from experiments.launching import addresses, guard, neighbours, start, stopping
from experiments.launching.abort import ECHO, Ending, watch_launcher, watch_neighbour
from experiments.launching.place import Place
from experiments.launching.stopping import Stop
from lumina_fn import errors
from lumina_fn.errors import InputError
from lumina_fn.process import out_of_memory
from lumina_fn.sharding import Mesh

CONNECT = timedelta(seconds=15)  # limit for reaching the launcher's store, which exists before its ranks start
MEET = timedelta(minutes=5)  # limit from the first rank to the last one: imports from a network disk take long
COMPUTE = timedelta(hours=1)  # limit from the first rank to the last one in a collective: a rank may be compiling
FOREVER = timedelta(days=365)  # no limit, for example while rank 0 writes a model


@dataclass(frozen=True)
class World:
    """The ranks of a run, as seen by one of them; by default, a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this host
    local_size: int = 1
    launch: dist.Store | None = None  # holds the keys of all attempts of this launch
    attempt: dist.Store | None = None  # holds the keys of this attempt
    control: dist.ProcessGroupGloo | None = None  # collectives on the CPU, whichever device computes
    ending: Ending | None = None
    restarts: int = 0  # how often the launcher has started the ranks again

    def say(self, text: str) -> None:
        """Print a line on stderr, on rank 0 only."""
        if self.rank == 0:
            print(errors.printable(text), file=sys.stderr)

    def barrier(self) -> None:
        """Wait until every rank has called this; a rank that fails before ends all ranks."""
        if self.control is not None:
            self.control.barrier().wait()

    def background_barrier(self) -> Callable[[], None]:
        """A barrier for a background thread, separate from `barrier`. Every rank must call this method at the same place."""
        if self.size == 1:
            return lambda: None
        store = dist.PrefixStore("background", self.attempt)
        group = dist.ProcessGroupGloo(store, self.rank, self.size, FOREVER)
        return lambda: group.barrier().wait()

    def stopping(self) -> AbstractContextManager[Stop]:
        """A context in which SIGTERM and SIGINT stop the run after a step instead of at once."""
        if self.ending is None:
            return stopping.alone()
        return stopping.together(self.rank, self.size, self.attempt, self.ending)

    def total(self, n: int) -> int:
        """The sum of n over all ranks."""
        return int(self.sum(torch.tensor([n])))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over all ranks, whose tensors have one shape; x itself receives it."""
        if self.control is not None:
            self.control.allreduce([x]).wait()
        return x

    def remember(self, fact: str) -> None:
        """Store a fact until the launcher ends, for ranks that it starts again."""
        if self.launch is not None:
            self.launch.set(fact, "")

    def remembers(self, fact: str) -> bool:
        """Whether any rank of this launch has stored the fact."""
        return self.launch is not None and self.launch.check([fact])

    def device(self, name: str) -> torch.device:
        """This rank's own device of that kind; `auto` is an NPU if there is one, else a GPU, else the CPU.

        A rank that was started again first waits until an NPU lets go of the process that was there before it. Raises InputError if the
        device is not available, and for a numbered device if there are several ranks.
        """
        if self.restarts and devices.kind(name) == "npu":
            self.say(
                f"note: started again: the devices are left alone for {devices.LET_GO} s, until the last processes are off them"
            )
            time.sleep(devices.LET_GO)
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
    """Run main(None, world) on this rank; returns its exit code. If a rank fails, the process exits instead."""
    ending = Ending(f"rank {here.rank} of {here.size}", here.local_rank or 0, own)
    watch_launcher(ending)
    world, done = _join(here, ending)
    try:
        with nullcontext() if here.rank == 0 else redirect_stdout(io.StringIO()):
            code = main(None, world) or 0
        world.barrier()
    except SystemExit as asked:  # --help
        code = asked.code
    except InputError as error:
        if refused := out_of_memory.line(
            error
        ):  # the InputError was raised from a failed allocation, as in `entry.run`
            ending(1, errors.printable(refused))
        ending(2, errors.printable(error))
    except Exception as error:
        if refused := out_of_memory.line(error):
            ending(1, errors.printable(refused))
        failure = traceback.format_exc()
        time.sleep(ECHO)  # a collective also fails if another rank dies: `watch_neighbour` then reports that first
        ending(1, f"failed\n{failure}")
    done()
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _join(here: Place, ending: Ending) -> tuple[World, Callable[[], None]]:
    """This rank's world, and the function to call when this rank has finished."""
    try:
        store = _store(here, ending)
        store.set_timeout(MEET)
        launch = dist.PrefixStore(f"lumina {here.run}", store)
        attempt = dist.PrefixStore(_meet(launch, here.rank, here.size), launch)
        ending.store = attempt.clone()  # a second connection: the first one may be blocked in a call
        world = World(
            here.rank, here.size, here.local_rank or 0, here.local_size or 1, launch, attempt, ending=ending, restarts=here.restarts
        )  # fmt: skip
        if here.size == 1:
            return world, ending.guard.done
        launcher = addresses.LOOPBACK if here.one_host else here.address
        address = addresses.own_address(launcher, many_hosts=not here.one_host)
        done = watch_neighbour(attempt, here.rank, here.size, address, ending)
        control = dist.ProcessGroupGloo(dist.PrefixStore("control", attempt), here.rank, here.size, FOREVER)
    except InputError as error:
        ending(2, errors.printable(error))
    except (RuntimeError, OSError, ValueError) as error:
        ending(1, f"cannot meet the other ranks: {str(error).splitlines()[0]}")
    world = replace(world, control=control)
    if strangers := neighbours.other_commands(world.control, world.size):
        ending(
            2, f"rank {strangers[0]} has other arguments than rank 0: expected the same command for every rank of a run"
        )
    local_rank, local_size = neighbours.of_this_rank(world.control, here)
    ending.local_rank = local_rank
    return replace(world, local_rank=local_rank, local_size=local_size), done


def _store(here: Place, ending: Ending) -> dist.Store:
    """The key-value store through which all ranks of a launch meet.

    On one machine under torchrun it is a file that only this user can access: torchrun's own store listens on all addresses, and
    anyone who reaches it can read and write it. On several machines it is the launcher's store if there is one, else a store of
    rank 0 that listens only at MASTER_ADDR. Raises InputError if rank 0 cannot listen there.
    """
    if ending.guard.folder is not None:
        path = ending.guard.folder / guard.STORE
        path.touch()  # raises if the folder is gone; FileStore would wait for it and block all threads of this process
        return dist.FileStore(str(path), -1)
    if here.size == 1:
        return dist.HashStore()
    host = here.address if here.stored or not here.one_host else addresses.LOOPBACK
    if not here.stored and here.rank == 0:
        try:
            listener = addresses.listening(host, here.port, many_hosts=not here.one_host)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"MASTER_ADDR={here.address}, MASTER_PORT={here.port}: rank 0 cannot listen there ({addresses.reason(error)}); expected "
                "an address of its own on the network that all ranks share, and a port that is free on it"
            ) from error
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
    """Wait until a process listens there. PyTorch itself would print a line for each attempt."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            return socket.create_connection((host, port), timeout.total_seconds()).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens at MASTER_ADDR={host}, MASTER_PORT={port} ({error})") from error
        time.sleep(0.2)


def _meet(launch: dist.Store, rank: int, size: int) -> str:
    """A random token that is the same for all ranks of this attempt, and different from that of every earlier attempt.

    A value in the launcher's store may come from an earlier attempt, unless it is stored under a random key that this rank has just made.
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
    """How ranks share parameters; lumina_fn.sharding.Mesh documents the fields."""

    strategy: str
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    shard_size: int | None
    forward_prefetch: bool
    backward_prefetch: bool


def mesh(world: World, device: torch.device, sharing: Sharing) -> Mesh | None:
    """The mesh over all ranks; None for a process on its own. Hybrid strategies shard within a host, or within groups of shard_size ranks.

    Raises InputError if shard_size does not divide the number of ranks.
    """
    if world.size == 1:
        return None
    shard_size, hybrid = sharing.shard_size or world.local_size, sharing.strategy.startswith("hybrid")
    if hybrid and not sharing.shard_size and world.total(world.local_size) != world.size * world.local_size:
        raise InputError(
            f"--strategy {sharing.strategy}: hosts have different numbers of ranks, one of them {world.local_size}; give --shard-size"
        )
    if hybrid and world.size % shard_size:
        raise InputError(f"--shard-size {shard_size}: expected a divisor of the {world.size} ranks")
    dist.init_process_group(
        dist.get_default_backend_for_device(device), store=dist.PrefixStore("group", world.attempt), rank=world.rank,
        world_size=world.size, timeout=COMPUTE,
    )  # fmt: skip
    return Mesh(dist.group.WORLD, world.rank, world.size, device, **sharing._replace(shard_size=shard_size)._asdict())
