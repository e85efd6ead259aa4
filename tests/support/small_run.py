"""A small model and the features of a few pictures, for tests of the command that trains on them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lumina_fn import checkpoint, data, model, prompt
from lumina_fn.config import ModelConfig
from lumina_fn.features import shards
from lumina_fn.vocab import Ids
from tests.support import folders

CODES = 16


def write_lm(path: Path, tokenizer: Path, ids: Ids) -> Path:
    cfg = ModelConfig(
        vocab=ids.code0 + CODES, width=16, layers=2, heads=2, kv_heads=1, hidden=24, max_positions=160, ids=ids
    )
    checkpoint.save_model(path, model.init(cfg), cfg, source=tokenizer)
    return path


def write_features(folder: Path, tokenizer: Path, ids: Ids, /, count: int = 7, **changes: object) -> Path:
    """Random pictures of two sizes; `changes` are to their origin."""
    known = prompt.load_tokenizer(tokenizer)
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, CODES, (8, 4 + 4 * (i % 2))) for i in range(count)]
    features = [shards.Feature(i, data.text_ids(known, f"picture {i}", c, True), c) for i, c in enumerate(codes)]
    folder.mkdir()
    shards.write_features(folder, features, replace(shards.Origin(64, 0, ids, known.fingerprint, "vq"), **changes))
    return folder


def write_inputs(folder: Path) -> list:
    """Flags that name a model and features, which are written into the folder."""
    (folder / "tokenizer").mkdir()
    ids = folders.write_tokenizer(folder / "tokenizer", CODES)
    write_lm(folder / "lm", folder / "tokenizer", ids)
    write_features(folder / "features", folder / "tokenizer", ids)
    return ["--model", folder / "lm", "--features", folder / "features", "--device", "cpu"]
