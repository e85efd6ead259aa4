"""A run's predicted memory and the free memory: compared before the run begins, and named in the error when memory runs out."""

import re
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_fn.process import out_of_memory
from lumina_fn.process.out_of_memory import OutOfMemory, size

if TYPE_CHECKING:  # sample and pretokenize only use `lowered_by`, and do not wait for a plan's imports
    import torch

    from experiments.launching.distributed import World
    from lumina_fn.config import ModelConfig
    from lumina_fn.costs.cost import Setup

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# The files of a cgroup's limit and use, and the file cache's name in memory.stat: of version 2, and of version 1.
VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Compiled blocks take about as much memory as eager ones, or less: in 16 randomly drawn steps at most 1.006 times as much.
COMPILED = 1.02
USABLE = 0.9  # of what is free, for what a run needs besides
SHARED = "share the model out to more processes (torchrun, --strategy fsdp)"


@contextmanager
def lowered_by(flags: str) -> Iterator[None]:
    """A failed allocation inside becomes an OutOfMemory whose line ends with `flags`: what to do. Decorates a command's main."""
    try:
        yield
    except Exception as error:
        raise_refused(error, "out of memory", lambda: flags)
        raise


def raise_refused(error: Exception, what: str, rest: Callable[[], str]) -> None:
    """Raise an OutOfMemory in place of the error of a failed allocation; return for other errors. Frees what the failed calls held."""
    if isinstance(error, OutOfMemory) or (words := out_of_memory.told(error)) is None:
        return
    traceback.clear_frames(error.__traceback__)
    raise OutOfMemory(f"{what}{words and f' ({words})'}: {rest()}") from error


def free(device: "torch.device", processes: int = 1) -> int | None:
    """Bytes of the device that each of `processes` equal processes on this machine can still allocate; None if that is not known."""
    import torch

    if device.type != "cpu":
        return torch.get_device_module(device).mem_get_info(device)[0]
    known = [n // processes for n in (_available(PROC), *_in_cgroups(PROC, CGROUPS)) if n is not None]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # of this process
    if limit != resource.RLIM_INFINITY:
        known.append(max(0, limit - _kilobytes(PROC / "self/status", "VmSize")))
    return min(known, default=None)


@dataclass
class Place:
    """What a run does now, for the message if it fails."""

    now: str


@dataclass(frozen=True)
class Room:
    """The memory that a run's largest step needs, and the free memory of its device, in bytes; known before anything is loaded."""

    cfg: "ModelConfig"
    setup: "Setup"
    free: int | None

    @cached_property
    def needed(self) -> int:
        """Bytes at the peak of a step. Compiled blocks are traced, which takes a second, only if the step may not fit."""
        from lumina_fn.costs import footprint

        eager = footprint.peak(self.cfg, replace(self.setup, compiled=False))
        if not self.setup.compiled or self.free is None or COMPILED * eager <= self.free:
            return eager
        return footprint.peak(self.cfg, self.setup)

    def note(self) -> str | None:
        """A line if a step may not fit, else None. If an upper bound does not decide it, the step is simulated, for 0.2 to 0.4 s."""
        from lumina_fn.costs import cost

        if self.free is None or cost.most_memory(self.cfg, self.setup) <= self.free or self.needed <= self.free:
            return None
        return f"note: a step is predicted to need {size(self.needed)} (plan), {size(self.free)} are free: {ways(self.cfg, self.setup)}"

    @contextmanager
    def during(self, what: str, lower: str | None = None) -> Iterator["Place"]:
        """A failed allocation inside becomes an OutOfMemory with the numbers and with what the run did: `what`, or a later value of
        Place.now. `lower` says what to do.
        """
        place = Place(what)
        try:
            yield place
        except Exception as error:
            rest = lambda: f"{self._numbers()}: {lower or ways(self.cfg, self.setup)}"
            raise_refused(error, f"out of memory {place.now}", rest)
            raise

    def _numbers(self) -> str:
        has = "" if self.free is None else f", {size(self.free)} were free"
        return f"a step of --micro-batch {self.setup.micro_batch} needs about {size(self.needed)} (plan){has}"


def room(
    run: Any, world: "World", cfg: "ModelConfig", longest: int, device: "torch.device", compute: "torch.dtype"
) -> Room:
    """The Room of a fine-tune; `longest` is the number of tokens of its longest item."""
    from experiments.planning import plan
    from lumina_fn.features import batches

    tokens = min(max(run.pack, longest) if run.pack else batches.bucket(longest), cfg.max_positions)
    share = -(-run.batch // world.size)
    micro = min(run.micro_batch, share)
    setup = replace(
        plan.setup_of(run, cfg, tokens, compute, device.type == "cpu"),
        devices=world.size, shard_size=run.shard_size or world.local_size, micro_batch=micro,
        micro_batches=-(-share // micro),
    )  # fmt: skip
    there = free(device, world.local_size)
    if run.remat == "auto":  # rank 0 decides: what is free differs a little
        count = world.total(recomputed(cfg, setup, there) if world.rank == 0 else 0)
        setup = replace(setup, remat=count)
        if count:
            world.say(
                f"note: {count} of {cfg.layers} blocks are computed again in the backward, to fit into memory (--remat auto)"
            )
    return Room(cfg, setup, there)


def recomputed(cfg: "ModelConfig", setup: "Setup", free: int | None) -> int:
    """The fewest blocks that must be computed again in the backward for a step to fit into the free memory, by the plan.

    Where it is not known what is free: all from a billion parameters, above which activations are what exceeds memory.
    """
    from lumina_fn.costs import cost, footprint

    if free is None:
        return cfg.layers if cost.parameters(cfg) >= cost.REMAT_FROM else 0
    if cost.most_memory(cfg, setup) <= free:
        return 0
    return footprint.fewest_recomputed(cfg, setup, int(USABLE * free))


def ways(cfg: "ModelConfig", setup: "Setup") -> str:
    """The flags that lower a step's memory and change no result."""
    found = ["lower --micro-batch"] * (setup.micro_batch > 1) + ["give --remat all"] * (
        setup.recomputed(cfg) < cfg.layers
    )
    if setup.devices > 1 and setup.strategy != "fsdp":
        found.append("give --strategy fsdp")
    return ", or ".join(found or [SHARED])


def _available(proc: Path) -> int | None:
    where = proc / "meminfo"
    return _kilobytes(where, "MemAvailable") if where.exists() else None


def _in_cgroups(proc: Path, mount: Path) -> Iterator[int]:
    """Bytes that are left of the limit of each cgroup of this process, and of the cgroups around it.

    In a container the file may name cgroups that are not visible from inside; then the visible ones count. The file cache is not
    counted as used: the system frees it when memory is needed.
    """
    where = proc / "self/cgroup"
    named = where.read_text().splitlines() if where.exists() else []
    for kind, limit, use, cache in VERSIONS:
        own = [path for _, kinds, path in (one.split(":", 2) for one in named) if kind in kinds.split(",")]
        for path in own:
            inner = mount / kind / path.lstrip("/")
            for group in (inner, *inner.parents):
                if not group.is_relative_to(mount / kind):
                    break
                if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                    taken = int((group / use).read_text())
                    found = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                    yield max(0, int(most) - taken + (int(found[1]) if found else 0))


def _kilobytes(where: Path, name: str) -> int:
    """The value of a field of a file in /proc, which is in kB, as bytes."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB$", where.read_text(), re.MULTILINE)[1])
