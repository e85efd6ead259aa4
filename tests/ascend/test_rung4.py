"""Rung 4: what is traced for device npu converts to a graph of Ascend's graph engine (GE)."""

import resource
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy, embedding, scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels import ascend, ascend_graph
from kernels.vendored import generate
from lumina_fn import train
from lumina_fn.config import ModelConfig
from lumina_fn.programs import graphs
from lumina_fn.sharding import Mesh

# torchair copies trees in a way that torch wants no more.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

npu = torch.ops.npu
B, T, H, G, K, D, F, V, LAYERS = 2, 128, 2, 1, 64, 128, 128, 100, 2
S, N, EPS = 16, 8, 1e-5  # slots of a cache, rows of the loss
DTYPE = torch.bfloat16
FAKE = FakeTensorMode()


def ge_of(function, *args):
    """The program of a function of fake tensors on npu, and its GE graph."""
    flat, spec = pytree.tree_flatten(args)
    with FAKE:
        traced = make_fx(lambda *some: function(*pytree.tree_unflatten(some, spec)))(*flat)

    class Traced(torch.nn.Module):
        def forward(self, *some):
            return traced(*some)

    program = torch.export.export(Traced(), tuple(flat), strict=False)
    return program, ascend_graph.to_ge(program)


def tensor(*shape, dtype=DTYPE):
    with FAKE:
        return torch.empty(shape, dtype=dtype, device="npu")


def loss(params, tokens, cos, sin, mask, labels):
    """A decoder of npu ops: what torch_npu differentiates by itself."""
    h = embedding(tokens, params["embed"])
    heads = lambda x: npu.npu_rotary_mul(x.view(B, T, H, K), cos, sin).flatten(2)
    for layer in params["layers"]:
        q, k, v = (npu.npu_rms_norm(h, layer["gain1"], 1e-5)[0] @ layer["qkv"]).chunk(3, -1)
        attended = npu.npu_fusion_attention(
            heads(q), heads(k), v, H, "BSH", atten_mask=mask, scale=K**-0.5, sparse_mode=3
        )[0]  # fmt: skip
        h = h + attended @ layer["out"]
        h = h + npu.npu_swiglu(npu.npu_rms_norm(h, layer["gain2"], 1e-5)[0] @ layer["up"]) @ layer["down"]
    return cross_entropy((h @ params["embed"].t()).float().flatten(0, 1), labels.flatten())


def step(params, *batch):
    grads, value = torch.func.grad_and_value(loss)(params, *batch)
    return value, pytree.tree_map(lambda p, g: p - 1e-3 * g, params, grads)


@pytest.fixture(scope="module")
def trained():
    layer = lambda: {
        "gain1": tensor(D), "qkv": tensor(D, 3 * D), "out": tensor(D, D),
        "gain2": tensor(D), "up": tensor(D, 2 * F), "down": tensor(F, D),
    }  # fmt: skip
    params = {"embed": tensor(V, D), "layers": [layer() for _ in range(LAYERS)]}
    ids, angles = (lambda: tensor(B, T, dtype=torch.int64)), (lambda: tensor(1, T, 1, K))
    # No tensor is passed twice: tracing would take the two for one.
    return ge_of(step, params, ids(), angles(), angles(), tensor(2048, 2048, dtype=torch.bool), ids())


def test_every_fused_op_of_a_training_step_is_there_with_its_gradient(trained):
    """Per layer one attention, one swiglu, two norms and two rotations, each with a gradient; no op that GE does not know."""
    counts = ascend_graph.op_counts(trained[1])
    per_layer = {"FlashAttentionScore": 1, "SwiGlu": 1, "RmsNorm": 2, "RotaryMul": 2}
    wanted = {f"{op}{grad}": n * LAYERS for op, n in per_layer.items() for grad in ("", "Grad")}
    assert {op: counts[op] for op in wanted} == wanted
    assert not [op for op in counts if "." in op]


def test_every_op_of_the_program_is_a_vendored_converter(trained):
    program, _ = trained
    listed = set((generate.HERE / "ge_converters.txt").read_text().splitlines())
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {op for op in called if "getitem" not in op} <= listed


def test_conversion_leaves_the_wheels_converters_in_place(trained):
    converter = ascend_graph.get_or_auto_gen_converter(ascend_graph.FUSION_ATTENTION_GRAD)
    assert converter.__module__.startswith("torchair.")


def test_an_op_without_a_converter_is_named():
    """SDPA becomes torch_npu's newest attention, for which torchair silently leaves a node that no NPU can run."""
    causal = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match=r"no GE converter for npu\.npu_fusion_attention_v3\.default: expected"):
        ge_of(causal, *(tensor(B, H, T, K) for _ in range(3)))


def test_an_op_whose_converter_only_raises_is_named():
    with pytest.raises(NotImplementedError, match=r"aten\.amax\.default ge_converter is not implemented"):
        ge_of(lambda x: x.amax(0), tensor(4, 4))


def kernel_calls():
    """The kernels of kernels.ascend, each with arguments, and the GE ops that it is there for."""
    f32, int64 = torch.float32, torch.int64
    x, gain, rstd = (lambda: tensor(B, T, D)), (lambda: tensor(D)), (lambda: tensor(B, T, 1, dtype=f32))
    q, kv, stat = (lambda: tensor(B, T, H, K)), (lambda: tensor(B, T, G, K)), (lambda: tensor(B, T, H, 1, dtype=f32))
    head_gain, lse = (lambda: tensor(1, K)), (lambda: tensor(B, T, H, dtype=f32))
    angles, first = tensor(T, 2, K // 2, dtype=f32), tensor(B, T, dtype=int64)
    slot, cache = tensor(B, 1, dtype=int64), (lambda: tensor(B, S, G, K))
    scalar, leaf = (lambda: tensor(dtype=f32)), (lambda: [tensor(V, D, dtype=f32)])
    target = tensor(N, dtype=int64)
    return {
        ascend.rms_norm_fwd: ((x(), gain(), EPS), {"RmsNorm"}),
        ascend.rms_norm_bwd: ((x(), x(), gain(), rstd()), {"RmsNormGrad"}),
        ascend.add_rms_norm_fwd: ((x(), x(), gain(), EPS), {"AddRmsNorm"}),
        ascend.add_rms_norm_bwd: ((x(), x(), x(), gain(), rstd()), {"RmsNormGrad"}),
        ascend.qk_norm_rotary_fwd: ((q(), head_gain(), head_gain(), angles, EPS), {"LayerNormV4", "RotaryMul"}),
        ascend.qk_norm_rotary_bwd: ((q(), q(), head_gain(), angles, stat(), stat()), {"LayerNormGradV3", "RotaryMul"}),
        ascend.swiglu_fwd: ((x(), x()), {"SwiGlu"}),
        ascend.swiglu_bwd: ((x(), x(), x()), {"SwiGluGrad"}),
        ascend.attention_fwd: ((q(), kv(), kv()), {"FlashAttentionScore"}),
        ascend.attention_bwd: ((q(), q(), kv(), kv(), q(), lse()), {"FlashAttentionScoreGrad"}),
        ascend.packed_attention_fwd: ((q(), kv(), kv(), first), {"FlashAttentionScore"}),
        ascend.packed_attention_bwd: ((q(), q(), kv(), kv(), first, q(), lse()), {"FlashAttentionScoreGrad"}),
        ascend.cached_attention: (
            (tensor(B, 1, H, K), cache(), cache(), tensor(B, 1, S, dtype=torch.bool)), {"FusedInferAttentionScore"},
        ),
        ascend.write_cache: ((cache(), slot, tensor(B, 1, G, K)), {"ScatterNdUpdate"}),
        ascend.linear_cross_entropy_pass: ((tensor(N, D), tensor(V, D), target, scalar(), 1e-5, [3, 4]), {"MatMul"}),
        ascend.adamw: (
            (leaf(), leaf(), leaf(), leaf(), scalar(), scalar(), scalar(), scalar(), 0.9, 0.95, EPS, 0.1), {"Sqrt"},
        ),
    }  # fmt: skip


# A constant made in a traced function, the masked ids, is a real tensor of the stand-in; torch_npu warns of its format.
@pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format:UserWarning")
@pytest.mark.parametrize("kernel", kernel_calls(), ids=lambda kernel: kernel.__name__)
def test_each_kernel_of_ours_converts_to_the_op_that_it_is_there_for(kernel):
    args, wanted = kernel_calls()[kernel]
    assert wanted <= set(ascend_graph.op_counts(ge_of(kernel, *args)[1]))


def test_decoding_in_float32_converts():
    """The fused op takes half types only, and its converter would not say so."""
    q, keys, values = (
        tensor(B, 1, H, K, dtype=torch.float32),
        *(tensor(B, S, G, K, dtype=torch.float32) for _ in range(2)),
    )
    counts = ascend_graph.op_counts(
        ge_of(ascend.cached_attention, q, keys, values, tensor(B, 1, S, dtype=torch.bool))[1]
    )
    assert "FusedInferAttentionScore" not in counts
    assert counts["SoftmaxV2"] == 1
    assert not [op for op in counts if "." in op]


@pytest.fixture
def eight():
    """This process as one of eight; nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*(_get_pg_default_device|Multiple backends).*:UserWarning")  # torchair asks so
def test_collectives_become_hccls(eight):
    def exchange(x):
        whole = collectives.all_gather_single(x, 0, eight)
        part = collectives.reduce_scatter_single(whole * 2, "sum", 0, eight)
        return collectives.all_reduce(part, "sum", eight)

    _, graph = ge_of(exchange, tensor(16, 8))
    hccl = [op for op in graph.op if op.type.startswith("Hcom")]
    assert Counter(op.type for op in hccl) == {"HcomAllGather": 1, "HcomReduceScatter": 1, "HcomAllReduce": 1}
    assert {op.attr["rank_size"].i for op in hccl if op.type != "HcomAllReduce"} == {8}


CFG = ModelConfig(vocab=61, width=128, layers=2, heads=2, kv_heads=1, hidden=192)
MESH = Mesh("0", 0, 8, "meta", param_dtype=DTYPE)
FORWARD = {"FlashAttentionScore": 2, "RmsNorm": 3, "AddRmsNorm": 2, "RotaryMul": 4, "SwiGlu": 2}
GRADIENTS = {"FlashAttentionScoreGrad": 2, "RmsNormGrad": 5, "LayerNormGradV3": 4, "SwiGluGrad": 2}
STEP = {**FORWARD, **GRADIENTS, "RotaryMul": 8}  # turned back in the backward
SHARED = {"HcomAllGather": 6, "HcomReduceScatter": 4, "HcomAllReduce": 3}  # blocks are gathered twice
AGAIN = {
    "FlashAttentionScore": 4,
    "RmsNorm": 5,
    "AddRmsNorm": 4,
    "RotaryMul": 12,
    "SwiGlu": 4,
}  # where blocks are recomputed
OF_MODEL = {
    "forward": (lambda: graphs.forward(CFG, batch=2, dtype=DTYPE), FORWARD),
    "step": (lambda: graphs.step(CFG, train.AdamW(), batch=2, tokens=16, dtype=DTYPE), STEP),
    "remat": (lambda: graphs.step(CFG, train.AdamW(), batch=2, tokens=16, dtype=DTYPE, remat=True), STEP | AGAIN),
    "packed, of 8 ranks": (
        lambda: graphs.step(CFG, train.AdamW(), MESH, batch=2, tokens=16, dtype=DTYPE, packed=True),
        STEP | AGAIN | SHARED,
    ),
    "decoding": (
        lambda: graphs.decoding(CFG, batch=2, slots=32, dtype=DTYPE),
        {
            "FusedInferAttentionScore": 2,
            "ScatterNdUpdate": 4,
            "RmsNorm": 3,
            "AddRmsNorm": 2,
            "RotaryMul": 4,
            "SwiGlu": 2,
        },
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torchair's and torch.export's own
@pytest.mark.parametrize("what", OF_MODEL)
def test_the_model_converts(what, eight):
    """All of its programs, each with as many fused ops as its layers have, gradients and collectives too."""
    function, fused = OF_MODEL[what]
    counts = ascend_graph.op_counts(ascend_graph.to_ge(graphs.export(function(), graphs.NPU).program))
    assert {op: counts[op] for op in fused} == fused
    assert not [op for op in counts if "." in op]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_7b_models_step_converts(eight, capsys):
    """All 32 layers at their widths, for one of eight ranks, and what that takes."""
    cfg, since = ModelConfig(), time.perf_counter()
    function = graphs.step(cfg, train.AdamW(), MESH, batch=1, tokens=4096, dtype=DTYPE)
    program, traced = graphs.export(function, graphs.NPU).program, time.perf_counter()
    graph, converted = ascend_graph.to_ge(program), time.perf_counter()
    counts = ascend_graph.op_counts(graph)
    with capsys.disabled():
        print(
            f"\nthe 7.88B step: traced in {traced - since:.0f} s, converted in {converted - traced:.0f} s to {len(graph.op)} ops of GE; "
            f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
        )
    layers = cfg.layers
    assert {op: counts[op] for op in GRADIENTS} == {
        "FlashAttentionScoreGrad": layers, "RmsNormGrad": 2 * layers + 1, "LayerNormGradV3": 2 * layers, "SwiGluGrad": layers
    }  # fmt: skip
    # Blocks are gathered twice, and computed twice.
    assert counts["HcomAllGather"] == 2 * layers + 2
    assert counts["HcomReduceScatter"] == layers + 2
    assert {op: counts[op] for op in FORWARD} == {
        "FlashAttentionScore": 2 * layers, "RmsNorm": 2 * layers + 1, "AddRmsNorm": 2 * layers, "RotaryMul": 6 * layers,
        "SwiGlu": 2 * layers,
    }  # fmt: skip
    assert not [op for op in counts if "." in op]
