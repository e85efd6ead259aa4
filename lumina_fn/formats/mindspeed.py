"""Folders that MindSpeed-MM writes: the release folder of its converter, and the iterations that its training saves."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lumina_fn.disk import reading, untrusted_folder
from lumina_fn.errors import InputError, listed, printable
from lumina_fn.formats import dcp, tensor_files, torch_zip
from lumina_fn.formats.tensor_files import Later, Stored

ITERATION = "latest_checkpointed_iteration.txt"
RELEASE = "release/mp_rank_00/model_optim_rng.pt"

_RANK, _WEIGHTS = "mp_rank_00", "model_optim_rng.pt"
# Prefixes and suffixes around a weight's own name, according to MindSpeed-MM at d675f5ca^ and in Megatron-LM core_v0.12.1:
# - torch (mp_rank_00): nothing, lumina_model.py's state_dict_for_save_checkpoint starts below `Lumina.model`;
# - torch_dcp: `model.`, the entry of checkpointing.py's generate_state_dict that the weights are in;
# - torch_dist (pretrain.sh): `model.`, since MegatronModule.sharded_state_dict starts at `Lumina`; with use_fsdp1 also `module.`,
#   since unwrap_model does not know the wrapper of fsdp1_patches.py;
# - inside, what PyTorch's wrappers add where their own state_dict hooks do not run.
_OUTER = re.compile(r"\A(?:module\.|model\.)+(?=model\.|lm_head\.)")
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# Entries beside the weights (Megatron-LM's generate_state_dict; `optim` as torch's own examples call it).
_BESIDE = re.compile(
    r"(?:chained_\d+\.)?(?:optimizer|optim|opt_param_scheduler|rng_state|rerun_state_machine\w*|args|iteration)(?:[./].*)?",
    re.DOTALL,
)

KINDS = 10  # of entries beside the weights that are listed: a checkpoint has no more


class Found(NamedTuple):
    """The weights of a checkpoint folder; `what` names the kind of folder, `remarks` are for the user."""

    what: str
    tensors: dict[str, Stored | Later]  # by the weight's own name, which is Hugging Face's
    remarks: list[str]


def is_there(path: Path) -> bool:
    """Whether the folder looks like a folder of checkpoints, or like a checkpoint."""
    return any((path / name).exists() for name in (ITERATION, dcp.METADATA, _RANK))


def read(path: Path, base: Stored | Later | None) -> Found:
    """The weights of a folder's newest checkpoint, or of the checkpoint that the folder is.

    `base` is the last norm of the model that training began with, needed if a part of it was not saved. Raises InputError.
    """
    if (path / ITERATION).exists():
        folder, what = _newest(path)
        if not folder.is_dir() or not folder.resolve().is_relative_to(untrusted_folder.root(path)):
            there = listed(sorted(p.name for p in path.glob("iter_*"))) or "none"
            raise InputError(
                printable(
                    f"{path / ITERATION} names {folder.name}, which is missing or a link out of it (there are: {there}); give one's folder"
                )
            )
    else:
        folder, what = path, "a MindSpeed checkpoint"
    if (folder / dcp.METADATA).exists():
        found, others = _distributed(folder, path)
    else:
        found, others = _one_file(folder, path)
    tensors, remarks = _whole_norm(folder, _plain(folder, found), base)
    return Found(what, tensors, remarks + _ignored(others))


def _newest(path: Path) -> tuple[Path, str]:
    with reading.opened(path / ITERATION, "`release` or an iteration's number") as file:
        text = file.read(64).strip()
    if text == b"release":
        return path / "release", "a MindSpeed release folder"
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise InputError(
            f"{path / ITERATION} says {printable(text.decode(errors='replace'))!r}; expected `release` or an iteration's number"
        )
    return path / f"iter_{int(text):07d}", f"iteration {int(text)} of a MindSpeed run"


def _one_file(folder: Path, top: Path) -> tuple[dict[str, Stored], list[str]]:
    if others := sorted(p.name for p in folder.glob("mp_rank_*") if p.name != _RANK):
        raise InputError(
            printable(
                f"{folder} is split over several tensor- or pipeline-parallel ranks ({others[0]}): merge them into {_RANK} first"
            )
        )
    if not (folder / _RANK).is_dir() or not (folder / _RANK).resolve().is_relative_to(untrusted_folder.root(top)):
        raise InputError(f"{folder / _RANK} is missing: the MindSpeed folder is not whole")
    return torch_zip.state_dict(untrusted_folder.file(folder / _RANK, _WEIGHTS, top), "model")


def _distributed(folder: Path, top: Path) -> tuple[dict[str, Stored | Later], list[str]]:
    if (folder / "metadata.json").exists():
        backend = untrusted_folder.read_json(untrusted_folder.file(folder, "metadata.json", top)).get("sharded_backend")
        if backend != "torch_dist":
            raise InputError(
                printable(f"{folder / 'metadata.json'} says sharded_backend {backend!r}; only torch_dist is read")
            )
    return dcp.tensors(folder, lambda key: not _BESIDE.fullmatch(key), top)


def plain_key(key: str) -> str:
    """The weight's own name, without the prefixes and suffixes of MindSpeed, Megatron and PyTorch."""
    return _OUTER.sub("", _WRAPPERS.sub("", key))


def _plain(folder: Path, found: Mapping[str, Stored | Later]) -> dict[str, Stored | Later]:
    plain = {plain_key(key): tensor for key, tensor in found.items()}
    if len(plain) != len(found):
        twice = [key for key, n in Counter(map(plain_key, found)).items() if n > 1]
        raise InputError(printable(f"{folder} holds tensors under two names: {listed(twice)}"))
    return plain


def _whole_norm(
    folder: Path, tensors: dict[str, Stored | Later], base: Stored | Later | None
) -> tuple[dict[str, Stored | Later], list[str]]:
    """The tensors with a complete last norm, missing values taken from `base`, and remarks. Raises InputError if `base` is needed and None.

    With use_fsdp1, sharded_state_dict bypasses FSDP's hooks, and this one weight of the outermost FSDP unit is saved as the flat part
    of a single rank (observed with Megatron-LM core_v0.12.1 on two ranks): the other parts are not in the folder. The file's name,
    __RANK_N.distcp, tells the rank.
    """
    norm, embed = tensors.get("model.norm.weight"), tensors.get("model.embed_tokens.weight")
    width = embed.shape[1] if embed is not None and len(embed.shape) == 2 else 0
    if norm is None or len(norm.shape) != 1 or norm.shape[0] >= width:
        if base is not None:
            raise InputError(f"{folder} needs no values of another model's norm: leave --norm-from out")
        return tensors, []
    part = norm.shape[0]
    lost = f"{folder} holds only {part} of the {width} values of model.norm.weight, since use_fsdp1 with torch_dist saves one rank's part"
    if base is None:
        raise InputError(
            f"{lost}: give the model that training began with as --norm-from to take the others from it (nothing else has them), "
            "or train on from it with --ckpt-format torch"
        )
    rank = (
        re.fullmatch(r"__([0-9]{1,6})_[0-9]+\.distcp", norm.file.name, re.ASCII) if isinstance(norm, Stored) else None
    )
    if rank is None or not part or width % part:
        raise InputError(f"{lost}, and its place in the whole is unknown: this folder cannot be completed")
    if base.shape != (width,):
        raise InputError(
            f"{lost}; the norm of --norm-from has the shape {list(base.shape)}: give the model that training began with"
        )
    begin = int(rank[1]) % (width // part) * part

    def make() -> Tensor:
        whole = tensor_files.read(base, "cpu", norm.dtype)
        whole[begin : begin + part] = tensor_files.read(norm, "cpu", norm.dtype)
        return whole

    remark = f"model.norm.weight: values {begin} .. {begin + part - 1} are the checkpoint's, the other {width - part} are --norm-from's"
    return tensors | {"model.norm.weight": Later((width,), norm.dtype, make)}, [remark]


def _ignored(keys: Iterable[str]) -> list[str]:
    groups = Counter(re.split("[./]", key, maxsplit=1)[0] for key in keys)
    counted = [f"{name} ({n})" if n > 1 else name for name, n in groups.items()]
    return [f"ignored {groups.total()} entries beside the weights: {listed(counted, KINDS)}"] if groups else []
