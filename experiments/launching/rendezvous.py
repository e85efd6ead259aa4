"""torchrun's meeting of machines over a store that listens at one address: `torchrun --rdzv_backend lumina`.

The store of torchrun's own backends, static and c10d, listens on all addresses of a machine, without a password: whoever reaches
it may stop a run. This one is static's over a socket that is bound to the endpoint's address; on one machine, to the loopback.
torchrun finds it by an entry point of pyproject.toml.
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

BACKEND = "lumina"  # of pyproject.toml's entry point
_TIMEOUT = 600  # seconds in which all machines come, unless torchrun was told another number


class _Bound(StaticTCPRendezvous):
    """Static, with the first machine's store over a socket that listens already."""

    def __init__(self, listener: socket.socket | None, *about: str | int):
        super().__init__(*about)
        self._listener = listener

    def get_backend(self) -> str:
        """The name that torchrun knows this by."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Before ranks are started, for the first time or again."""
        if self._store is None:
            descriptor = None if self._listener is None else self._listener.detach()
            self._store = TCPStore(
                self.master_addr, self.master_port, self.world_size, descriptor is not None, self.timeout,
                multi_tenant=True, master_listen_fd=descriptor,
            )  # fmt: skip
        where = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(PrefixStore(self.run_id, self._store), self.rank, self.world_size, where)


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun calls for this backend."""
    return _create


def _create(told: RendezvousParameters) -> RendezvousHandler:
    """This machine's part of the meeting. A mistake ends torchrun: one line, exit 2."""
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
    if not 0 < port <= MOST_PORTS:
        raise InputError(f"--rdzv_endpoint {told.endpoint}: expected ADDRESS:PORT of the first machine")
    listener = None
    if int(rank) == 0:
        try:
            listener = addresses.listening(address, port, many_hosts=hosts > 1)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"--rdzv_endpoint {told.endpoint}: this machine, the first one, cannot listen there ({error}); expected an address "
                "of its own on the network that all machines share, and a port that is free on it"
            ) from error
    if hosts == 1:
        address = addresses.LOOPBACK
    return _Bound(listener, address, port, int(rank), hosts, told.run_id, told.get_as_int("timeout", _TIMEOUT))
