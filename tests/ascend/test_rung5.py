"""Rung 5: the model on simulated `npu` tensors computes what it computes on the CPU, by the NPU's kernels and its exported programs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from kernels import ascend, ascend_graph, reference
from lumina_fn import decode, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.programs import graphs
from tests.ascend.npu_sim import NpuSim

CFG = ModelConfig(vocab=96, width=128, layers=2, heads=2, kv_heads=1, hidden=96, max_positions=64, masked_ids=(7, 11))
# AdamW's first step divides each gradient by its own size and eps. This eps is so large that the division magnifies no rounding,
# and this rate that a fault of the update is seen.
OPT = train.AdamW(1e-3, eps=1e-3, decay=0.1, clip=1.0)
B, T, SLOTS = 2, 12, 16


def params(cfg: ModelConfig = CFG) -> model.Params:
    generator = torch.Generator().manual_seed(0)
    move = lambda x: x + 0.02 * torch.randn(x.shape, generator=generator)
    return pytree.tree_map(move, model.init(cfg))


def batch(packed: bool) -> train.Batch | train.Packed:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(12, CFG.vocab, (2, B, T), generator=generator)
    labels[0, :3] = -100
    if not packed:
        return train.Batch(tokens, labels)
    return train.Packed(tokens, labels, torch.tensor([[0] * 5 + [5] * 7, [0] * T]))


def on(device: str, tree: Any) -> Any:
    """Copies: a donated state is written over."""
    return pytree.tree_map(lambda x: x.to(device, copy=True), tree)


def simulated(run: Callable[..., Any], *trees: Any) -> tuple[Any, NpuSim]:
    """What run gives of the trees as npu tensors, back on the CPU, and what was called."""
    with NpuSim() as sim:
        return on("cpu", run(*(on("npu", tree) for tree in trees))), sim


def far(got: Any, want: Any) -> float:
    """The largest difference of two trees' tensors."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def relative(got: Any, want: Any) -> float:
    """The largest difference of a tensor, by its own largest value."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return max(far(a, b) / b.abs().max().item() for a, b in pairs)


FORWARD = {"npu_fusion_attention": 2, "npu_rms_norm": 3, "npu_add_rms_norm": 2, "npu_rotary_mul": 4, "npu_swiglu": 2}
BACKWARD = {"npu_fusion_attention_grad": 2, "npu_rms_norm_backward": 5, "npu_swiglu_backward": 2}


def fused(sim: NpuSim) -> dict[str, int]:
    """The calls of torch_npu's own ops."""
    return {name.removeprefix("npu::"): n for name, n in sim.calls.items() if name.startswith("npu::")}


@pytest.mark.parametrize(
    ("options", "changes"),
    [({}, {}), ({"remat": True}, {}), ({"donate": True}, {}), ({}, {"head_norms": True})],
    ids=["plain", "remat", "donated", "gains of heads"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_a_step_is_the_cpus(packed, options, changes, record_property):
    cfg = replace(CFG, **changes)
    step = train.make_train_step(cfg, OPT, **options)
    state, rows = train.init_state(params(cfg), OPT), batch(packed)
    want, expected = step(on("cpu", state), rows)
    (got, metrics), sim = simulated(step, state, rows)
    again = 2 if options.get("remat") else 1
    calls = fused(sim)
    assert {name: calls[name] for name in BACKWARD} == BACKWARD
    assert calls["npu_fusion_attention"] == 2 * again
    assert metrics["loss"].item() == expected["loss"].item()
    record_property("errors", [far(got.params, want.params), relative(got.mu, want.mu), relative(got.nu, want.nu)])
    assert far(got.params, want.params) < 2e-7
    assert relative(got.mu, want.mu) < 3e-6
    assert relative(got.nu, want.nu) < 6e-6


def undecayed(*args: Any) -> Any:
    """One leaf's update with an argument, decay, left out."""
    return reference.adamw_of_leaf(*args[:-1], 0.0)


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_without_decay_would_be_found(donate, monkeypatch):
    monkeypatch.setattr(ascend, "adamw_of_leaf", undecayed)
    step, state = train.make_train_step(CFG, OPT, donate=donate), train.init_state(params(), OPT)
    want, _ = step(on("cpu", state), batch(packed=False))
    (got, _), _ = simulated(step, state, batch(packed=False))
    assert far(got.params, want.params) > 2e-6


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_a_step_in_bfloat16_is_as_near_to_float32_as_the_cpus(packed):
    exact, half = (train.make_train_step(CFG, OPT, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    state, rows = train.init_state(params(), OPT), batch(packed)
    truth, of_truth = exact(state, rows)
    cpus, of_cpu = half(state, rows)
    (got, metrics), _ = simulated(half, state, rows)
    assert (metrics["loss"] - of_truth["loss"]).abs() <= 2 * (of_cpu["loss"] - of_truth["loss"]).abs() + 2**-9
    for one, other, true in zip(*map(pytree.tree_leaves, (got.mu, cpus.mu, truth.mu)), strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm() + 2**-9 * true.norm()


def decoded(params: model.Params, prompts: Any, more: torch.Tensor, lengths: torch.Tensor) -> tuple[Any, ...]:
    """Prompts of two lengths, then a token more in each row twice."""
    cache = decode.empty_cache(params, CFG, 2, SLOTS)
    prefilled = decode.prefill(params, prompts, cache, CFG)
    extended = decode.extend(params, more[0], [3, 5], cache, CFG)
    stepped, cache = decode.step(params, more[1, :, 0], lengths, cache, CFG)
    return prefilled, extended, stepped, cache


PROMPTS = [torch.randint(12, CFG.vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
DECODED = PROMPTS, torch.tensor([[[17], [19]], [[21], [22]]]), torch.tensor([4, 6])


def test_decoding_is_the_cpus():
    """The cache is written, and read, where it should be. In float32, which the device's fused attention does not take."""
    want = decoded(params(), *DECODED)
    got, sim = simulated(decoded, params(), *DECODED)
    assert "npu_fused_infer_attention_score" not in fused(sim)
    assert relative(got[:3], want[:3]) < 1e-6
    assert relative(got[3], want[3]) < 1e-6


def test_decoding_in_bfloat16_is_as_near_to_float32_as_the_cpus():
    half = pytree.tree_map(lambda x: x.bfloat16(), params())
    truth = decoded(pytree.tree_map(lambda x: x.float(), half), *DECODED)
    cpus = decoded(half, *DECODED)
    got, sim = simulated(decoded, half, *DECODED)
    assert fused(sim)["npu_fused_infer_attention_score"] > 0
    visible = [i for i in range(CFG.vocab) if i not in CFG.masked_ids]
    seen = lambda some: pytree.tree_leaves((*some[:2], some[2][:, visible], some[3]))
    for one, other, true in zip(*map(seen, (got, cpus, truth)), strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm() + 2**-9 * true.norm()


def run_eagerly(program: torch.export.ExportedProgram) -> Callable[..., Any]:
    """By torchair: converted for the graph engine, and then run op by op in its place."""
    config = ascend_graph.CompilerConfig()
    config.debug.run_eagerly = True
    return ascend_graph.compiled(program, config)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:Skipping serialize:UserWarning")
@pytest.mark.parametrize("how", [lambda program: program.module(), run_eagerly], ids=["as it is", "by torchair"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_an_exported_step_is_the_cpus(packed, how):
    """The program of torch_npu's ops alone, as it goes to the graph engine, run op by op."""
    function = graphs.step(CFG, OPT, batch=B, tokens=T, dtype=torch.float32, packed=packed)
    inputs = graphs.StepInputs(train.init_state(params(), OPT), batch(packed), torch.tensor(OPT.lr))
    want = function.fn(*on("cpu", inputs))
    program = graphs.export(function, graphs.NPU).program
    run = how(program)
    got, sim = simulated(lambda tree: run(*pytree.tree_leaves(tree)), inputs)
    got = pytree.tree_unflatten(list(got), pytree.tree_structure(want))
    assert not [name for name in sim.calls if name.startswith("lumina::")]
    assert {name: fused(sim)[name] for name in FORWARD | BACKWARD} == FORWARD | BACKWARD | {"npu_rotary_mul": 8}
    assert got["metrics"]["loss"].item() == want["metrics"]["loss"].item()
    assert far(got["state"].params, want["state"].params) < 2e-7
    assert relative(got["state"].mu, want["state"].mu) < 3e-6
