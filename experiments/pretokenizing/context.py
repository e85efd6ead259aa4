"""Whether pictures of a size fit the model's context, found before the first picture is encoded."""

from pathlib import Path

from lumina_fn import images, prompt
from lumina_fn.disk import untrusted_folder
from lumina_fn.errors import InputError
from lumina_fn.images import PATCH
from lumina_fn.prompt import Tokenizer
from lumina_fn.state import runs
from lumina_fn.vocab import PIXELS_PER_CODE, image_length


def check(model: Path, tokenizer: Tokenizer, size: int) -> None:
    """Raises InputError where a picture of size x size pixels, even with an empty caption, has more tokens than the model takes.

    The size is not checked if the model's folder does not say how many it takes: of a model, only the tokenizer is needed.
    """
    limit = positions(model)
    if limit is None or (tokens := _tokens(tokenizer, size, size, with_size=False)) <= limit:
        return
    fits = largest(tokenizer, limit, size)
    instead = "another model"
    if fits is not None:
        room = limit - _most(tokenizer, fits)
        instead = f"--size {fits}, the largest at which all shapes fit (with captions of up to {room} tokens)"
    raise InputError(
        f"--size {size}: a picture of {size}x{size} is at least {tokens} tokens, and {model} takes {limit}: such items would all be cut "
        f"when they are trained on; give {instead}, or --long cut if that is meant"
    )


def positions(model: Path) -> int | None:
    """The number of tokens that the model takes, by the config.json of its folder; None if that says nothing."""
    if saved := runs.checkpoint(model):
        return saved.meta()["model"].get("max_positions")
    path = model / "config.json"
    if not path.exists():
        return None
    config = untrusted_folder.read_json(path)
    own = config.get("model")  # of a native folder
    found = own.get("max_positions") if isinstance(own, dict) else config.get("max_position_embeddings")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def largest(tokenizer: Tokenizer, limit: int, below: int) -> int | None:
    """The largest target below this one of which every shape fits with an empty caption, and has size tokens; None if there is none."""
    fitting = (
        size
        for size in range(below - PATCH, 0, -PATCH)
        if size // PATCH in tokenizer.sizes
        and _tokens(tokenizer, size, size) <= limit  # this first: a large target has hundreds of shapes
        and _most(tokenizer, size) <= limit
    )
    return next(fitting, None)


def _most(tokenizer: Tokenizer, size: int) -> int:
    return max(_tokens(tokenizer, width, height) for width, height in images.crop_sizes(size))


def _tokens(tokenizer: Tokenizer, width: int, height: int, *, with_size: bool = True) -> int:
    """Tokens of an item with an empty caption, and a prompt that says the picture's size or does not."""
    text = len(prompt.prompt_ids(tokenizer, "", width, height, with_size))
    return text + image_length(height // PIXELS_PER_CODE, width // PIXELS_PER_CODE) + 1
