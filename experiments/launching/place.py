"""The rank of this process, read from the environment that its launcher sets. PyTorch is not imported, so mistakes are reported at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from lumina_fn.errors import InputError

OF_ALL, OF_HOST = ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
NAMES = (*OF_ALL, *OF_HOST)
RUN_ID = "TORCHELASTIC_RUN_ID"  # set by torchrun, and by nothing else
MOST_RANKS, MOST_PORTS = 65_536, 65_535
INSTEAD = f"start the command with torchrun, or unset {', '.join(NAMES)} for a process on its own"


@dataclass(frozen=True)
class Place:
    """One rank of a run, and where its ranks meet."""

    rank: int
    size: int
    local_rank: int  # on this host
    local_size: int
    address: str
    port: int
    torchrun: bool  # whether torchrun started this process
    stored: bool  # whether the launcher holds a store at that address and port; else rank 0 does

    @property
    def one_host(self) -> bool:
        """Whether all ranks run on this host."""
        return self.size == self.local_size


def find(environ: Mapping[str, str]) -> Place | None:
    """This process's place; None for a process on its own. Raises InputError for variables that are incomplete or contradict each other.

    RANK=0 and WORLD_SIZE=1 without LOCAL_RANK and LOCAL_WORLD_SIZE also mean a process on its own: some containers set them.
    """
    given = [name for name in NAMES if name in environ]
    if not set(given) & {"RANK", *OF_HOST} and environ.get("WORLD_SIZE", "1") == "1":
        return None
    for name in OF_ALL:
        if name not in environ:
            raise InputError(f"{given[0]}={environ[given[0]]} without {name} in the environment: {INSTEAD}")
    size = _number(environ, "WORLD_SIZE", 1, MOST_RANKS)
    rank = _number(environ, "RANK", 0, size - 1)
    if not set(given) & set(OF_HOST):
        if size == 1:
            return None
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={size} without LOCAL_RANK in the environment, as Kubernetes' PyTorchJob sets them: "
            f"expected torchrun as the launcher, which starts a process for each device of a machine; {INSTEAD}"
        )
    for name in OF_HOST:
        if name not in environ:
            raise InputError(f"{given[-1]}={environ[given[-1]]} without {name} in the environment: {INSTEAD}")
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1, size)
    local_rank = _number(environ, "LOCAL_RANK", 0, min(local_size - 1, rank))
    address = environ.get("MASTER_ADDR", "")
    if not address or address.split() != [address]:
        raise InputError(
            f"MASTER_ADDR={address}: expected the address or name of the machine where ranks meet; {INSTEAD}"
        )
    port = _number(environ, "MASTER_PORT", 1, MOST_PORTS)
    stored = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, local_rank, local_size, address, port, RUN_ID in environ, stored)


def _number(environ: Mapping[str, str], name: str, least: int, most: int) -> int:
    """The number in a variable. Raises InputError if it is not within the bounds."""
    text = environ.get(name, "")
    if text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most:
        return int(text)
    others = ", ".join(f"{other}={environ[other]}" for other in NAMES if other != name and other in environ)
    expected = f"a number from {least} to {most}" if least < most else str(least)
    raise InputError(f"{name}={text} in the environment: expected {expected} (with {others}); {INSTEAD}")
