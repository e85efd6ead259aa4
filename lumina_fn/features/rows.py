"""Write stored features directly into the rows of a batch: the ids and labels of `FeatureSet[i]`, at the speed of memory."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lumina_fn.features.shards import Feature
from lumina_fn.vocab import CODES_PER_PATCH, IGNORE, Ids, image_length


class Document(NamedTuple):
    """An item to be written into a row."""

    feature: Feature
    captioned: bool  # whether its text and last separator are kept


def document(feature: Feature, dropped: bool, ids: Ids) -> Document:
    """A feature as a document, with its caption dropped or not; a text with a picture in it is never dropped, as in `data.drop_caption`."""
    return Document(feature, not dropped or ids.end in feature.text)


def length(item: Document) -> int:
    """The number of tokens of an item."""
    return image_length(*item.feature.codes.shape) + (len(item.feature.text) + 1 if item.captioned else 0)


def write(item: Document, tokens: Int[np.ndarray, " T"], labels: Int[np.ndarray, " T"], ids: Ids) -> int:
    """Write the item's tokens and labels to the start of these arrays, cut to their length; the number of tokens written."""
    whole = length(item)
    if whole > len(tokens):
        longer = np.empty((2, whole), tokens.dtype)
        write(item, longer[0], longer[1], ids)
        tokens[:], labels[:] = longer[:, : len(tokens)]
        return len(tokens)
    codes, text = item.feature.codes, item.feature.text if item.captioned else []
    (height, width), start = codes.shape, len(text)
    body = start + 3
    end = body + height * (width + 1)
    tokens[:start] = text
    tokens[start:body] = ids.start, ids.size0 + height // CODES_PER_PATCH, ids.size0 + width // CODES_PER_PATCH
    picture = tokens[body:end].reshape(height, width + 1)
    np.add(codes, ids.code0, out=picture[:, :width], casting="unsafe", dtype=tokens.dtype)
    picture[:, width] = ids.newline
    tokens[end] = ids.end
    if item.captioned:
        tokens[end + 1] = ids.sep
    labels[:start] = IGNORE
    labels[start:whole] = tokens[start:whole]
    return whole
