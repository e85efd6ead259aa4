"""Feature sets as MindSpeed-MM and Alpha-VLLM extract them, of random codes."""

import json
import pickle
from pathlib import Path

import numpy as np
import torch

from lumina_fn import data, prompt
from tests.support.folders import TOKENIZER as MODEL

TOKENIZER = prompt.load_tokenizer(MODEL)


def items(sizes, seed=0):
    random = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        yield data.training_item(TOKENIZER, f"cat {i}", random.integers(0, 16384, size), with_size=i % 2 == 0)


def write_mindspeed(folder: Path, sizes, prefix="./sora_features") -> list:
    """As the guide's extraction writes it."""
    (folder / "features").mkdir(parents=True)
    made = list(items(sizes))
    lines = []
    for i, (ids, labels) in enumerate(made):
        torch.save({"token": ids, "label": labels}, folder / f"features/{i}_jpg.pt")
        lines.append(json.dumps({"file": f"{prefix}/features/{i}_jpg.pt", "len": len(ids)}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return made


def write_alpha(folder: Path, sizes, protocol=4) -> list:
    """As Alpha-VLLM's pre_tokenize and concat_record write it."""
    (folder / "files").mkdir(parents=True)
    made, records = list(items(sizes)), []
    for i, (ids, labels) in enumerate(made):
        (folder / f"files/{i}.pkl").write_bytes(pickle.dumps({"token": ids, "label": labels, "id": i}, protocol))
        records.append({"file": f"/data/out/files/{i}.pkl", "len": len(ids), "id": i})
    (folder / "record.json").write_text(json.dumps(records))
    return made
