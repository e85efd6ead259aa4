"""The tensors in a model's folder as transformers names its files: safetensors, or pytorch_model.bin from before them; one file, or several."""

from collections.abc import Callable
from pathlib import Path

from lumina_fn.disk import untrusted_folder
from lumina_fn.disk.untrusted_folder import read_json
from lumina_fn.errors import InputError, listed, printable
from lumina_fn.formats import torch_zip
from lumina_fn.formats.tensor_files import INDEX, Stored, safetensors_header

WHOLE, PARTS, PARTS_INDEX = "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"


def there(folder: Path) -> bool:
    """Whether the folder has a file of weights, or an index of them."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", INDEX, WHOLE, PARTS, PARTS_INDEX))


def read(folder: Path) -> dict[str, Stored]:
    """The tensors by their names in a folder's safetensors files or, if a model has none there, in its pytorch_model.bin files.

    No pickle is executed. Raises InputError for a file that is damaged, absent or outside of the folder, and for a tensor in two files.
    """
    safetensors = (folder / INDEX).exists() or any(folder.glob("model*.safetensors"))
    if safetensors or not any(any(folder.glob(pattern)) for pattern in (WHOLE, PARTS, PARTS_INDEX)):
        return _gathered(folder, INDEX, "*.safetensors", safetensors_header)
    return _gathered(folder, PARTS_INDEX, WHOLE if (folder / WHOLE).exists() else PARTS, _bin)


def _bin(path: Path) -> dict[str, Stored]:
    return torch_zip.state_dict(path, "state_dict", "model", "module")[0]


def _gathered(
    folder: Path, index: str, pattern: str, read_one: Callable[[Path], dict[str, Stored]]
) -> dict[str, Stored]:
    """The tensors of the files that an index names or, without one, of every file of this pattern."""
    if not (folder / index).exists():
        shards = [path.name for path in sorted(folder.glob(pattern))]
        where = None
    else:
        where = read_json(untrusted_folder.file(folder, index)).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise InputError(f"{folder / index} has no weight_map of tensor and file names")
        shards = sorted(set(where.values()))
        if absent := [name for name in shards if not (folder / name).exists()]:
            raise InputError(
                printable(
                    f"{folder} lacks the files of its index: {listed(absent)}; get them{untrusted_folder.completed_by(folder)}"
                )
            )
    found: dict[str, Stored] = {}
    for shard in shards:
        header = read_one(untrusted_folder.file(folder, shard))
        if where is not None:
            header = {key: tensor for key, tensor in header.items() if where.get(key, shard) == shard}
        if twice := sorted(found.keys() & header.keys()):
            raise InputError(printable(f"{folder} holds tensors in two files: {listed(twice)}"))
        found |= header
    return found
