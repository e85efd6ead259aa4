"""What a row of a user's dataset means: the file of a picture and its caption, or why it cannot be used."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lumina_fn.disk import lookup
from lumina_fn.errors import InputError
from lumina_fn.picture_files import Source

FILE_KEYS = ("file", "image", "image_path", "file_name", "path")  # what tools call it, the first that a row has
PROMPT_KEYS = ("prompt", "caption", "text", "captions")
TALK = "conversations"  # the key of Alpha-VLLM's training lists, TRAIN.md
LISTED = 5  # names in a message
# The two forms of an instruction, SPEC.md; the picture's size and the form are chosen anew.
_INSTRUCTION = re.compile(r"Generate an image(?: of \S+)? according to the following prompt:\s*")
_PICTURE = "<|image|>"


class Keys(NamedTuple):
    """The keys of a row's file and prompt; None: the first of FILE_KEYS and PROMPT_KEYS that it has."""

    file: str | None = None
    prompt: str | None = None


class How(NamedTuple):
    """How rows are understood."""

    keys: Keys = Keys()
    captions: Literal["first", "random", "all"] = "first"  # which of several captions of a picture
    seed: int = 0  # of the random ones
    encoding: str | None = None  # of texts; None: UTF-8, or UTF-16 with its mark


class Row(NamedTuple):
    """The file of a picture, as written, and its caption."""

    file: str
    prompt: str


class Unread(NamedTuple):
    """A row that cannot be used, with what it has for its file and its caption."""

    reason: str
    file: str | None = None
    prompt: str | None = None


class Item(NamedTuple):
    """A row, and what it was read from."""

    row: Row | Unread
    stored: Any  # JSON from which the row was understood: features of it are made again if this changes
    picture: Source | None = None  # None: the row's file is to be looked up


# The values of a range of rows, in order; those in archives come with their pictures if the flag is set.
Values = Callable[[range, bool], Iterator[tuple[Any, Source | None]]]


class Stored(NamedTuple):
    """Rows as a reader finds them: JSON values, or `Unread`."""

    form: str  # what they were read as
    count: int
    values: Values
    captions: str  # where they come from
    keys: Keys = Keys()  # of the values
    roots: tuple[Path, ...] = ()  # folders in which their files are looked up


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset."""

    form: str
    count: int
    captions: str
    roots: tuple[Path, ...]
    # The items of a range of rows, in order; without the pictures in archives if the flag is not set.
    items: Callable[[range, bool], Iterator[Item]]

    def item(self, index: int, pictures: bool = True) -> Item:
        """One row. Reading many in order is faster by `items`."""
        return next(self.items(range(index, index + 1), pictures))

    def said(self) -> str:
        """What the rows were read as, in one line."""
        return f"read as {self.form}: {self.count} rows, captions from {self.captions}"


def source(item: Item, roots: Sequence[Path]) -> tuple[Source, bool]:
    """Where an item's picture is, and whether it is there by the very name that the row has. Raises InputError."""
    if item.picture is not None:
        return item.picture, True
    if isinstance(item.row, Unread):
        raise InputError(item.row.reason)
    return lookup.locate(item.row.file, roots)


def understood(stored: Stored, how: How) -> Rows:
    """The rows as files and captions. With `how.captions` "all", each caption of a picture is a row."""
    starts: np.ndarray | None = None
    if how.captions == "all":
        values = stored.values(range(stored.count), False)
        starts = np.cumsum([0, *(len(items(value, stored.keys, how)) for value, _ in values)])

    def read(part: range, pictures: bool = True) -> Iterator[Item]:
        within = part if starts is None else _holding(starts, part)
        index = within.start if starts is None else int(starts[within.start])
        for value, picture in stored.values(within, pictures):
            for item in items(value, stored.keys, how):
                if index in part:
                    yield item._replace(picture=picture)
                index += 1

    count = stored.count if starts is None else int(starts[-1])
    return Rows(stored.form, count, stored.captions, stored.roots, read)


def chained(form: str, parts: Sequence[Stored]) -> Stored:
    """The rows of several readers, one after the other, under one name."""
    starts = np.cumsum([0, *(part.count for part in parts)])

    def values(within: range, pictures: bool) -> Iterator[tuple[Any, Source | None]]:
        for part, start in zip(parts, starts[:-1].tolist(), strict=True):
            own = range(max(within.start - start, 0), min(within.stop - start, part.count))
            if own:
                yield from part.values(own, pictures)

    come_from = " and ".join(dict.fromkeys(part.captions for part in parts))
    return Stored(form, int(starts[-1]), values, come_from)


def _holding(starts: np.ndarray, part: range) -> range:
    """The values that hold the items of a part."""
    return range(int(np.searchsorted(starts, part.start, "right")) - 1, int(np.searchsorted(starts, part.stop, "left")))


def items(value: Any, keys: Keys, how: How) -> list[Item]:
    """The rows of a value: one, or several if it has several captions and all of them are wanted."""
    stored = [value, *keys] if any(keys) else value
    if isinstance(value, Unread):
        return [Item(value, stored)]
    try:
        file, captions = _file(value, keys), _captions(value, keys)
    except InputError as error:
        return [Item(Unread(str(error), *_written(value, keys)), stored)]
    if isinstance(captions, str):
        return [Item(Row(file, captions), stored)]
    if how.captions == "random":
        drawn = hashlib.sha256(json.dumps([how.seed, file, captions]).encode()).digest()
        captions = [captions[int.from_bytes(drawn[:8]) % len(captions)]]
    chosen = captions if how.captions == "all" else captions[:1]
    return [Item(Row(file, caption), [stored, caption]) for caption in chosen]


def keys_of(value: Any, keys: Keys) -> Keys:
    """The keys by which a value is read; None for one that it does not have."""
    has = value if isinstance(value, dict) else {}
    first = lambda known: next((name for name in known if name in has), None)
    return Keys(keys.file or first(FILE_KEYS), keys.prompt or first((*PROMPT_KEYS, TALK)))


def _text(kind: str, value: dict, name: str | None, wanted: str) -> Any:
    if name is None or name not in value:
        has = ", ".join(map(repr, list(value)[:LISTED])) or "none"
        raise InputError(f"no {kind}: expected a key {wanted}; the row has {has:.200} (--{kind}-key names another)")
    return value[name]


def _nonempty(kind: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"no {kind}: expected some text, found {text!r:.80}")
    return text


def _file(value: Any, keys: Keys) -> str:
    if not isinstance(value, dict):
        raise InputError(f'expected {{"file": ..., "prompt": ...}}, found {type(value).__name__}')
    file = _text("file", value, keys_of(value, keys).file, keys.file or ", ".join(FILE_KEYS))
    if isinstance(file, list) and len(file) != 1:
        raise InputError(f"{len(file)} files: expected one picture a row")
    return _nonempty("file", file[0] if isinstance(file, list) else file)


def _captions(value: dict, keys: Keys) -> str | list[str]:
    """A value's caption, or its captions. Raises InputError."""
    name = keys_of(value, keys).prompt
    found = _text("prompt", value, name, keys.prompt or ", ".join(PROMPT_KEYS))
    if name == TALK:
        return _instruction(found)
    return (
        [_nonempty("prompt", text) for text in found]
        if isinstance(found, list) and found
        else _nonempty("prompt", found)
    )


def _instruction(turns: Any) -> str:
    """The caption in a conversation that asks for a picture and is answered by one. Raises InputError for any other."""
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    asked, answer = texts if len(texts) == 2 else (None, None)
    if not isinstance(asked, str) or not isinstance(answer, str) or answer.strip() != _PICTURE:
        raise InputError(f"{TALK}: expected two turns, a prompt and {_PICTURE}")
    if _PICTURE in asked:
        raise InputError(f"{TALK}: a prompt with a picture in it is another task; only text to image is read")
    begins = _INSTRUCTION.match(asked)
    return _nonempty("prompt", asked[begins.end() :] if begins else asked)


def _written(value: Any, keys: Keys) -> tuple[str | None, str | None]:
    """What a value of any type has for its file and its caption."""
    names = keys_of(value, keys)
    has = value if isinstance(value, dict) else {}
    file, prompt = (has.get(name) if name is not None else None for name in names)
    return file if isinstance(file, str) else None, prompt if isinstance(prompt, str) else None
