"""Captions and codes to training items, items to batches, and the folder of shards that keeps them in between."""

from collections.abc import Sequence

import numpy as np

from lumina_fn import prompt
from lumina_fn.errors import InputError
from lumina_fn.prompt import Tokenizer
from lumina_fn.vocab import IGNORE, PIXELS_PER_CODE, image_tokens

Item = tuple[list[int], list[int]]  # ids and labels, equally long


def training_item(tokenizer: Tokenizer, caption: str, codes, *, with_size: bool) -> Item:
    """Prompt, picture and separator; the prompt is not predicted. `codes[h w]` is a tensor, an array or a list of rows.

    Raises InputError for a picture whose size has no token and for codes that the model has no ids for.
    """
    codes = np.asarray(codes)
    height, width = (PIXELS_PER_CODE * n for n in codes.shape)
    prompt.check_size(tokenizer, width, height)
    if codes.min() < 0 or codes.max() >= tokenizer.ids.codes:
        raise InputError(
            f"image codes {codes.min()} to {codes.max()}: the model has ids for 0 to {tokenizer.ids.codes - 1}; is this its VQ?"
        )
    text = prompt.prompt_ids(tokenizer, caption, width, height, with_size)
    image = [*image_tokens(codes.tolist(), tokenizer.ids), tokenizer.ids.sep]
    return text + image, [IGNORE] * len(text) + image


def drop_caption(ids: Sequence[int], labels: Sequence[int], end_id: int) -> Item:
    """The item without its prompt and last separator, where it is one picture that ends the item; any other item unchanged."""
    if len(ids) > 1 and ids[-2] == labels[-2] == end_id and list(ids).count(end_id) == 1:
        picture = [t for t in labels[:-1] if t != IGNORE]
        return picture, picture
    return list(ids), list(labels)
