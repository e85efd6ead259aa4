"""One row of a dataset, prepared: its picture cropped, its caption as ids, and all checks made that need no model."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.pretokenizing.encoding import Prepared
from lumina_fn import as_seen, images, prompt
from lumina_fn.errors import InputError
from lumina_fn.features.shards import Rejected
from lumina_fn.process.ranges import LONGEST_CAPTION
from lumina_fn.prompt import Tokenizer
from lumina_fn.rows import row as row_of
from lumina_fn.rows.row import How, Item, Keys, Unread

SIZE_TEXT_PROBABILITY = 0.9  # that a prompt states the picture's size


class Recipe(NamedTuple):
    """The settings by which rows become features, except the VQ."""

    roots: Sequence[Path]  # folders that may hold pictures
    tokenizer: Tokenizer
    size: int  # pixels; pictures become about size x size
    seed: int  # chooses the prompts that state the picture's size
    longest: int = LONGEST_CAPTION  # characters of a caption
    seen: bool = True  # pictures are read as their viewers show them, not as their files store them


def how(run: Any, seed: int) -> How:
    """How the flags of `row_flags` say that rows are read; `seed` chooses among several captions."""
    return How(Keys(run.file_key, run.prompt_key), run.captions, seed, run.encoding)


def prepare(index: int, item: Item, recipe: Recipe) -> Prepared | Rejected:
    """The prepared row, or the reason why it cannot be used; depends on the row, its picture and the recipe alone."""
    tokenizer, row = recipe.tokenizer, item.row
    if isinstance(row, Unread):
        return Rejected(index, row.file, row.reason)
    try:
        if problem := prompt.caption_problem(tokenizer, row.prompt, recipe.longest):
            raise InputError(problem)
        picture, exact = row_of.source(item, recipe.roots)
        loaded = images.load(picture, recipe.size, seen=recipe.seen)
        if not exact:
            loaded = loaded._replace(notes=loaded.notes | {as_seen.RENAMED})
        prompt.check_size(tokenizer, *loaded.image.size)
    except InputError as error:
        return Rejected(index, row.file, str(error))
    drawn = hashlib.sha256(json.dumps([recipe.seed, row.file, row.prompt]).encode()).digest()
    with_size = int.from_bytes(drawn[:8]) < SIZE_TEXT_PROBABILITY * 2**64
    text = prompt.prompt_ids(tokenizer, row.prompt, *loaded.image.size, with_size)
    return Prepared(index, text, *loaded)
