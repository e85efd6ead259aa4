"""Captions and codes to training items, items to batches, and the folder of shards that keeps the items in between."""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from jaxtyping import Int, Integer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lumina_fn import prompt
from lumina_fn.errors import InputError
from lumina_fn.loss import Batch
from lumina_fn.prompt import Tokenizer
from lumina_fn.vocab import CODES_PER_PATCH, IGNORE, PAD, PIXELS_PER_CODE, Ids, image_length, image_tokens

FORMAT = "lumina_fn/features/1"
INDEX = "features.json"
SHARD_ITEMS = 4096  # 75 MB at 768 px
_ORDER, _DROP = 1, 2  # what a generator is for; its key starts with it

Item = tuple[list[int], list[int]]  # ids and labels, equally long


def training_item(tokenizer: Tokenizer, caption: str, codes, *, with_size: bool) -> Item:
    """Prompt, picture and separator; the prompt is not predicted. `codes[h w]` is a tensor, an array or a list of rows.

    Raises InputError for a picture whose size has no token and for codes that the model has no ids for.
    """
    codes = np.asarray(codes)
    return _item(text_ids(tokenizer, caption, codes, with_size), codes, tokenizer.ids)


def text_ids(tokenizer: Tokenizer, caption: str, codes: Integer[np.ndarray, "h w"], with_size: bool) -> list[int]:
    """The item's ids before the picture. Raises InputError as `training_item` does."""
    height, width = (PIXELS_PER_CODE * n for n in codes.shape)
    prompt.check_size(tokenizer, width, height)
    if codes.min() < 0 or codes.max() >= tokenizer.ids.codes:
        raise InputError(
            f"image codes {codes.min()} to {codes.max()}: the model has ids for 0 to {tokenizer.ids.codes - 1}; is this its VQ?"
        )
    return prompt.prompt_ids(tokenizer, caption, width, height, with_size)


def _item(text: list[int], codes: Integer[np.ndarray, "h w"], ids: Ids) -> Item:
    image = [*image_tokens(codes.tolist(), ids), ids.sep]
    return text + image, [IGNORE] * len(text) + image


def drop_caption(ids: Sequence[int], labels: Sequence[int], end_id: int) -> Item:
    """The item without its prompt and last separator, where it is one picture that ends the item; any other item unchanged."""
    if len(ids) > 1 and ids[-2] == labels[-2] == end_id and list(ids).count(end_id) == 1:
        picture = [t for t in labels[:-1] if t != IGNORE]
        return picture, picture
    return list(ids), list(labels)


def order(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order in which an epoch visits n items: a function of (seed, epoch)."""
    keys = np.random.default_rng((_ORDER, seed, epoch)).random(
        n
    )  # unlike `permutation`, promised to stay the same stream
    return np.argsort(keys, kind="stable")


def drops_caption(probability: float, seed: int, epoch: int, index: int) -> bool:
    """Whether item `index` loses its caption in this epoch, whatever the batch or process it is met in."""
    return np.random.default_rng((_DROP, seed, epoch, index)).random() < probability


def batch(items: Sequence[Item], *, max_positions: int, multiple: int = 64) -> Batch:
    """Items cut to max_positions and padded on the right, to a multiple so that few shapes occur."""
    length = max(len(ids) for ids, _ in items)
    length = min(math.ceil(length / multiple) * multiple, max_positions)
    tokens = torch.full((len(items), length), PAD)
    labels = torch.full((len(items), length), IGNORE)
    for row, (item_ids, item_labels) in enumerate(items):
        n = min(len(item_ids), length)
        tokens[row, :n] = torch.tensor(item_ids[:n])
        labels[row, :n] = torch.tensor(item_labels[:n])
    return Batch(tokens, labels)


class Feature(NamedTuple):
    row: int  # in the input
    text: list[int]  # ids before the picture
    codes: Integer[np.ndarray, "h w"]


@dataclass(frozen=True)
class Origin:
    """What a feature set was made with."""

    size: int  # pixels of the target's side
    seed: int  # of the prompt variants
    ids: Ids
    tokenizer: str  # fingerprint
    vq: str  # fingerprint


def fingerprint(tree: Any) -> str:
    """A hash of every tensor in a tree: shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_features(folder: Path, features: Iterable[Feature], origin: Origin) -> int:
    """Shards and their index for `FeatureSet`; returns how many features came. A shard's worth is held in memory."""
    features, shards, largest = iter(features), [], 0
    while part := list(islice(features, SHARD_ITEMS)):
        name = f"features-{len(shards):05d}.safetensors"
        write_shard(folder / name, part)
        shards.append({"file": name, "count": len(part)})
        sizes = (origin.ids.size0 + max(f.codes.shape) // CODES_PER_PATCH for f in part)
        largest = max(
            largest, *sizes, *(max(f.text) for f in part), *(origin.ids.code0 + int(f.codes.max()) for f in part)
        )
    if shards:
        largest = max(largest, origin.ids.start, origin.ids.end, origin.ids.newline, origin.ids.sep)
    count = sum(s["count"] for s in shards)
    index = {"format": FORMAT, "count": count, "largest_id": largest, "origin": asdict(origin), "shards": shards}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return count


def write_shard(path: Path, features: Sequence[Feature]) -> None:
    """One file: per item its row, the lengths (text, h, w); and everybody's text ids and codes end to end."""
    data = save(
        {
            "rows": np.array([f.row for f in features], np.int64),
            "lengths": np.array([(len(f.text), *f.codes.shape) for f in features], np.int32),
            "text": np.concatenate([np.array(f.text, np.int32) for f in features]),
            "codes": np.concatenate([f.codes.astype(np.uint16).ravel() for f in features]),
        }
    )
    path.write_bytes(data)  # save_file would hide a full disk in an error of its own


class _Shard(NamedTuple):
    file: Any  # an open safetensors file: slices are read from the mapped pages
    rows: Int[np.ndarray, " n"]
    shapes: Int[np.ndarray, "n 2"]
    text_ends: Int[np.ndarray, " n"]
    code_ends: Int[np.ndarray, " n"]


class FeatureSet(Sequence[Item]):
    """The items of a folder that `experiments.pretokenize` wrote, before caption drop, in input order; nothing is held in memory.

    Raises InputError for a folder that is no feature set or not whole.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        path = folder / INDEX
        try:
            index = json.loads(path.read_bytes())
            if index["format"] != FORMAT:
                raise InputError(f"{path}: format {index['format']!r}, expected {FORMAT!r}")
            origin = dict(index["origin"])
            self.origin = Origin(**{**origin, "ids": Ids(**origin["ids"])})
            self.largest_id: int = index["largest_id"]  # a model must have more ids than this
            shards = [(folder / Path(s["file"]).name, s["count"]) for s in index["shards"]]
            count = index["count"]
            if any(
                type(n) is not int
                for n in (self.largest_id, *asdict(self.origin.ids).values(), *(n for _, n in shards))
            ):
                raise TypeError("ids and counts must be whole numbers")
            if type(self.origin.tokenizer) is not str:
                raise TypeError("a fingerprint must be text")
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; expected a folder written by experiments.pretokenize"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: not the index of a feature set: {error!r}; run experiments.pretokenize again"
            ) from error
        self._shards = [_open_shard(*s) for s in shards]
        self._ends = list(accumulate(n for _, n in shards))
        if count != len(self):
            raise InputError(
                f"{path}: its shards hold {len(self)} items, not {count}; run experiments.pretokenize again"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> Item:
        feature = self.feature(i)
        return _item(feature.text, feature.codes, self.origin.ids)

    def feature(self, i: int) -> Feature:
        """What is stored of item i."""
        i = range(len(self))[i]  # negative indices, IndexError
        s = bisect_right(self._ends, i)
        shard, j = self._shards[s], i - (self._ends[s - 1] if s else 0)
        span = lambda ends: slice(int(ends[j - 1]) if j else 0, int(ends[j]))
        text = shard.file.get_slice("text")[span(shard.text_ends)]
        codes = shard.file.get_slice("codes")[span(shard.code_ends)]
        return Feature(int(shard.rows[j]), text.tolist(), codes.reshape(*shard.shapes[j]))

    def lengths(self) -> Iterator[int]:
        """Tokens of every item."""
        for shard in self._shards:
            text = np.diff(shard.text_ends, prepend=0)
            sizes = zip(text.tolist(), shard.shapes.tolist(), strict=True)
            yield from (n + image_length(h, w) + 1 for n, (h, w) in sizes)


def _open_shard(path: Path, count: int) -> _Shard:
    try:
        file = safe_open(path, framework="np")
        rows, lengths = file.get_tensor("rows"), file.get_tensor("lengths").astype(np.int64)
        have = [file.get_slice(name).get_shape() for name in ("text", "codes")]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {error}: the feature set is not whole; run experiments.pretokenize again") from error
    texts, codes = np.cumsum(lengths[:, 0]), np.cumsum(lengths[:, 1] * lengths[:, 2])
    if (len(rows), len(lengths)) != (count, count) or have != [[texts[-1]], [codes[-1]]]:
        raise InputError(f"{path}: lengths disagree: the feature set is not whole; run experiments.pretokenize again")
    return _Shard(file, rows, lengths[:, 1:], texts, codes)
