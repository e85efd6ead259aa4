"""Time, memory and error of calls of kernels, which kernels.bench reports."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from kernels.cases import Call, Case, errors, expected

SHORTEST = 5e-3  # seconds of a measurement: what is faster is called several times


class Peak(NamedTuple):
    """The highest rates that a device reaches."""

    flops: float  # of products, a second
    bandwidth: float  # bytes read and written, a second


class Side(NamedTuple):
    """A call of an implementation, ready to be timed."""

    impl: str
    call: Call
    run: Callable[[], object]
    calls: int  # in a measurement
    error: float
    eager: float
    peak_bytes: int
    bytes: int


def measured_peak(dtype: torch.dtype, device: torch.device) -> Peak:
    """The highest rates among products of square matrices, in the layouts of a linear layer and of its weight's gradient, and among copies."""
    side, length = (1024, 1 << 25) if device.type == "cpu" else (8192, 1 << 28)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    source, target = (torch.ones(length, dtype=torch.float32, device=device) for _ in range(2))
    best = lambda *runs: min(seconds(run, device) for run in runs for _ in range(4))
    flops = 2 * side**3 / best(lambda: a @ b.t(), lambda: a.t() @ b)
    return Peak(flops, 2 * source.nbytes / best(lambda: target.copy_(source)))


def seconds(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call: the mean over `calls` calls."""
    _wait(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - begin) / calls


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch's allocator holds at once during a call; buffers of other libraries are not counted."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        run()
        module.synchronize()
        return module.max_memory_allocated() - before
    with hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None, "the profiler has run"
    assert record.profiler.kineto_results is not None, "the profiler has stopped"
    steps = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps.sort(key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in steps)  # pyright: ignore[reportAttributeAccessIssue]  # torch's stub lacks it
    return max(accumulate(sizes, initial=0))


@contextmanager
def hushed() -> Iterator[None]:
    """Within the block stderr is discarded: the profiler's library writes a line whenever it starts and stops."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def sides(
    case: Case, impls: Mapping[str, Any], dtype: torch.dtype, device: torch.device, say: Callable[[str], None]
) -> list[Side]:
    """Every call by every implementation that has it, after one run that was compared with the reference and measured in memory."""
    wanted, inputs, found = expected(case, dtype), case.inputs(dtype, device), []
    for name, kernels in impls.items():
        if absent := [call.kernel for call in case.calls if not hasattr(kernels, call.kernel)]:
            say(f"{name} is left out: it has no {' and no '.join(absent)}")
            continue
        try:
            results = case.run(kernels, case.inputs(dtype, device))
        except NotImplementedError as error:  # PyTorch has no kernel for this device or dtype
            say(f"{name} is left out: {str(error).splitlines()[0]}")
            continue
        try:
            off = [errors(*pair) for pair in zip(results, wanted, strict=True)]
        except ValueError as error:  # it computes something else, or lays it out otherwise
            say(f"{name} is left out: {error}")
            continue
        del results
        values = dict(inputs)
        for i, call in enumerate(case.calls):
            run = partial(call, kernels, values)
            made = run()
            moved = call.bytes({**values, **made})
            if i + 1 < len(case.calls):
                values = {**values, **made}
            del made
            calls = math.ceil(SHORTEST / seconds(run, device))
            error, eager = (max(getattr(one, kind) for one in off[i]) for kind in ("found", "eager"))
            found.append(Side(name, call, run, calls, error, eager, peak_memory(run, device), moved))
    return sorted(found, key=lambda side: case.calls.index(side.call))


def in_turn(some: Sequence[Side], device: torch.device, repeat: int) -> list[list[float]]:
    """Seconds of each call in each of `repeat` rounds; the order changes from round to round."""
    times: list[list[float]] = [[] for _ in some]
    for turn in range(repeat):
        for k in range(len(some)):
            i = (turn + k) % len(some)
            times[i].append(seconds(some[i].run, device, some[i].calls))
    return times
