"""Several processes of one machine that form a gloo group, as torchrun would start them."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """fn(rank, size, *args) in `size` new processes, one thread each; what every rank returns, in order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, folder, fn, args), nprocs=size)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(fn(rank, size, *args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
