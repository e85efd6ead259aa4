"""Pack documents into rows of one length: assign documents to rows, and build the rows."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int

from lumina_fn.features.rows import Document, write
from lumina_fn.loss import Packed
from lumina_fn.vocab import IGNORE, PAD, Ids


def first_fit_decreasing(lengths: Int[np.ndarray, " S"], room: int) -> list[list[int]]:
    """The documents of each row: each document, the longest first, goes into the first row with room for it.

    A row has `room` tokens, at least the length of the longest document.
    """
    rows: list[list[int]] = []
    left = np.zeros(len(lengths), np.int64)  # at most as many rows as documents
    for i in np.argsort(-lengths, kind="stable").tolist():
        fits = int(np.argmax(np.append(left[: len(rows)] >= lengths[i], True)))
        if fits == len(rows):
            rows.append([])
            left[fits] = room
        rows[fits].append(i)
        left[fits] -= lengths[i]
    return rows


def packed(rows: Sequence[Sequence[Document]], size: int, room: int, ids: Ids, count: int) -> tuple[Packed, int]:
    """The batch [count size room], filled up with rows that predict nothing, and the number of the documents' tokens.

    The rest of a row is a document of its own, which predicts nothing.
    """
    tokens = np.full((count * size, room), PAD)
    labels = np.full((count * size, room), IGNORE)
    first = np.zeros((count * size, room), np.int64)
    total = 0
    for row, documents in enumerate(rows):
        at = 0
        for item in documents:
            end = at + write(item, tokens[row, at:], labels[row, at:], ids)
            labels[row, at] = IGNORE  # the token before it belongs to another document
            first[row, at:end] = at
            at = end
        first[row, at:] = at
        total += at
    return Packed(*(torch.from_numpy(x).unflatten(0, (count, size)) for x in (tokens, labels, first))), total
