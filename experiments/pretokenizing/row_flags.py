"""The flags that say how rows are read, which pretokenize, `dataset report` and `dataset verify` share."""

from pathlib import Path
from typing import Annotated, Literal

from lumina_fn.process.flags import REPEATED

ImageRoots = Annotated[
    tuple[Path, ...],
    "another folder that may hold pictures (the first is that of the list); may be repeated",
    REPEATED,
]
FileKey = Annotated[
    str | None,
    "the rows' key, a table's column or a tar's ending of the picture (default: the first of file, image, image_path, file_name, path)",
]
PromptKey = Annotated[
    str | None,
    "the rows' key, a table's column or a tar's ending of the caption (default: the first of prompt, caption, text, captions, conversations)",
]
Captions = Annotated[
    Literal["first", "random", "all"],
    "of several captions of a picture: the first, one that the row and the seed choose, or each as a row of its own",
]
Encoding = Annotated[str | None, "the text's encoding, such as cp1252 (default: UTF-8, or UTF-16 with its mark)"]
