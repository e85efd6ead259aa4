"""A rendezvous backend of torchrun whose store listens at one address: `torchrun --rdzv_backend lumina`.

The store of torchrun's own backends, static and c10d, listens on all addresses of a machine, without a password: anyone who reaches
it can stop a run. This backend is the static one with a socket that is bound to the endpoint's address, or on one machine to the
loopback address, where port 0 takes one that is free. torchrun finds it through an entry point in pyproject.toml.
"""

import socket
import sys
from collections.abc import Callable

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from experiments.launching import addresses
from experiments.launching.place import MOST_PORTS
from lumina_fn import errors
from lumina_fn.errors import InputError

BACKEND = "lumina"  # the name of the entry point in pyproject.toml
_TIMEOUT = 600  # seconds in which all machines must join, unless --rdzv_conf sets `timeout`


class _Bound(StaticTCPRendezvous):
    """torchrun's static rendezvous; the first machine's store uses a socket that already listens."""

    def __init__(self, listener: socket.socket | None, *about: str | int):
        super().__init__(*about)
        self._listener = listener

    def get_backend(self) -> str:
        """The backend's name in torchrun."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """The store and this machine's rank; torchrun calls it before it starts ranks, for the first time or again."""
        if self._store is None:
            descriptor = None if self._listener is None else self._listener.detach()
            self._store = TCPStore(
                self.master_addr, self.master_port, self.world_size, descriptor is not None, self.timeout,
                multi_tenant=True, master_listen_fd=descriptor,
            )  # fmt: skip
        where = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(PrefixStore(self.run_id, self._store), self.rank, self.world_size, where)


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The function by which torchrun creates this backend."""
    return _create


def _create(told: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous of this machine. Wrong flags end torchrun with one line and exit code 2."""
    try:
        return _bound(told)
    except InputError as error:
        print(f"error: {errors.printable(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _bound(told: RendezvousParameters) -> RendezvousHandler:
    hosts = told.max_nodes
    rank = str(told.get("rank", "0" if hosts == 1 else ""))
    if not (rank.isascii() and rank.isdecimal() and int(rank) < hosts):
        raise InputError(f"--rdzv_conf rank={rank}: expected this machine's number, from 0 to {hosts - 1}")
    try:
        address, port = parse_rendezvous_endpoint(told.endpoint, -1)
    except ValueError:
        port = -1
    if not (0 if hosts == 1 else 1) <= port <= MOST_PORTS:
        raise InputError(f"--rdzv_endpoint {told.endpoint}: expected ADDRESS:PORT of the first machine")
    listener = None
    if int(rank) == 0:
        try:
            listener = addresses.listening(address, port, many_hosts=hosts > 1)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"--rdzv_endpoint {told.endpoint}: this machine, the first one, cannot listen there ({addresses.reason(error)}); expected an address "
                "of its own on the network that all machines share, and a port that is free on it"
            ) from error
        port = listener.getsockname()[1]
    if hosts == 1:
        address = addresses.LOOPBACK
    return _Bound(listener, address, port, int(rank), hosts, told.run_id, told.get_as_int("timeout", _TIMEOUT))
