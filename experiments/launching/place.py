"""The rank of this process, read from the environment that its launcher sets. PyTorch is not imported, so mistakes are reported at once."""

import ipaddress
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from experiments.launching import launchers
from experiments.launching.launchers import Told
from lumina_fn.errors import InputError

RUN_ID = "TORCHELASTIC_RUN_ID"  # set by torchrun, and by nothing else
MOST_PORTS = 65_535
FIRST_PORT, PORTS = 20_000, 10_000  # of runs to which no port is told: below the ports that kernels choose themselves


@dataclass(frozen=True)
class Place:
    """One rank of a run, and where its ranks meet."""

    rank: int
    size: int
    local_rank: int | None  # on this host; None: it is found once the ranks have met
    local_size: int | None
    address: str
    port: int
    torchrun: bool  # whether torchrun started this process
    stored: bool  # whether the launcher holds a store at that address and port; else rank 0 does
    run: str = ""  # the launcher's name of the run, by which ranks of two runs at one port do not meet
    restarts: int = 0  # how often torchrun has started these ranks again

    @property
    def one_host(self) -> bool:
        """Whether all ranks run on this host; if that is not told, whether they meet where no other host reaches them."""
        return self.size == self.local_size or (self.local_size is None and _is_loopback(self.address))


def find(environ: Mapping[str, str]) -> Place | None:
    """This process's place; None for a process on its own. Raises InputError for variables that are incomplete or contradict each other."""
    told = launchers.read(environ)
    if told is None:
        return None
    address, instead = environ.get("MASTER_ADDR", _address(told)), launchers.instead(told.names)
    if not address or address.split() != [address]:
        raise InputError(
            f"MASTER_ADDR={address}: expected the name or address of rank 0's machine, and in MASTER_PORT a port there; {instead}"
        )
    port = _port(told.run) if told.run else 0
    if "MASTER_PORT" in environ or not port:
        port = launchers.number(environ, "MASTER_PORT", 1, MOST_PORTS, told.names)
    stored = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    again = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    restarts = int(again) if again.isascii() and again.isdecimal() and len(again) < 10 else 0
    numbers = told.rank, told.size, told.local_rank, told.local_size
    return Place(*numbers, address, port, RUN_ID in environ, stored, told.run, restarts)


def _address(told: Told) -> str:
    """Where ranks meet unless MASTER_ADDR says it; empty if it is not known."""
    if told.run and told.size == told.local_size:
        return "127.0.0.1"
    return told.first_host


def _port(run: str) -> int:
    """The port at which a run's ranks meet unless MASTER_PORT says it: the same for all ranks, and hardly ever another run's."""
    return FIRST_PORT + zlib.crc32(run.encode()) % PORTS


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):  # a name
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"
