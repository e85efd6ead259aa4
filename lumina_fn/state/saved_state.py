"""A training state on the disk: written by Orbax while training continues, restored on any number of ranks.

Every rank that holds a part of a copy writes it as a checkpoint of its own, without jax.distributed; `manifest` joins them. The arrays
of a unit lie end to end in its flat vector, so that any other division of it can be read from them, a unit at a time.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lumina_fn import model, sharding
from lumina_fn.config import LUMINA_7B
from lumina_fn.disk import files, places
from lumina_fn.errors import InputError, printable
from lumina_fn.formats import names
from lumina_fn.formats.tensor_files import Later
from lumina_fn.sharding import Mesh, Sharded
from lumina_fn.state import manifest, orbax_bridge
from lumina_fn.state.manifest import Damaged, Keep, Unusable
from lumina_fn.train import TrainState

Shapes = dict[str, tuple[int, ...]]  # by tree path
TREES = ("params", "mu", "nu")
SCALARS = ("step", "skipped", "streak")
PATIENCE = 7 * 24 * 3600  # seconds that a save may take: a slow disk is not an error
ROOM = 64 << 20  # bytes that must be free beside the checkpoint, for the file system's own data


class Saving:
    """A checkpoint that is being written."""

    def __init__(self, thread: Thread, errors: list[Exception]):
        self._thread, self._errors = thread, errors

    def failed(self) -> bool:
        """Whether an error has been met so far; `wait` raises it."""
        return bool(self._errors)

    def wait(self) -> None:
        """Wait until the checkpoint has its name. Raises InputError if it could not be written, and any error of `barrier`."""
        while self._thread.is_alive() and not self._errors:  # after an error do not wait for other ranks
            self._thread.join(0.05)
        if self._errors:
            raise self._errors[0]


def save(
    folder: str | Path, state: TrainState, meta: dict[str, Any], mesh: Mesh | None = None, *,
    barrier: Callable[[], None] = lambda: None, keep: Keep = manifest.EVERYTHING,
) -> Saving:  # fmt: skip
    """Write a checkpoint, named by its step, while training continues; returns when the state is copied and may be overwritten.

    Every rank of a mesh calls this with its part; `barrier`, called from a thread of its own, waits for all of them. One
    checkpoint at a time. `meta` is any JSON value. Afterwards the checkpoints that `keep` does not name are
    removed. Raises InputError if there is no room; earlier checkpoints then stay.
    """
    folder, step = Path(folder).absolute(), int(state.step)
    ocp, handler = orbax_bridge.load()
    rank, parts = (0, 1) if mesh is None else (mesh.rank, mesh.shards[1])
    tmp = manifest.unfinished(folder, step)
    _check_room(folder, parts * sum(leaf.nbytes for leaf in pytree.tree_leaves((state.params, state.mu, state.nu))))
    with places.writable(folder):
        new = not folder.exists()
        tmp.mkdir(parents=True, exist_ok=True)
        if new:
            files.sync_one(folder.parent)
    content = {
        "parts": parts, "flat": mesh is not None, "dtype": str(pytree.tree_leaves(state.params)[0].dtype).removeprefix("torch."),
        "shapes": {path: list(shape) for path, shape in shapes(state.params).items()},
        "scalars": {name: int(getattr(state, name)) for name in SCALARS}, "meta": meta,
    }  # fmt: skip
    errors: list[Exception] = []
    writer = None
    if rank < parts:  # other ranks hold copies of the same parts
        writer = ocp.AsyncCheckpointer(handler, timeout_secs=PATIENCE)
        with _disk_errors(folder, step):
            writer.save(tmp / manifest.shard(rank), args=ocp.args.PyTreeSave(_tree(state)), force=True)

    def finish() -> None:
        try:
            if writer is not None:
                with _disk_errors(folder, step), orbax_bridge.quiet():
                    writer.wait_until_finished()
                    writer.close()
                    manifest.seal_shard(tmp, rank)
            barrier()
            if rank == 0:
                with _disk_errors(folder, step):
                    manifest.commit(folder, step, content)
                    manifest.prune(folder, keep)
            barrier()
        except Exception as error:  # raised again by Saving.wait
            errors.append(error)

    (thread := Thread(target=finish, daemon=True)).start()
    return Saving(thread, errors)


def restore(
    folder: str | Path, step: int | None = None, mesh: Mesh | None = None, *, device: torch.device | str = "cpu",
    like: model.Params | None = None, check: Callable[[dict[str, Any]], None] = lambda meta: None,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """The state of a step (None: the last) and its meta, divided for this mesh; it may have been saved from any other mesh.

    Only the files that this rank needs are read, after their checksums. Raises Damaged for a damaged file and Unusable for a newer
    format, both with the name of the last good checkpoint; InputError if there is no checkpoint, or one with other shapes than
    `like`. `check` is called with the meta before any array is read, and may raise.
    """
    folder = Path(folder).absolute()
    saved = manifest.steps(folder)
    if step is None and not saved:
        raise InputError(f"{folder} holds no checkpoint")
    step = saved[-1] if step is None else step
    try:
        return _restore(folder, step, mesh, device, like, check)
    except Unusable as error:
        good = manifest.newest_good(folder)
        advice = "no checkpoint there is good" if good is None else f"the last good one is {good}: --resume last-good"
        raise type(error)(f"{error}; {advice}") from error


def _restore(
    folder: Path, step: int, mesh: Mesh | None, device: torch.device | str, like: model.Params | None,
    check: Callable[[dict[str, Any]], None],
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    stored = Stored(folder, step)
    if like is not None and stored.shapes != shapes(like):
        raise InputError(f"{folder / str(step)} is a checkpoint of another model: its parameters have other shapes")
    check(stored.content["meta"])
    device, part, parts = (device, 0, 1) if mesh is None else (mesh.device, mesh.part, mesh.shards[1])

    def cut(tree: str, number: int, unit: Any) -> Any:
        size = sum(leaf.numel() for leaf in pytree.tree_leaves(unit))
        _, layout = sharding.flatten(unit, parts)
        out = torch.zeros(-(-size // parts), dtype=stored.dtype)
        stored.fill(out, tree, number, part * len(out))
        if mesh is not None:
            return Sharded(out.to(device), layout)
        # Separate memory for each leaf, as at the start of a run: the rounding of a product may depend on a matrix's alignment.
        return pytree.tree_map(lambda leaf: leaf.to(device, copy=True), sharding.unflatten(out, layout))

    whole = stored.whole
    numbers = model.Params._make([0, tuple(range(1, 1 + len(whole.blocks))), 1 + len(whole.blocks)])
    params, mu, nu = (model.over_units(lambda n, unit, tree=tree: cut(tree, n, unit), numbers, whole) for tree in TREES)
    step_, skipped, streak = (torch.tensor(stored.content["scalars"][name], device=device) for name in SCALARS)
    return TrainState(step_, params, mu, nu, skipped, streak), stored.content["meta"]


class Stored:
    """A checkpoint to read from; each of its files is checked at first use."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step, self.content = folder.absolute(), step, manifest.read(folder, step)
        self.dtype = getattr(torch, self.content["dtype"])
        found = self.content["shapes"]
        layers = len({path.split(".")[1] for path in found if path.startswith("blocks.")})
        like = model.init(replace(LUMINA_7B, layers=layers), device="meta")
        if found.keys() != names.flatten(like).keys():
            raise Damaged(
                f"{self.folder / str(step) / manifest.MANIFEST} is damaged: its parameters are not those of {layers} layers"
            )
        self.shapes: Shapes = {path: tuple(found[path]) for path in names.flatten(like)}
        shaped = {path: torch.empty(shape, dtype=self.dtype, device="meta") for path, shape in self.shapes.items()}
        self.whole: model.Params = names.unflatten(like, shaped)
        self.units = model.units(self.whole)
        self._ocp, handler = orbax_bridge.load()
        self._reader = self._ocp.Checkpointer(handler)
        self._checked: set[int] = set()
        self._last: tuple[tuple[int, str, int], list[Tensor]] = ((-1, "", -1), [])  # leaves of a unit are read in order

    def fill(self, out: Tensor, tree: str, number: int, first: int) -> None:
        """Fill `out` with a unit's flat vector from element `first` on; what lies beyond the vector's end is not changed."""
        sizes = [leaf.numel() for leaf in pytree.tree_leaves(self.units[number])]
        parts = self.content["parts"]
        n, last = -(-sum(sizes) // parts), min(first + len(out), sum(sizes))
        for part in range(parts):
            begin = part * n
            if begin >= last or begin + n <= first:
                continue
            pieces = self._read(part, tree, number, len(sizes))
            if [len(piece) for piece in pieces] != ([n] if self.content["flat"] else sizes):
                raise Damaged(
                    f"{self.folder / str(self.step) / manifest.shard(part)} holds arrays of other sizes than it says"
                )
            for piece in pieces:
                a, b = max(first, begin), min(last, begin + len(piece))
                if a < b:
                    out[a - first : b - first] = piece[a - begin : b - begin]
                begin += len(piece)

    def parameters(self, dtype: torch.dtype) -> dict[str, Later]:
        """Every parameter by tree path, read when it is made."""
        found, paths = {}, iter(self.shapes.items())
        for number, unit in enumerate(self.units):
            first = 0
            for leaf in pytree.tree_leaves(unit):
                path, shape = next(paths)
                found[path] = Later(shape, dtype, lambda at=(number, first), like=leaf: self._leaf(like, *at).to(dtype))
                first += leaf.numel()
        return found

    def _leaf(self, like: Tensor, number: int, first: int) -> Tensor:
        out = torch.empty(like.numel(), dtype=self.dtype)
        self.fill(out, "params", number, first)
        return out.view(like.shape)

    def _read(self, part: int, tree: str, number: int, leaves: int) -> list[Tensor]:
        if self._last[0] != (part, tree, number):
            if part not in self._checked:
                manifest.check_shard(self.folder, self.step, manifest.shard(part), self.content)
                self._checked.add(part)
            self._last = ((-1, "", -1), [])  # freed before the next one is read
            pieces = [_piece(i) for i in range(1 if self.content["flat"] else leaves)]
            under = lambda value: {tree: {_unit(number): dict.fromkeys(pieces, value)}}
            arguments = self._ocp.args.PyTreeRestore(
                item=under(0), restore_args=under(self._ocp.RestoreArgs(restore_type=np.ndarray)), partial_restore=True
            )
            path = self.folder / str(self.step) / manifest.shard(part)
            try:
                read = self._reader.restore(path, args=arguments)[tree][_unit(number)]
            except (OSError, ValueError, KeyError, TypeError) as error:  # such as pruned by a run in progress
                raise Damaged(f"{path} went away or changed while it was read") from error
            self._last = ((part, tree, number), [torch.from_numpy(read[name]).view(self.dtype) for name in pieces])
        return self._last[1]


def shapes(params: model.Params) -> Shapes:
    """The shapes of a tree by path; of a sharded tree, those of the whole tree."""
    if not isinstance(params.head, Sharded):
        return {path: tuple(leaf.shape) for path, leaf in names.flatten(params).items()}
    return dict(zip(_paths(len(params.blocks)), sharding.whole_shapes(model.units(params)), strict=True))


@lru_cache(maxsize=8)  # takes 0.1 s, for which a step would be blocked
def _paths(layers: int) -> tuple[str, ...]:
    return tuple(names.flatten(model.init(replace(LUMINA_7B, layers=layers), device="meta")))


def _tree(state: TrainState) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """The arrays for Orbax by tree, unit and piece; views of those that are on the CPU."""
    tree = {}
    for name in TREES:
        tree[name] = {
            _unit(i): {_piece(j): _array(leaf) for j, leaf in enumerate(pytree.tree_leaves(unit))}
            for i, unit in enumerate(model.units(getattr(state, name)))
        }
    return tree


def _array(x: Tensor) -> np.ndarray:
    flat = x.detach().to("cpu").contiguous().reshape(-1)
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()  # numpy has no bfloat16


def _unit(i: int) -> str:
    return f"{i:04d}"


def _piece(i: int) -> str:
    return f"{i:02d}"


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < size + ROOM:
        raise InputError(
            f"{folder}: a checkpoint takes {(size + ROOM) / 1e6:.0f} MB, {free / 1e6:.0f} MB are free: make room, or --keep fewer"
        )


@contextmanager
def _disk_errors(folder: Path, step: int) -> Iterator[None]:
    """Within the block an error of writing a checkpoint becomes an InputError, and the unfinished checkpoint is removed."""
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore raises the latter
        manifest.discard(folder, step)
        full = "No space left on device" in str(error)
        reason = "no space left" if full else getattr(error, "strerror", None) or printable(str(error).splitlines()[0])
        newest = (manifest.steps(folder) or ["none"])[-1]
        raise InputError(
            f"cannot write checkpoint {step} in {folder}: {reason}; the last one there is {newest}"
        ) from error
