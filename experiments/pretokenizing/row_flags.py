"""The flags that say how a list of rows is read, which pretokenize, `dataset report` and `dataset verify` share."""

from pathlib import Path
from typing import Annotated

from lumina_fn.process.flags import REPEATED

ImageRoots = Annotated[
    tuple[Path, ...],
    "another folder that may hold pictures (the first is that of the list); may be repeated",
    REPEATED,
]
FileKey = Annotated[
    str | None, "the rows' key of the picture (default: the first of file, image, image_path, file_name, path)"
]
PromptKey = Annotated[str | None, "the rows' key of the caption (default: the first of prompt, caption, text)"]
Encoding = Annotated[str | None, "the text's encoding, such as cp1252 (default: UTF-8, or UTF-16 with its mark)"]
