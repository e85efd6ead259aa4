"""The one home of token ids: which id means what, for the released model and for small ones."""

from dataclasses import dataclass

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


# Fixed in the reference code. sep and size0 live only in the released tokenizer; they are read from tokenizer.json.
LUMINA_VOCAB = 171_385
LUMINA_START, LUMINA_END, LUMINA_NEWLINE, LUMINA_CODE0, LUMINA_CODES = 151_665, 151_666, 151_670, 155_000, 16_384
