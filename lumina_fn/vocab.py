"""The token ids of the released model and of small models, and the layout of an image in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np

IGNORE = -100  # label of a position that is not predicted
PAD = 0  # id of a padded position; causality keeps it out of every prediction

START_TEXT, END_TEXT = "<racm3:break>", "<eoss>"
NEWLINE_TEXT, SEP_TEXT = "<reserved08799>", "<reserved08706>"


def size_text(n: int) -> str:
    """Text of the size token for n patches of 32 pixels."""
    return f"<reserved{8800 + n:05d}>"


@dataclass(frozen=True)
class Ids:
    """Token ids of one model. An image is `start size(h) size(w) (codes newline) x rows end`."""

    start: int
    end: int
    newline: int
    sep: int
    size0: int  # n patches of 32 pixels are token size0 + n
    code0: int  # image code c is token code0 + c
    codes: int


# Fixed in the reference code. sep and size0 are defined only by the released tokenizer, and read from tokenizer.json.
LUMINA_VOCAB = 171_385
LUMINA_START, LUMINA_END, LUMINA_NEWLINE, LUMINA_CODE0, LUMINA_CODES = 151_665, 151_666, 151_670, 155_000, 16_384

PIXELS_PER_CODE = 8
CODES_PER_PATCH = 4  # size tokens count patches of 32 pixels


def image_tokens(codes: Sequence[Sequence[int]], ids: Ids) -> list[int]:
    """`start size(h) size(w) (row newline) x h end` of h rows of w codes; h and w are multiples of 4. The height comes first."""
    height, width = len(codes), len(codes[0])
    tokens = [ids.start, ids.size0 + height // CODES_PER_PATCH, ids.size0 + width // CODES_PER_PATCH]
    for row in codes:
        tokens += [ids.code0 + c for c in row]
        tokens.append(ids.newline)
    return [*tokens, ids.end]


@overload
def image_length(height: int, width: int) -> int: ...
@overload
def image_length(height: "np.ndarray", width: "np.ndarray") -> "np.ndarray": ...
def image_length(height: Any, width: Any) -> Any:
    """The number of tokens of an image of height x width codes, with `start` and `end`; elementwise for arrays."""
    return 3 + height * (width + 1) + 1


def allowed(n: int, height: int, width: int, ids: Ids) -> range:
    """Ids that may follow `start` and `n` further tokens of an image of height x width codes: one id, or all the codes."""
    one = lambda i: range(i, i + 1)
    if n < 2:
        return one(ids.size0 + (height, width)[n] // CODES_PER_PATCH)
    row, column = divmod(n - 2, width + 1)
    if row >= height:
        return one(ids.end)
    return one(ids.newline) if column == width else range(ids.code0, ids.code0 + ids.codes)


def image_codes(tokens: Sequence[int], ids: Ids) -> list[list[int]]:
    """The h rows of w codes of one image, `start` ... `end`. Raises ValueError naming the first token the grammar forbids."""
    if len(tokens) < 3 or tokens[0] != ids.start:
        raise ValueError(f"an image begins with {ids.start} (start) and two size tokens, not with {list(tokens[:3])}")
    height, width = (CODES_PER_PATCH * (t - ids.size0) for t in tokens[1:3])
    if height < 1 or width < 1 or len(tokens) != image_length(height, width):
        raise ValueError(f"{len(tokens)} tokens are no image of {height} x {width} codes")
    for n, token in enumerate(tokens[1:]):
        if token not in allowed(n, height, width, ids):
            raise ValueError(f"token {n + 1} of an image of {height} x {width} codes is {token}")
    body = [t - ids.code0 for t in tokens[3:-1] if t != ids.newline]
    return [body[i : i + width] for i in range(0, len(body), width)]
