"""The error for a user's mistake, and safe printing of text from files."""

from collections.abc import Collection
from itertools import islice


class InputError(ValueError):
    """A user's mistake. The message says what, where, what was expected and what to do, on one line."""


def printable(text: object) -> str:
    """`text` with control characters (terminal escapes, newlines) escaped, so that a foreign file name or caption is harmless to print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def listed(names: Collection[object], most: int = 5) -> str:
    """The first names and the number of others; short and escaped, whatever the names are."""
    first = [printable(name if len(name) <= 200 else f"{name[:200]}...") for name in map(str, islice(names, most))]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
