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
# # Sharding as vmap
#
# What do N processes compute, each on its share of a batch? The same function, N times, with different data: `vmap`. What do they exchange? A sum. So one
# line of `torch.func`, run in one process, is the specification of a cluster: `vmap(grad(loss))` over the shards, summed. This notebook follows that line
# from vmap to a mesh, and ends with a quantity that only the shards can tell: how noisy the gradient is.

# %%
import inspect

import matplotlib.pyplot as plt
import torch
import torch.utils._pytree as pytree
from torch.func import grad

from experiments.launching import processes
from experiments.notebooks import sharded_step
from lumina_fn import gradient_noise, loss, model, sharding, train
from lumina_fn.config import ModelConfig

cfg = ModelConfig(vocab=384, width=64, layers=2, heads=4, kv_heads=2, hidden=160, max_positions=64)
params = model.init(cfg, dtype=torch.float64)
tokens = torch.randint(
    cfg.vocab, (4, 2, 24), generator=torch.Generator().manual_seed(0)
)  # [S B T]: 4 shards of 2 samples
shards = train.Batch(tokens, tokens)
size_of = lambda tree: sum(leaf.numel() for leaf in pytree.tree_leaves(tree))

# %% [markdown]
# ## One function, four shards
#
# Each shard's loss is a sum over its predicted tokens, divided by the count of **all** shards' tokens. Then gradients simply add up, and it does not matter that
# shards predict different numbers of tokens. (Averaging the shards' means, as many trainers do, gives a different gradient for every number of devices.)

# %%
count = loss.predicted(shards.labels, cfg)
each, losses = gradient_noise.shard_gradients(params, shards, cfg, count=count)  # vmap(grad) over the first axis
whole = grad(lambda p: train.loss(p, train.Batch(*(x.flatten(0, 1) for x in shards)), cfg)[0])(params)
difference = max(
    (g.sum(0) - w).abs().max().item() for g, w in zip(*map(pytree.tree_leaves, (each, whole)), strict=True)
)
print(f"loss {losses.sum():.6f}; gradients of the shards, summed, differ from the whole batch's by {difference:.0e}")

# %% [markdown]
# ## One unit, four parts
#
# The other half of FSDP is where parameters live. A unit (the embedding, a block, the head) is flattened to one vector and cut: every rank keeps one part, with its part
# of AdamW's moments. `gather` makes the unit whole for as long as it is used. A `Mesh` names who shares what; to look at the cutting alone, no processes are needed.

# %%
block = params.blocks[0]
parts = [sharding.shard(block, sharding.Mesh("nobody", rank, 4)) for rank in range(4)]
print(
    f"a block has {size_of(block):,} numbers in {len(pytree.tree_leaves(block))} tensors, each part {len(parts[0].part):,}"
)
joined = sharding.unflatten(torch.cat([p.part for p in parts]), parts[0].layout)
print("joined again, equal:", all(map(torch.equal, pytree.tree_leaves(joined), pytree.tree_leaves(block))))

# %% [markdown]
# `gather` is differentiable, and its derivative is what a cluster does in the backward: gradients are summed over ranks and each keeps its part (a reduce-scatter). So a
# model that is sharded is trained by the same `loss`, with `gather` in its place. On a mesh of one rank that can be tried here.

# %%
alone = sharding.Mesh("nobody", 0, 1, param_dtype=torch.float64, reduce_dtype=torch.float64)
cut = model.over_units(lambda unit: sharding.shard(unit, alone), params)
batch = train.Batch(*(x.flatten(0, 1) for x in shards))
in_parts = grad(lambda p: train.loss(p, batch, cfg, gather=lambda unit: sharding.gather(unit, alone))[0])(cut)
print("the embedding's gradient, as one flat part:", list(in_parts.embed.part.shape), "from", list(whole.embed.shape))
print("equal:", torch.allclose(in_parts.embed.part, whole.embed.flatten(), rtol=1e-12))

# %% [markdown]
# ## Four processes
#
# Now for real: four processes, each with one shard of the batch and a quarter of the parameters, take a step. The oracle is the line above, and the optimizer.

# %%
print(inspect.getsource(sharded_step.step))

# %%
opt = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)
state, _ = train.make_train_step(cfg, opt)(train.init_state(params, opt), batch)  # one process, the whole batch
for strategy in ("fsdp", "sdp", "no"):
    leaves, kept = processes.run(4, sharded_step.step, cfg, tokens, strategy)[0]
    difference = max((a - b).abs().max().item() for a, b in zip(leaves, pytree.tree_leaves(state.params), strict=True))
    print(
        f"{strategy:5} a rank keeps {kept:7,} of {size_of(params):,} parameters; after a step they differ by {difference:.0e}"
    )

# %% [markdown]
# `fsdp` drops a gathered block after its forward and gathers it again for its backward; `sdp` keeps it in between; `no` keeps everything everywhere. Three ways of spending
# memory and messages, one result: that is what it means that the mesh is a vmap.
#
# ## What only the shards know
#
# With each shard's gradient at hand one can ask how much of the batch's gradient is signal. A piece's gradient is the true one plus noise that shrinks with its
# number of tokens; comparing the pieces' squared norms with the sum's separates the two. Their ratio is the *gradient noise scale*: the batch size
# beyond which more samples per step hardly save steps. `--noise-scale-every N` of `experiments.finetune` measures it while training, from the micro batches of all ranks, at no extra pass.

# %%
scales = []
text = torch.randint(
    cfg.vocab // 8, (16, 1, 24), generator=torch.Generator().manual_seed(1)
)  # 16 shards of a skewed vocabulary
learner = train.init_state(model.init(cfg), opt := train.AdamW(lr=3e-3))
steps = train.make_train_step(cfg, opt, noise=True)
for _ in range(20):
    learner, metrics = steps(learner, train.Batch(text, text))  # 8 micro batches of one sample
    scales.append((metrics["loss"].item(), metrics["noise"].item(), metrics["signal"].item()))
losses, noises, signals = zip(*scales, strict=True)
figure, left = plt.subplots(figsize=(6, 3))
left.plot(losses, color="tab:gray")
left.set(xlabel="step", ylabel="loss")
right = left.twinx()
right.plot([8 * n / s if s > 0 else float("nan") for n, s in zip(noises, signals, strict=True)], color="tab:orange")
right.set(ylabel="noise scale, samples", yscale="log")
plt.show()

# %% [markdown]
# Early on every sample says the same (the frequent tokens), and a small batch would do. The better the model, the more the samples disagree, and the more of them a step needs.
#
# The norms of single samples come from the same vmap. A picture whose norm stands out is worth a look: a wrong caption, perhaps.

# %%
norms = gradient_noise.sample_norms(learner.params, train.Batch(text.flatten(0, 1), text.flatten(0, 1)), cfg)
print("gradient norms of 8 samples:", [round(n, 2) for n in norms.tolist()])
