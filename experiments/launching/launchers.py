"""The variables in which launchers tell a process its rank: one table for torchrun, PyTorchJob, Slurm's steps, Open MPI and MPICH."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from lumina_fn.errors import InputError

MOST_RANKS = 65_536


class Names(NamedTuple):
    """A launcher's variables for this process's rank and the number of ranks: of the run, and of this host."""

    rank: str
    size: str
    local_rank: str
    local_size: str  # empty: it has none


class Told(NamedTuple):
    """What the variables say; a number is None if they do not say it."""

    names: Names
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    run: str = ""  # the launcher's own name of the run: the same for all its ranks, another one for each run
    first_host: str = ""  # the host of rank 0


TORCHRUN = Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # Kubernetes' PyTorchJob sets the first two
OPEN_MPI = Names(
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
)  # fmt: skip
MPICH = Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # Intel MPI sets the same
SLURM = Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")  # SLURM_NTASKS may be the whole job's
TABLE = (TORCHRUN, OPEN_MPI, MPICH, SLURM)
NAMES = tuple(name for names in TABLE for name in names if name)
NO_STEP = 0xFFFF_FFF0  # from here on numbers are no steps of srun's: ...FA is salloc's shell, ...FB a batch script
PODS = "PET_NPROC_PER_NODE"  # with a PyTorchJob's nprocPerNode RANK counts pods, and WORLD_SIZE processes


def read(environ: Mapping[str, str]) -> Told | None:
    """What the launcher says; None for a process on its own. Raises InputError for variables that are incomplete or contradict each other.

    Where one launcher starts another (a Slurm step torchrun, for example), the inner one counts: it sets LOCAL_RANK.
    """
    own, outer = [name for name in TORCHRUN if name in environ], _of_another(environ)
    if outer is None or set(own) & set(TORCHRUN[2:]):
        alone = own in ([], [TORCHRUN.size]) and environ.get(TORCHRUN.size, "1") == "1"
        return None if alone else _of_torchrun(environ)
    for name, number in zip(TORCHRUN[:2], outer[1:3], strict=True):  # a job's script may set them too
        if environ.get(name, str(number)) != str(number):
            there = outer.names[TORCHRUN.index(name)]
            raise InputError(
                f"{name}={environ[name]} in the environment, but {there}={number}: expected the same; unset one of them"
            )
    return outer


def _of_torchrun(environ: Mapping[str, str]) -> Told | None:
    """What torchrun's variables say, or a PyTorchJob's. Raises InputError."""
    told = _numbers(environ, TORCHRUN)
    if told.local_rank is not None:
        return told
    if told.size == 1:  # some containers set RANK=0 and WORLD_SIZE=1
        return None
    pods = environ.get(PODS, "1")
    if pods.isdecimal() and pods != "1":
        raise InputError(
            f"{PODS}={pods} in the environment without LOCAL_RANK: this PyTorchJob expects torchrun in each of its pods; start the "
            "command with torchrun, or leave out nprocPerNode for one process a pod"
        )
    return told


def _of_another(environ: Mapping[str, str]) -> Told | None:
    """What a launcher says in variables that are not torchrun's; None if there is none, and if it started one process. Raises InputError."""
    if any(name in environ for name in OPEN_MPI):
        told = _numbers(environ, OPEN_MPI)._replace(run=environ.get("PMIX_NAMESPACE", ""))
    elif MPICH.local_rank in environ:  # its other names are srun's as well
        told = _numbers(environ, MPICH)
    elif _is_step(environ):
        told = _of_slurm(environ)
    else:
        return None
    return told if told.size > 1 else None


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of a step's tasks. Raises InputError if a variable is missing.

    A batch script has SLURM_PROCID too, but no step. The shell of salloc is a step with a number of its own. A shell on a terminal,
    which srun --pty starts, is the task itself: what is typed there is not.
    """
    rank, step = environ.get(SLURM.rank), environ.get("SLURM_STEP_ID", "")
    if rank is None:
        return False
    if not step.isdecimal() or int(step) >= NO_STEP:
        if rank != "0":
            raise InputError(f"{SLURM.rank}={rank} without SLURM_STEP_ID in the environment: {instead(SLURM)}")
        return False
    return "SLURM_PTY_PORT" not in environ or environ.get("SLURM_TASK_PID") == str(os.getpid())


def _of_slurm(environ: Mapping[str, str]) -> Told:
    size = SLURM.size if SLURM.size in environ else "SLURM_NTASKS"
    told, tasks = _numbers(environ, SLURM._replace(size=size)), _tasks_of_this_host(environ)
    if tasks is not None and told.local_rank is not None:
        number(environ, SLURM.local_rank, 0, min(tasks, told.size) - 1, told.names)
    nodes = environ.get("SLURM_STEP_NODELIST", "")  # such as rack[1-2]node[07,09],other
    return told._replace(
        local_size=tasks,
        run=f"{environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}" if nodes else "",
        first_host=re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).partition(",")[0],
    )


def _tasks_of_this_host(environ: Mapping[str, str]) -> int | None:
    """The number of a Slurm step's tasks on this host; None if it is not told."""
    host, counts = environ.get("SLURM_NODEID", ""), environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x3),2
    if not host.isdecimal() or not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", counts):
        return None
    before = 0
    for tasks, hosts in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        before += int(hosts or 1)
        if int(host) < before:
            return int(tasks)
    return None


def _numbers(environ: Mapping[str, str], names: Names) -> Told:
    """The numbers in a launcher's variables. Raises InputError."""
    given = [name for name in names if name in environ]
    of_host = [name for name in names[2:] if name in environ]
    needed = [*names[:2], *(names[2:] if names.local_size and of_host else ())]
    if missing := [name for name in needed if name not in environ]:
        other = given[0] if missing[0] in names[:2] else of_host[0]
        raise InputError(f"{other}={environ[other]} without {missing[0]} in the environment: {instead(names)}")
    size = number(environ, names.size, 1, MOST_RANKS, names)
    rank = number(environ, names.rank, 0, size - 1, names)
    local_size = number(environ, names.local_size, 1, size, names) if names.local_size in environ else None
    local_rank = None
    if names.local_rank in environ:
        local_rank = number(environ, names.local_rank, 0, min((local_size or size) - 1, rank), names)
    return Told(names, rank, size, local_rank, local_size)


def number(environ: Mapping[str, str], name: str, least: int, most: int, names: Names) -> int:
    """The number in a variable. Raises InputError if it is not within the bounds."""
    text = environ.get(name, "")
    if text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most:
        return int(text)
    others = ", ".join(f"{other}={environ[other]}" for other in names if other != name and other in environ)
    expected = f"a number from {least} to {most}" if least < most else str(least)
    raise InputError(f"{name}={text} in the environment: expected {expected} (with {others}); {instead(names)}")


def instead(names: Names) -> str:
    """What to do about a launcher's variables that are wrong."""
    return f"start the command with torchrun, or unset {', '.join(filter(None, names))} for a process on its own"
