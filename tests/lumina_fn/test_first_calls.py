"""Calls that people try first work, or say what to do. In a process of its own: here every call's shapes are checked before it."""

import subprocess
import sys

from tests.support.paths import ROOT

CODE = """
import torch
import lumina_fn
from lumina_fn import checkpoint, model, prompt, sample
params, cfg = checkpoint.load_model("experiments/demo/assets/lm")
vq_params, vq_cfg = checkpoint.load_vq("experiments/demo/assets/vq")
tokens = torch.arange(10)
try:
    model.forward(params, tokens, cfg)
except ValueError as error:
    print(error)
long = torch.zeros(1, cfg.max_positions + 5, dtype=torch.int64)
print(model.forward(params, long, cfg).shape[1] == cfg.max_positions)
ids = prompt.prompt_ids(prompt.load_tokenizer("experiments/demo/assets/lm"), "a red heart", 32, 32)
image = sample.picture(sample.generate(params, ids, cfg, height=32, width=32), vq_params, vq_cfg)
print(type(image).__module__, image.size, image.mode)
print(len(lumina_fn.__doc__.splitlines()) > 10, lumina_fn.__version__)
"""


def test_first_calls():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    row, cut, picture, tour = done.stdout.splitlines()
    assert row == "tokens of shape [10]: expected rows [B T]; one sequence is tokens[None]"
    assert cut == "True"
    assert "the model's context is" in done.stderr
    assert picture == "PIL.Image (32, 32) RGB"
    assert tour.startswith("True 0.3")
