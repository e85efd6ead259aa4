"""Rung 5: the commands themselves with `--device npu`, on simulated tensors: what they write is what the CPU's would be."""

import json
from pathlib import Path

import pytest
import torch

from experiments import finetune, sample
from lumina_fn import checkpoint, errors
from tests.ascend.npu_sim import NpuSim
from tests.support import small_run

DEMO = Path(__file__).parents[2] / "experiments" / "demo" / "assets"
EXACT = ["--dtype", "float32"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    *flags, _, _ = map(str, small_run.write_inputs(tmp_path_factory.mktemp("inputs")))
    return [*flags, "--batch", "2", "--lr", "1e-6", "--log-every", "1", *EXACT]


def train(inputs: list[str], out: Path, device: str, steps: int) -> tuple[list[dict], list[torch.Tensor]]:
    """The metrics and the parameters of a run."""
    # On the CPU the default would be to compile.
    finetune.main(
        [*inputs, "--compile", "off", "--out", str(out), "--device", device, "--steps", str(steps), "--save-every", "2"]
    )
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step in metrics:
        del step["tokens_per_second"]
    return metrics, list(torch.utils._pytree.tree_leaves(checkpoint.load_model(out / "model")[0]))


def test_a_fine_tune_is_the_cpus_and_goes_on_where_it_ended(inputs, tmp_path):
    want, params = train(inputs, tmp_path / "cpu", "cpu", 4)
    with NpuSim() as sim:
        got, moved = train(inputs, tmp_path / "npu", "npu", 4)
        train(inputs, tmp_path / "again", "npu", 2)
        resumed, again = train(inputs, tmp_path / "again", "npu", 4)
    assert sim.calls["npu::npu_fusion_attention_grad"] > 0
    assert resumed == got
    assert all(torch.equal(a, b) for a, b in zip(again, moved, strict=True))
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    # Four steps of at most the rate each; as in test_rung5, each may differ by a fifth of it.
    assert all((a - b).abs().max() < 8e-7 for a, b in zip(moved, params, strict=True))


def test_a_picture_is_the_cpus(tmp_path):
    flags = ["--model", DEMO / "lm", "--vq", DEMO / "vq", "--width", 32, "--height", 32, "--seed", 7, *EXACT]
    draw = lambda device: sample.main(
        [*map(str, flags), "--prompt", "a red heart", "--device", device, "--out", str(tmp_path / device)]
    )
    draw("cpu")
    with NpuSim() as sim:
        draw("npu")
    assert sim.calls["lumina::cached_attention"] > 0
    assert (tmp_path / "npu/0000_00.png").read_bytes() == (tmp_path / "cpu/0000_00.png").read_bytes()


def test_nothing_is_compiled_unless_asked_for_which_is_refused(inputs, tmp_path):
    flags = [*inputs, "--device", "npu", "--steps", "1", "--save-every", "0"]
    with NpuSim() as sim:
        finetune.main([*flags, "--out", str(tmp_path / "run")])
        with pytest.raises(errors.InputError, match="--compile blocks: an NPU runs its fused kernels one by one"):
            finetune.main([*flags, "--compile", "blocks", "--out", str(tmp_path / "none")])
    assert sim.calls["lumina::attention_bwd"] > 0
    assert not (tmp_path / "none").exists()
