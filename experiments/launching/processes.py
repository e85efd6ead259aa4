"""A gloo group of new processes on this machine, and the memory that a process takes."""

import ctypes
import gc
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from experiments.launching import addresses

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """fn(rank, size, *args) in `size` new processes of one thread each; returns the ranks' results in order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, folder, fn, args), nprocs=size)
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    addresses.own_address(addresses.LOOPBACK, many_hosts=False)  # gloo listens there, and looks up no name
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(fn(rank, size, *args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def resident() -> int:
    """Bytes of physical memory that this process takes now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Return freed memory to the system and restart `peak`, so that earlier allocations do not count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")


def peak() -> int:
    """The largest number of bytes in physical memory since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1])
