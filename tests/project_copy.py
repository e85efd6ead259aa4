"""A copy of the project to run commands and notebooks in, with what `make demo` leaves behind."""

import json
import os
import shutil
import sys
from pathlib import Path

from experiments.demo import splits, tasks
from experiments.demo import tokenizer as demo_tokenizer
from lumina_fn import checkpoint, model
from lumina_fn.config import ModelConfig

ROOT = Path(__file__).parents[1]
ASSETS = Path("experiments/demo/assets")


def make(folder: Path) -> Path:
    """The floors, the small models (an untrained one until the project has its own), and 8 of the demo's pictures."""
    for part in ("kernels", "ops", "lumina_fn", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if not (folder / ASSETS / "lm").exists():
        _write_random_lm(folder / ASSETS / "lm")
    tasks.prepare(folder / "runs/demo/data", splits.fine_tuning()[::40])
    return folder


def _write_random_lm(folder: Path) -> None:
    tokens, ids = demo_tokenizer.build(codes=512)
    cfg = ModelConfig(ids.code0 + 512, 32, 2, 2, 2, 64, max_positions=256, ids=ids)
    source = folder.with_name("tokenizer")
    source.mkdir()
    demo_tokenizer.save(source, tokens)
    (source / "config.json").write_text(json.dumps({"ids": vars(ids)}))
    checkpoint.save_model(folder, model.init(cfg), cfg, source=source)
    shutil.rmtree(source)


def environment(folder: Path) -> dict[str, str]:
    """This process's, with this Python first and the copy's code instead of the project's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
