"""Rung 5: real `npu` tensors that compute, on a machine without an NPU.

torch_npu itself, over the stand-in for CANN, makes the tensors, dispatches, and differentiates; their memory is the host's.
Below all that a mode runs each op where a kernel would be launched: torch's own kernel for a CPU on the same memory, or what
tests.ascend.npu_math says of one of torch_npu's ops. It shows wiring, layouts, masks and order of arguments; not the arithmetic
of Huawei's kernels, nor streams.
"""

import ctypes
from collections import Counter
from typing import Any

import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from tests.ascend.npu_math import NPU

CPU = torch.device("cpu")
# Ops that a device lets have tensors of the host beside its own: copies, and indices.
COPYING = {"aten::contiguous"}  # a view by its schema; torch_npu's kernel copies where it must
MIXED = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}


class NpuSim(TorchDispatchMode):
    """While it lasts, ops of `npu` tensors compute. `calls` counts them by name, our own and torch_npu's among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # fake and functional tensors have no memory, and know what to do
        device = next((d for x in tree_iter((args, kwargs)) if (d := _npu(x)) is not None), None)
        if device is None:
            return func(*args, **kwargs)
        if func._can_decompose() and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "PrivateUse1"):
            with self:  # it consists of other ops on this device, too
                return func.decompose(*args, **kwargs)
        name = func._schema.name
        self.calls[name] += 1
        if func.namespace == "lumina":
            with self:  # our kernel for the device runs, and the ops that it calls are simulated
                return func._op_dk(torch.DispatchKey.PrivateUse1, *args, **kwargs)
        if (func.is_view and name not in COPYING) or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)  # torch_npu's own: nothing is launched
        if func.namespace == "npu" and func not in NPU:
            raise NotImplementedError(
                f"{func} is not simulated: what it computes belongs into tests/ascend/npu_math.py"
            )
        if name not in MIXED:
            _refuse_hosts(name, args, kwargs)
        return _run(func, args, kwargs, device)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
    """The op on the tensors' memory. What it wrote in place it returns; what it made goes where the op was told, or to `device`."""
    origin: dict[int, tuple[Tensor, Tensor]] = {}  # by its id: what the CPU's kernel is given, and what that stands for
    hosts: dict[int, Tensor] = {}  # the other way round

    def given(x: Any) -> Any:
        if isinstance(x, torch.device):
            return CPU
        if isinstance(x, Tensor) and id(x) not in hosts:
            hosts[id(x)] = host = _view(x) if x.device.type == "npu" else x
            origin[id(host)] = host, x
        return hosts.get(id(x), x)

    def returned(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return origin[id(x)][1] if id(x) in origin else _moved(x, target)

    target = next((x for x in tree_iter((args, kwargs)) if isinstance(x, torch.device)), device)
    made = NPU.get(func, func)(*tree_map(given, args), **tree_map(given, kwargs))
    for host, x in origin.values():
        if host.shape != x.shape:  # an empty `out=` was given its size
            _view(x.resize_(host.shape)).copy_(host)
    return tree_map(returned, made)


def _npu(x: Any) -> torch.device | None:
    device = x.device if isinstance(x, Tensor) else x
    return device if isinstance(device, torch.device) and device.type == "npu" else None


def _view(x: Tensor) -> Tensor:
    """A tensor of the host on the same memory."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    host = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(host, x.storage_offset(), x.size(), x.stride())


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type != "npu":
        return x
    moved = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    _view(moved).copy_(x)
    return moved


def _refuse_hosts(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A device takes numbers from the host (tensors without axes), not memory."""
    for x in tree_iter((args, kwargs)):
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim:
            raise RuntimeError(f"{name}: a tensor {list(x.shape)} on the CPU beside those on the NPU")
