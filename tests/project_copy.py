"""A copy of the project to run commands and notebooks in, with what `make demo` leaves behind."""

import json
import os
import shutil
import sys
from pathlib import Path

from PIL import Image

from experiments.demo import shapes, splits
from experiments.demo import tokenizer as demo_tokenizer
from experiments.demo.train_vq import config
from lumina_fn import checkpoint, model, vq
from lumina_fn.config import ModelConfig

ROOT = Path(__file__).parents[1]
ASSETS = Path("experiments/demo/assets")


def make(folder: Path) -> Path:
    """The floors, the small models (untrained ones where the project has none), and 8 of the demo's pictures."""
    for part in ("kernels", "ops", "lumina_fn", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if not (folder / ASSETS).exists():
        _write_random_models(folder / ASSETS)
    pictures = folder / "runs/demo/data/images"
    pictures.mkdir(parents=True)
    rows = []
    for i, spec in enumerate(splits.fine_tuning()[::40]):
        Image.fromarray(shapes.draw(spec)).save(pictures / f"{i}.png")
        rows.append({"file": f"images/{i}.png", "prompt": shapes.caption(spec)})
    (pictures.parent / "data.json").write_text(json.dumps(rows))
    return folder


def _write_random_models(folder: Path) -> None:
    tokens, ids = demo_tokenizer.build(codes=512)
    cfg = ModelConfig(ids.code0 + 512, 32, 2, 2, 2, 64, max_positions=256, ids=ids)
    source = folder / "source"
    source.mkdir(parents=True)
    demo_tokenizer.save(source, tokens)
    (source / "config.json").write_text(json.dumps({"ids": vars(ids)}))
    checkpoint.save_model(folder / "lm", model.init(cfg), cfg, source=source)
    shutil.rmtree(source)
    checkpoint.save_vq(folder / "vq", vq.init(config(512)), config(512))


def environment(folder: Path) -> dict[str, str]:
    """This process's, with this Python first and the copy's code instead of the project's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
