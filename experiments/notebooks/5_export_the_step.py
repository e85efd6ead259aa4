# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Export the step
#
# A training step is a function of tensors: state, batch and learning rate in, state and metrics out. So it can be traced once and written to a file, forward, backward
# and AdamW together, and run where none of this code is. This notebook does that for a small model, for a CPU and for an Ascend NPU, and reads what is in the graphs.
# No NPU need be here: a device of that name is declared for fake tensors, before the first gradient, for PyTorch counts its devices then.

# %%
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.utils._pytree as pytree

from lumina_fn import model, train
from lumina_fn.config import ModelConfig
from lumina_fn.programs import folder as program_files
from lumina_fn.programs import graphs
from lumina_fn.sharding import Mesh

warnings.filterwarnings("ignore")  # torch.export's own, of its insides
cfg = ModelConfig(vocab=61, width=128, layers=2, heads=2, kv_heads=1, hidden=192, max_positions=64)
opt = train.AdamW()
print("declared:", graphs.npu_device())

# %% [markdown]
# ## For a CPU
#
# A program takes every tensor as an input, the parameters too: it is made from sizes alone, in which no number has yet been put.

# %%
function = graphs.step(cfg, opt, batch=2, tokens=16)
on_cpu = graphs.export(function, graphs.CPU)
print(len(on_cpu.inputs), "inputs:", ", ".join(on_cpu.inputs[:3]), "...", ", ".join(on_cpu.inputs[-3:]))
print(len(on_cpu.outputs), "outputs:", ", ".join(on_cpu.outputs[:3]), "...", ", ".join(on_cpu.outputs[-3:]))

# %% [markdown]
# Written, read again and run, it is the step that it came from, to the bit.

# %%
state = train.init_state(model.init(cfg, seed=0), opt)
tokens = torch.randint(cfg.vocab, (2, 16), generator=torch.Generator().manual_seed(0))
inputs = graphs.StepInputs(state, train.Batch(tokens, tokens), torch.tensor(1e-3))
with tempfile.TemporaryDirectory() as folder:
    program_files.save(on_cpu, file := Path(folder) / "step.pt2")
    print(f"{file.stat().st_size:,} bytes")
    reloaded = torch.export.load(file).module()
got = reloaded(*pytree.tree_leaves(inputs))
want = pytree.tree_leaves(train.make_update(cfg, opt, None, train.Options())(*inputs))
assert all(map(torch.equal, got, want))
print(f"loss {dict(zip(on_cpu.outputs, got, strict=True))['metrics.loss']:.4f}, and all", len(got), "outputs are equal")

# %% [markdown]
# ## What is in it
#
# The ops of `ops/` are there by name, each with the backward that was written for it. Differentiation is over: a backward is a call like any other.


# %%
def calls(exported):
    """How often each op is called."""
    graph = exported.program.graph
    return Counter(str(n.target).removesuffix(".default") for n in graph.nodes if n.op == "call_function")


cpu = calls(on_cpu)
for op, n in sorted(cpu.items()):
    if op.startswith("lumina."):
        print(f"{op:40} {n}")
for op in ("attention", "swiglu", "add_rms_norm"):
    assert cpu[f"lumina.{op}_fwd"] == cpu[f"lumina.{op}_bwd"] == cfg.layers
assert cpu["lumina.qk_norm_rotary_bwd"] == 2 * cfg.layers  # queries and keys

# %% [markdown]
# ## For an NPU
#
# Ascend's graph engine does not know our ops; it knows those of torch_npu. While the same function is traced, each of ours is replaced by `kernels/ascend.py`'s version of it.
# torch_npu need not be here: its ops' schemas are kept in this project, and fake tensors, which have shapes and no numbers, say that they are on an NPU.
# An op that the graph engine has no converter for would be refused here, with the line that calls it.

# %%
on_npu = graphs.export(graphs.step(cfg, opt, batch=2, tokens=16, dtype=torch.bfloat16), graphs.NPU)
npu = calls(on_npu)
for op, n in sorted(npu.items()):
    if op.startswith("npu."):
        print(f"{op:40} {n}")
assert not [op for op in npu if op.startswith("lumina.")]
assert npu["npu.npu_fusion_attention"] == npu["npu.npu_fusion_attention_grad"] == cfg.layers

# %% [markdown]
# What is one call on the CPU's list may be several here: the turning of queries and keys is a layer norm and `npu_rotary_mul`, the loss and AdamW are elementwise formulas.


# %%
SHAPES = {"view", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select", "split", "_unsafe_view", "cat", "permute"}  # fmt: skip


def kind(op):
    name = op.removeprefix("aten.").split(".")[0]
    if op.startswith(("lumina.", "npu.")):
        return "fused"
    return "products" if name in ("mm", "bmm") else "shapes" if name in SHAPES or "getitem" in op else "others"


figure, axis = plt.subplots(figsize=(6, 2.4))
left = [0, 0]
for name in ("fused", "products", "shapes", "others"):
    numbers = [sum(n for op, n in of.items() if kind(op) == name) for of in (npu, cpu)]
    axis.barh(["npu", "cpu"], numbers, left=left, label=name)
    left = [a + b for a, b in zip(left, numbers, strict=True)]
axis.set(xlabel="calls in one training step")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Eight ranks
#
# With a mesh the state is one rank's part, and the graph holds what the ranks say to each other. To trace it nobody else need be there. Every block is gathered twice, for
# its forward and again for its backward; the embedding and the head once. Every unit's gradients are scattered once.

# %%
mesh = Mesh("0", 0, 8, "meta", param_dtype=torch.bfloat16)
shared = graphs.export(graphs.step(cfg, opt, mesh, batch=2, tokens=16, dtype=torch.bfloat16), graphs.NPU)
MARKS = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter", "all_reduce": "reduce",
         "npu_fusion_attention": "attention", "npu_fusion_attention_grad": "attention's gradient"}  # fmt: skip
order = [
    str(n.target).split(".")[1] for n in shared.program.graph.nodes if n.op == "call_function" and "." in str(n.target)
]
print(" > ".join(MARKS[op] for op in order if op in MARKS))
assert order.count("all_gather_into_tensor") == 2 * cfg.layers + 2
assert order.count("reduce_scatter_tensor") == cfg.layers + 2

# %% [markdown]
# ## And then
#
# `python -m lumina_fn.export MODEL OUT --what step --target npu` writes such a program for a model's folder, with a report of its ops. What this notebook cannot do is in
# `make ascend-test`: there torch_npu's own converters turn these programs into graphs of Ascend's engine (GE), with `FlashAttentionScore` and `HcomAllGather` in them, and the NPU's
# kernels are computed on a CPU and compared. No NPU has run them there either: that is `make npu-check`'s to say.
