"""Captions and codes become training items, items become batches; `FeatureSet` reads stored items."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from jaxtyping import Integer

from lumina_fn import prompt
from lumina_fn.errors import InputError
from lumina_fn.features.feature_set import (  # noqa: F401  (part of this module's public names)
    FeatureSet,
    Item,
    drops_caption,
    item,
    order,
)
from lumina_fn.loss import Batch
from lumina_fn.prompt import Tokenizer
from lumina_fn.vocab import IGNORE, PAD, PIXELS_PER_CODE


def training_item(tokenizer: Tokenizer, caption: str, codes, *, with_size: bool) -> Item:
    """Prompt, picture and separator; the prompt is not predicted. `codes[h w]` is a tensor, an array or a list of rows.

    Raises InputError for a picture whose size has no token and for codes that the model has no ids for.
    """
    codes = np.asarray(codes)
    return item(text_ids(tokenizer, caption, codes, with_size), codes, tokenizer.ids)


def text_ids(tokenizer: Tokenizer, caption: str, codes: Integer[np.ndarray, "h w"], with_size: bool) -> list[int]:
    """The item's ids before the picture. Raises InputError as `training_item` does."""
    height, width = (PIXELS_PER_CODE * n for n in codes.shape)
    prompt.check_size(tokenizer, width, height)
    if codes.min() < 0 or codes.max() >= tokenizer.ids.codes:
        raise InputError(
            f"image codes {codes.min()} to {codes.max()}: the model has ids for 0 to {tokenizer.ids.codes - 1}; is this its VQ?"
        )
    return prompt.prompt_ids(tokenizer, caption, width, height, with_size)


def drop_caption(ids: Sequence[int], labels: Sequence[int], end_id: int) -> Item:
    """The item without its prompt and last separator, where it is one picture that ends the item; any other item unchanged."""
    if len(ids) > 1 and ids[-2] == labels[-2] == end_id and list(ids).count(end_id) == 1:
        picture = [t for t in labels[:-1] if t != IGNORE]
        return picture, picture
    return list(ids), list(labels)


def batch(items: Sequence[Item], *, max_positions: int, multiple: int = 64) -> Batch:
    """Items cut to max_positions and padded on the right to a multiple, so that few shapes occur."""
    length = max(len(ids) for ids, _ in items)
    length = min(math.ceil(length / multiple) * multiple, max_positions)
    tokens = torch.full((len(items), length), PAD)
    labels = torch.full((len(items), length), IGNORE)
    for row, (item_ids, item_labels) in enumerate(items):
        n = min(len(item_ids), length)
        tokens[row, :n] = torch.tensor(item_ids[:n])
        labels[row, :n] = torch.tensor(item_labels[:n])
    return Batch(tokens, labels)


def fingerprint(tree: Any) -> str:
    """A hash of every tensor in a tree: shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
