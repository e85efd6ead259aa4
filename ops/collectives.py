"""Collectives as ops: traceable, and opaque to torch.func, unlike torch's own functional collectives."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName

from ops.define import define


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(GroupName(name))


def _all_gather(x: Tensor, group: str, size: int) -> Tensor:
    out = x.new_empty(x.numel() * size)
    dist.all_gather_single(out, x.contiguous(), group=_group(group))
    return out


def _reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    out = x.new_empty(x.numel() // size)
    dist.reduce_scatter_single(out, x.contiguous(), group=_group(group))
    return out


def _cpu_all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """all_gather by point-to-point messages, each received in its final place: gloo's own all_gather holds a second copy of the whole."""
    comm, x = _group(group), x.contiguous()
    rank, out = comm.rank(), x.new_empty(size, x.numel())
    for to, source in _pairs(rank, size):
        _exchange(comm, x, to, out[source], source)
    out[rank].copy_(x)
    return out.flatten()


def _cpu_reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    """reduce_scatter by point-to-point messages of one part each: gloo's own is an all_reduce of a copy of the whole."""
    comm, parts = _group(group), x.contiguous().view(size, -1)
    rank = comm.rank()
    total, other = parts[rank].clone(), torch.empty_like(parts[rank])
    for to, source in _pairs(rank, size):
        _exchange(comm, parts[to], to, other, source)
        total.add_(other)
    return total


def _pairs(rank: int, size: int) -> list[tuple[int, int]]:
    """For each round, the rank to send to and the rank to receive from."""
    return [((rank + shift) % size, (rank - shift) % size) for shift in range(1, size)]


def _exchange(comm: dist.ProcessGroup, send: Tensor, to: int, receive: Tensor, source: int) -> None:
    works = dist.isend(send, group=comm, group_dst=to), dist.irecv(receive, group=comm, group_src=source)
    for work in works:
        assert work is not None, "this rank is in the group"
        work.wait()


def _all_reduce(x: Tensor, group: str, size: int) -> Tensor:
    out = x.clone()
    dist.all_reduce(out, group=_group(group))
    return out


# vmap rules: every rank has the same number of items, and each item gets the result of a call of its own.
def _batched_all_gather(info, in_dims, x, group, size):
    x = x.movedim(in_dims[0], 0)
    whole = all_gather_op(x.flatten(), group, size)
    return whole.view(size, *x.shape).transpose(0, 1).flatten(1), 0


def _batched_reduce_scatter(info, in_dims, x, group, size):
    x = x.movedim(in_dims[0], 0)
    parts = x.unflatten(1, (size, -1)).transpose(0, 1)
    return reduce_scatter_op(parts.flatten(), group, size).view(len(x), -1), 0


all_gather_op = define(
    "all_gather(Tensor x, str group, int size) -> Tensor",
    fake=lambda x, group, size: x.new_empty(x.numel() * size),
    batched=_batched_all_gather,
    default=_all_gather,
    CPU=_cpu_all_gather,
)
reduce_scatter_op = define(
    "reduce_scatter(Tensor x, str group, int size) -> Tensor",
    fake=lambda x, group, size: x.new_empty(x.numel() // size),
    batched=_batched_reduce_scatter,
    default=_reduce_scatter,
    CPU=_cpu_reduce_scatter,
)
all_reduce_op = define(
    "all_reduce(Tensor x, str group, int size) -> Tensor",
    fake=lambda x, group, size: torch.empty_like(x),
    batched=lambda info, in_dims, x, group, size: (all_reduce_op(x, group, size), in_dims[0]),
    default=_all_reduce,
)

Group = tuple[str, int]  # a process group's name and size; a group of size 1 communicates nothing


def all_gather(x: Float[Tensor, " n"], group: Group) -> Float[Tensor, " m"]:
    """Every rank's vector, one after the other."""
    return x if group[1] == 1 else all_gather_op(x, *group)


def reduce_scatter(x: Float[Tensor, " m"], group: Group) -> Float[Tensor, " n"]:
    """This rank's part of the sum over ranks."""
    return x if group[1] == 1 else reduce_scatter_op(x, *group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks."""
    return x if group[1] == 1 else all_reduce_op(x, *group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(part, group, replicas, param_dtype, reduce_dtype):
        return all_gather(part.to(param_dtype), group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        part, ctx.group, ctx.replicas, _, ctx.reduce_dtype = inputs
        ctx.dtype = part.dtype

    @staticmethod
    def backward(ctx, d):
        return scatter(d, ctx.group, ctx.replicas, ctx.dtype, ctx.reduce_dtype), None, None, None, None


def gather(
    part: Float[Tensor, " n"], group: Group, replicas: Group, param_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> Float[Tensor, " m"]:
    """The whole vector in param_dtype; its backward is `scatter`."""
    return _Gather.apply(part, group, replicas, param_dtype, reduce_dtype)


def scatter(
    d: Float[Tensor, " m"], group: Group, replicas: Group, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """This rank's part of the gradients' sum over all ranks, added up in reduce_dtype."""
    return all_reduce(reduce_scatter(d.to(reduce_dtype), group), replicas).to(dtype)
