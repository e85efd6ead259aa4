"""That the tests check shapes: a call that breaks its signature is an error here, and none elsewhere."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

import ops
from lumina_fn import model
from lumina_fn.config import ModelConfig

CFG = ModelConfig(vocab=8, width=8, layers=1, heads=2, kv_heads=1, hidden=8, max_positions=8)
WRONG = torch.zeros(1, 2, 3, dtype=torch.int64)  # [B T] is asked for


def test_a_wrong_shape_is_an_error():
    with pytest.raises(TypeCheckError, match="tokens"):
        model.forward(model.init(CFG), WRONG, CFG)


def test_two_axes_of_one_name_are_equally_long():
    with pytest.raises(TypeCheckError, match="gain"):
        ops.rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5)


def test_a_traced_call_is_checked_too():
    with pytest.raises(TypeCheckError, match="gain"):
        torch.func.vmap(lambda x: ops.rms_norm(x, torch.zeros(3), 1e-5))(torch.zeros(2, 2, 4))


def test_nothing_is_checked_outside_the_tests():
    code = "import sys, lumina_fn.model; sys.exit('beartype' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
