"""The command `pretokenize` called on a few rows, with a small VQ and pictures of noise.

The fixtures' functions have names of their own, so that a test's argument hides no import.
"""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import pretokenize
from lumina_fn import checkpoint, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.process import entry
from tests.support.paths import GOLDENS

MODEL = GOLDENS / "tokens" / "toy_tokenizer_bpe"
TOKENIZER = prompt.load_tokenizer(MODEL)
SMALL_VQ = VQConfig(channels=8, multipliers=(1, 1, 1, 1), res_blocks=1, codes=64, groups=4)


@pytest.fixture(scope="session", name="small_vq")
def small_vq_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "vq"
    checkpoint.save_vq(folder, vq.init(SMALL_VQ, seed=0), SMALL_VQ)
    return folder


@pytest.fixture(name="call")
def calling(tmp_path, small_vq, monkeypatch, capsys):
    """Run the command in this process: exit code and the lines on stderr."""

    def call(rows, *flags, text=None, out=tmp_path / "out", model=MODEL, vq=small_vq, size=64):
        path = tmp_path / "set" / "data.json"
        path.parent.mkdir(exist_ok=True)
        if rows is not None or text is not None:
            path.write_text(json.dumps(rows) if text is None else text)
        argv = [path, out, "--model", model, "--vq", vq, "--size", size, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["pretokenize", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            entry.run(pretokenize.main)
        return ended.value.code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture(name="picture")
def drawing(tmp_path):
    def picture(name, size=(64, 64), seed=0, mode="RGB"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return picture


def quarantine(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def row(file, prompt="a cat"):
    return {"file": str(file), "prompt": prompt}
