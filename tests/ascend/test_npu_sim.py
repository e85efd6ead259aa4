"""The simulator of rung 5 against plain torch: each op against float64 autograd, and tensors that behave as a device's do."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import ops
from experiments import devices
from lumina_fn.errors import InputError
from tests.ascend.npu_sim import NpuSim

npu = torch.ops.npu
B, T, H, G, K, D = 2, 5, 4, 2, 64, 24
F32, BF16 = torch.float32, torch.bfloat16
# Rounding of the result, and what sums in float32 add to it.
TOLERANCE = {
    F32: {"rtol": 1e-5, "atol": 2e-5},
    BF16: {"rtol": 1e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


@pytest.fixture(autouse=True)
def sim():
    torch.manual_seed(0)
    with NpuSim() as sim:
        yield sim


def assert_is(simulated: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert simulated.device.type == "npu"
    assert simulated.dtype == dtype
    torch.testing.assert_close(simulated.cpu().double(), truth, **TOLERANCE[dtype])


def assert_computes(op, truth, dtype: torch.dtype, *inputs: Tensor) -> None:
    """The op's value and gradients, through torch_npu's autograd, are those of `truth` in float64."""
    wide = [x.to(dtype).double().requires_grad_() for x in inputs]
    narrow = [x.to(dtype).to("npu").requires_grad_() for x in inputs]
    expected, found = truth(*wide), op(*narrow)
    assert_is(found.detach(), expected.detach(), dtype)
    direction = torch.randn(expected.shape).to(dtype)
    of = torch.autograd.grad(expected, wide, direction.double())
    for g, exact in zip(torch.autograd.grad(found, narrow, direction.to("npu")), of, strict=True):
        assert_is(g, exact, dtype)


@dtypes
def test_rms_norm(dtype):
    op = lambda x, gain: npu.npu_rms_norm(x, gain, 1e-3)[0]
    truth = lambda x, gain: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    assert_computes(op, truth, dtype, torch.randn(B, T, D), torch.randn(D))


@dtypes
def test_add_rms_norm(dtype):
    x, residual, gain = (torch.randn(*shape).to(dtype) for shape in ((B, T, D), (B, T, D), (D,)))
    y, rstd, total = npu.npu_add_rms_norm(x.to("npu"), residual.to("npu"), gain.to("npu"), 1e-3)
    exact = x.double() + residual.double()
    scale = (exact.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    assert_is(total, exact, dtype)
    assert_is(y, exact * scale * gain.double(), dtype)
    torch.testing.assert_close(rstd.cpu().double(), scale, rtol=1e-2, atol=0)
    assert rstd.dtype == F32


@dtypes
@pytest.mark.parametrize("batch", [1, B])
def test_rotary_mul(dtype, batch):
    def truth(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    inputs = torch.randn(B, T, H, K), torch.randn(batch, T, 1, K), torch.randn(batch, T, 1, K)
    assert_computes(npu.npu_rotary_mul, truth, dtype, *inputs)


@dtypes
@pytest.mark.parametrize("dim", [-1, 1])
def test_swiglu(dtype, dim):
    def truth(x):
        gate, up = x.chunk(2, dim)
        return F.silu(gate) * up

    assert_computes(lambda x: npu.npu_swiglu(x, dim), truth, dtype, torch.randn(B, 6, D))


def exact_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Of [B N S D], by torch's own."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if hidden is None else ~hidden, scale=scale, enable_gqa=True
    )


def packed(size: int) -> Tensor:
    """[B 1 T T]: documents that end at different places in each row."""
    document = torch.arange(size) >= torch.tensor([2, 3])[:, None]
    return ((document[:, :, None] != document[:, None]) | torch.ones(size, size, dtype=torch.bool).triu(1))[:, None]


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


MASKS = {
    "causal": (CAUSAL, 3, causal(T)),
    "packed": (packed(T), 1, packed(T)),
    "packed, by default": (packed(T), 0, packed(T)),
    "whole": (causal(T), 1, causal(T)),
    "bytes": (causal(T).byte(), 0, causal(T)),
    "none": (None, 0, None),
    "none, whatever the mode": (None, 3, None),
}


@dtypes
@pytest.mark.parametrize("layout", ["BSH", "BNSD"])
@pytest.mark.parametrize("mask", MASKS)
def test_fusion_attention(dtype, layout, mask):
    given, mode, hidden = MASKS[mask]
    options = {"atten_mask": None if given is None else given.to("npu"), "scale": 0.2, "sparse_mode": mode}
    op = lambda q, k, v: npu.npu_fusion_attention(q, k, v, H, layout, **options)[0]
    if layout == "BNSD":
        inputs = [torch.randn(B, n, T, K) for n in (H, G, G)]
        assert_computes(op, lambda *qkv: exact_attention(*qkv, hidden, 0.2), dtype, *inputs)
        return
    heads = lambda x, n: x.unflatten(2, (n, K)).transpose(1, 2)
    truth = lambda q, k, v: (
        exact_attention(heads(q, H), heads(k, G), heads(v, G), hidden, 0.2).transpose(1, 2).flatten(2)
    )
    assert_computes(op, truth, dtype, *(torch.randn(B, T, n * K) for n in (H, G, G)))


def test_fusion_attentions_statistics_are_the_softmaxs():
    q, k = (torch.randn(B, n, T, K) for n in (H, H))
    _, largest, total, *_ = npu.npu_fusion_attention(
        q.to("npu"), k.to("npu"), k.to("npu"), H, "BNSD", atten_mask=CAUSAL.to("npu"), scale=0.2, sparse_mode=3
    )
    lse = (q @ k.mT * 0.2).masked_fill(causal(T), -math.inf).logsumexp(-1)
    assert largest.shape == total.shape == (B, H, T, 8)
    torch.testing.assert_close((largest + total.log()).cpu(), lse[..., None].expand(-1, -1, -1, 8))


def test_fusion_attentions_gradient_uses_the_statistics_it_is_given():
    """kernels.ascend hands over lse and 1 for the largest score and the sum: the same probabilities. Another sum is not."""
    q, k, v, d = (torch.randn(B, H, T, K).to("npu") for _ in range(4))
    out, largest, total, *_ = npu.npu_fusion_attention(q, k, v, H, "BNSD", scale=0.2)
    grads = lambda top, sums: npu.npu_fusion_attention_grad(
        q, k, v, d, H, "BNSD", softmax_max=top, softmax_sum=sums, attention_in=out, scale_value=0.2
    )[:3]  # fmt: skip
    own = grads(largest, total)
    for a, b in zip(own, grads(largest + total.log(), torch.ones_like(total)), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
    assert not torch.allclose(own[0].cpu(), grads(largest, 2 * total)[0].cpu())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"atten_mask": CAUSAL.logical_not(), "sparse_mode": 3}, "True above the diagonal"),
        ({"atten_mask": causal(T), "sparse_mode": 3}, "2048 x 2048"),
        ({"atten_mask": CAUSAL, "sparse_mode": 1}, r"\[2048, 2048\]: expected one of"),
        ({"atten_mask": causal(T).float(), "sparse_mode": 1}, "expected bool or uint8"),
        ({"atten_mask": torch.ones(T, T, dtype=torch.bool), "sparse_mode": 1}, "sees no key"),
        ({"atten_mask": CAUSAL, "sparse_mode": 2}, "sparse_mode 2"),
        ({"keep_prob": 0.9}, "not simulated"),
        ({"actual_seq_qlen": [T]}, "not simulated"),
    ],
    ids=str,
)
def test_what_attention_is_not_told_rightly_is_an_error(options, says):
    q = torch.randn(B, T, H * K).to("npu")
    options = {name: x.to("npu") if isinstance(x, Tensor) else x for name, x in options.items()}
    with pytest.raises((RuntimeError, NotImplementedError), match=says):
        npu.npu_fusion_attention(q, q, q, H, "BSH", **options)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["BSH", "BNSD"])
@pytest.mark.parametrize("queries", [1, 3])
def test_fused_infer_attention_score(dtype, layout, queries):
    slots = 7
    hidden = torch.arange(slots) > torch.tensor([[3, 4, 5], [0, 1, 2]])[:, :queries, None]
    q, k, v = (torch.randn(B, n, size, K).to(dtype) for n, size in ((H, queries), (G, slots), (G, slots)))
    truth = exact_attention(q.double(), k.double(), v.double(), hidden[:, None], 0.2)
    to_layout = lambda x: x.transpose(1, 2).flatten(2) if layout == "BSH" else x
    given = (to_layout(x).contiguous().to("npu") for x in (q, k, v))
    out, lse = npu.npu_fused_infer_attention_score(
        *given, atten_mask=hidden[:, None].to("npu"), num_heads=H, num_key_value_heads=G, scale=0.2,
        input_layout=layout, softmax_lse_flag=True,
    )  # fmt: skip
    assert_is(out, to_layout(truth), dtype)
    assert lse.shape == (B, H, queries, 1)


def test_decoding_takes_half_types_only():
    q = torch.randn(B, H, 1, K).to("npu")
    with pytest.raises(RuntimeError, match=r"of torch\.float32: expected bfloat16 or float16"):
        npu.npu_fused_infer_attention_score(q, q, q, num_heads=H, input_layout="BNSD")


def test_decoding_must_be_told_its_heads_of_keys():
    q, k = (torch.randn(B, n, size, K).bfloat16().to("npu") for n, size in ((H, 1), (G, 7)))
    with pytest.raises(RuntimeError, match="2 heads of keys, told 0"):
        npu.npu_fused_infer_attention_score(q, k, k, num_heads=H, input_layout="BNSD")


def test_scatter_nd_update():
    cache, new = torch.randn(B, 7, G, K), torch.randn(B, 2, G, K)
    slots = torch.tensor([[3, 4], [0, 6]])
    indices = torch.stack([torch.arange(B)[:, None].expand_as(slots), slots], -1)
    expected = cache.clone()
    expected[torch.arange(B)[:, None], slots] = new
    own = cache.to("npu")
    made = npu.npu_scatter_nd_update(own, indices.to("npu"), new.to("npu"))
    assert torch.equal(made.cpu(), expected)
    assert torch.equal(own.cpu(), cache)
    assert npu.npu_scatter_nd_update_(own, indices.to("npu"), new.to("npu")) is own
    assert torch.equal(own.cpu(), expected)
    with pytest.raises(RuntimeError, match="two values for one place"):
        npu.npu_scatter_nd_update(own, indices[:, [0, 0]].to("npu"), new.to("npu"))
    with pytest.raises(RuntimeError, match="an index outside"):
        npu.npu_scatter_nd_update(own, indices.to("npu") + 1, new.to("npu"))


def test_apply_adam_w_is_torchs():
    p = torch.randn(3, 4)
    own, optimizer = p.clone().requires_grad_(), None
    optimizer = torch.optim.AdamW([own], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    state = [x.to("npu") for x in (p, torch.zeros_like(p), torch.zeros_like(p))]
    for step in range(3):
        own.grad = torch.randn(3, 4)
        optimizer.step()
        scalars = 0.9**step, 0.95**step, 1e-2, 0.1, 0.9, 0.95, 1e-8
        made = npu.npu_apply_adam_w(*scalars, own.grad.to("npu"), None, False, False, out=state)
        assert all(a is b for a, b in zip(made, state, strict=True))
    torch.testing.assert_close(state[0].cpu(), own.detach())


@pytest.mark.parametrize("op", [lambda x: npu.npu_rms_norm(x, x[0, 0]), npu.npu_swiglu])
def test_the_device_takes_no_float64(op):
    with pytest.raises(RuntimeError, match="float64"):
        op(torch.randn(2, 2, 4, dtype=torch.float64).to("npu"))


def test_rotarys_gradient_has_the_devices_limit():
    x, angles = torch.randn(B, T, H, 32).to("npu").requires_grad_(), torch.randn(1, T, 1, 32).to("npu")
    with pytest.raises(RuntimeError, match="expected a multiple of 64"):
        npu.npu_rotary_mul(x, angles, angles).sum().backward()


def test_what_is_not_simulated_is_an_error():
    with pytest.raises(NotImplementedError, match="npu_fast_gelu"):
        torch_npu.npu_fast_gelu(torch.ones(2).to("npu"))


def on_both(function) -> tuple[Tensor, Tensor]:
    """What the function makes of a [2 3] tensor, and that tensor afterwards, on a CPU and on an NPU: they must not differ."""
    x = torch.arange(6.0).view(2, 3)
    results = []
    for device in ("cpu", "npu"):
        own = x.clone().to(device)
        made = function(own)
        assert all(t.device.type == device for t in (own, *made) if isinstance(t, Tensor))
        results.append(tree_map(lambda t: (t.tolist(), t.stride()) if isinstance(t, Tensor) else t, (own, *made)))
    assert results[0] == results[1]
    return results[0]


FUNCTIONS = {
    "arithmetic": lambda x: [x + 1, 2 * x, x / torch.tensor(2.0), x @ x.t(), x.sum(), x.mean(0, keepdim=True)],
    "in place": lambda x: [x.add_(1), x.mul_(torch.tensor(3.0)), x.clamp_(max=9)],
    "in place through a view": lambda x: [x[:, 1].zero_(), x.t()[2].add_(5)],
    "an index is written": lambda x: x.__setitem__((slice(None), torch.tensor([0, 2])), 7.0) or [],
    "out": lambda x: [torch.mul(x, 2, out=torch.empty_like(x)), torch.add(x, 1, out=x)],
    "an empty out": lambda x: [torch.cat([x, x], out=x.new_empty(0))],
    "views": lambda x: [x.t(), x.view(3, 2), x[1:], x[:, ::2], x.unsqueeze(1), x.expand(4, 2, 3), *x.split(1)],
    "copies": lambda x: [x.t().contiguous(), x.contiguous(), x.t().flatten(), x.t().reshape(2, 3), x.clone(), x.t().clone()],
    "factories": lambda x: [
        torch.arange(3, device=x.device), torch.ones(2, device=x.device), torch.full((2,), 5, device=x.device),
        torch.zeros_like(x), x.new_full((2,), 1), torch.tensor([1, 2], device=x.device), torch.eye(2, device=x.device),
    ],
    "dtypes": lambda x: [x.bfloat16(), x.long(), x > 2, x.to(torch.float64)],
    "indices": lambda x: [x[torch.tensor([1, 0])], x[x > 2], x.gather(1, x.long().clamp(max=2)), x.nonzero()],
    "many at once": lambda x: [*torch._foreach_mul([x, x + 1], 2), *x.topk(2)],
    "shape in place": lambda x: [x.unsqueeze_(0)],
    "nothing": lambda x: [x[:0], x[:0].sum(), x.new_empty(0) + 1],
    "numbers": lambda x: [x.sum().item(), x.tolist(), bool((x > 0).any()), torch.equal(x, x)],
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_behave_as_on_a_cpu(name):
    on_both(FUNCTIONS[name])


def test_copies_between_devices(sim):
    x = torch.randn(2, 3)
    there = x.t().to("npu")
    assert torch.equal(there.cpu(), x.t())
    assert torch.equal(torch.zeros(3, 2).copy_(there), x.t())
    assert torch.equal(there.copy_(torch.ones(3, 2)).cpu(), torch.ones(3, 2))
    assert torch.equal(there.new_zeros(2).cpu(), torch.zeros(2))
    assert x.to("npu", torch.bfloat16).dtype == torch.bfloat16
    assert sim.calls["aten::copy_"] == 2


def test_memory_of_the_host_beside_the_devices_is_an_error():
    x = torch.ones(3).to("npu")
    with pytest.raises(RuntimeError, match=r"a tensor \[3\] on the CPU"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"a tensor \[3\] on the CPU"):
        npu.npu_rms_norm(x, torch.ones(3))


@pytest.mark.parametrize(
    "shapes", [((4, 3), (3, 2)), ((2, 4, 3), (3, 2)), ((2, 4, 3), (2, 3, 2)), ((3,), (3, 2)), ((2, 4, 3), (3,))]
)
def test_matmul_is_differentiated(shapes):
    assert_computes(torch.matmul, torch.matmul, F32, *(torch.randn(*shape) for shape in shapes))


def test_our_ops_run_their_kernel_for_the_device(sim):
    q, k, v = (torch.randn(B, T, n, K) for n in (H, G, G))
    expected = ops.attention(q, k, v)
    sim.calls.clear()
    torch.testing.assert_close(ops.attention(q.to("npu"), k.to("npu"), v.to("npu")).cpu(), expected)
    assert sim.calls["lumina::attention_fwd"] == sim.calls["npu::npu_fusion_attention"] == 1


def test_on_a_cpu_nothing_is_counted(sim):
    ops.rms_norm(torch.randn(2, 3), torch.ones(3), 1e-5)
    assert sim.calls == {}


@pytest.mark.slow
@pytest.mark.parametrize(("device", "code"), [("npu", 2), ("auto", 0)])
def test_without_cann_a_command_says_what_to_source(device, code, tmp_path):
    """torch_npu is installed, as here, and set_env.sh was not sourced: where `import torch` alone fails."""
    assets = Path(__file__).parents[2] / "experiments" / "demo" / "assets"
    command = (
        f"-m experiments.sample --model {assets / 'lm'} --vq {assets / 'vq'} --width 32 --height 32 --device {device}"
    )
    hidden = ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    done = subprocess.run(
        [sys.executable, *command.split(), "--prompt", "a red heart", "--out", tmp_path / "out"], timeout=120,
        env={name: value for name, value in os.environ.items() if name not in hidden}, capture_output=True, text=True,
        cwd=assets.parents[2],
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert "torch_npu is installed, but was not loaded: source CANN's set_env.sh" in done.stderr


def test_auto_is_the_npu_here():
    assert devices.kind("auto") == "npu"
    said = []
    run = SimpleNamespace(device="auto", env_check="error")
    assert devices.checked_device(run, say=said.append) == torch.device("npu:0")
    assert "TASK_QUEUE_ENABLE=0" in said
    with pytest.raises(InputError, match="--device npu:99: not available here: torch finds 8, numbered from 0"):
        devices.device("npu:99")
