"""What ranks tell each other once they have met: on which host each runs, and with which command it was started."""

import hashlib
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.launching import addresses
from experiments.launching.place import Place


def _of_all(control: dist.ProcessGroupGloo, size: int, own: bytes) -> list[Tensor]:
    """These bytes of every rank, which gives as many."""
    mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(size)]
    control.allgather([found], [mine]).wait()
    return found


def other_commands(control: dist.ProcessGroupGloo, size: int) -> list[int]:
    """The ranks whose arguments are not rank 0's, which only a launcher that is not torchrun can bring about."""
    words = "\0".join(sys.argv[1:]).encode(errors="surrogateescape")
    commands = _of_all(control, size, hashlib.sha256(words).digest())
    return [rank for rank, command in enumerate(commands) if not torch.equal(command, commands[0])]


def of_this_rank(control: dist.ProcessGroupGloo, here: Place) -> tuple[int, int]:
    """This rank's number on its host, and how many ranks are there. Where the launcher does not tell them, ranks on equal hosts are counted."""
    if here.local_rank is not None and here.local_size is not None:
        return here.local_rank, here.local_size
    found = _of_all(control, here.size, addresses.this_host())
    neighbours = [rank for rank, host in enumerate(found) if torch.equal(host, found[here.rank])]
    local_rank = neighbours.index(here.rank) if here.local_rank is None else here.local_rank
    return local_rank, here.local_size or max(len(neighbours), local_rank + 1)
