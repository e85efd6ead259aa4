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
# # The model as a function
#
# `model.forward(params, tokens, cfg)` is all there is: `params` is a tree of tensors, `cfg` holds sizes, and nothing is hidden in an object.
# So the transforms of `torch.func` apply, and questions about the model become expressions.

# %%
import matplotlib.pyplot as plt
import torch
from torch.func import grad, jacrev, vmap

from lumina_fn import model, train
from lumina_fn.config import LUMINA_7B, ModelConfig
from lumina_fn.formats import names

cfg = ModelConfig(vocab=384, width=64, layers=2, heads=4, kv_heads=2, hidden=160, max_positions=64)
params = model.init(cfg, seed=0)

# %% [markdown]
# ## Shapes
#
# A tree has a path for every tensor. One letter per axis everywhere: B batch, T time, D width, H heads, K head width, F hidden, V vocabulary.

# %%
for path, leaf in names.flatten(params).items():
    print(f"{path:24} {list(leaf.shape)}")

# %% [markdown]
# On the device `meta` a tree has shapes and no numbers: the released model's can be asked for on any machine.

# %%
released = names.flatten(model.init(LUMINA_7B, device="meta"))
print(len(released), "tensors,", f"{sum(leaf.numel() for leaf in released.values()):,} parameters")

# %%
tokens = torch.randint(cfg.vocab, (3, 12), generator=torch.Generator().manual_seed(0))
print("tokens [B T]", list(tokens.shape), "-> logits [B T V]", list(model.forward(params, tokens, cfg).shape))

# %% [markdown]
# ## Causality, by gradient
#
# Which positions does a prediction depend on? Take a sentence whose tokens are 0, 1, 2, ...: then row s of the embedding is read at position s alone,
# and the derivative of the logits at t by that row says how much t sees of s. `jacrev` gives all of them at once.

# %%
T = 12


def seen(embed):
    """One number per position, of all its logits."""
    return model.forward(params._replace(embed=embed), torch.arange(T)[None], cfg)[0].square().sum(-1)


sight = jacrev(seen)(params.embed)[:, :T].norm(dim=-1)  # [t s]
plt.imshow(sight.log10().clamp(min=-6))
plt.xlabel("s, the position that is seen")
plt.ylabel("t, the position that predicts")
plt.title("log10 of the derivative")
plt.show()

assert (sight.triu(1) == 0).all(), "a position sees the future"
assert (sight.tril() > 0).sum() == T * (T + 1) / 2, "a position does not see its past"

# %% [markdown]
# ## A gradient for every sample, by vmap
#
# `grad` of the loss of one sample, mapped over the samples. Only the tokens have a samples' axis S; the parameters are shared.


# %%
def loss_of_one(params, tokens):
    return train.loss(params, train.Batch(tokens[None], tokens[None]), cfg)[0]


per_sample = vmap(grad(loss_of_one), in_dims=(None, 0))(params, tokens)
print(
    "head.unembed [V D]",
    list(params.head.unembed.shape),
    "-> its gradients [S V D]",
    list(per_sample.head.unembed.shape),
)

# %% [markdown]
# Samples that predict equally many tokens: the mean of their gradients is the gradient of the batch.

# %%
whole = grad(lambda p: train.loss(p, train.Batch(tokens, tokens), cfg)[0])(params)
off = max(
    (mine.mean(0) - all_).abs().max()
    for mine, all_ in zip(names.flatten(per_sample).values(), names.flatten(whole).values(), strict=True)
)
print(f"largest difference {off:.1e}")
assert off < 1e-6

# %% [markdown]
# What they are good for: each sample's norm (which one is odd?), and the noise of a gradient, the ratio of the samples' variance to the mean's square.
# It says how large a batch is worth its cost.

# %%
rows = torch.cat([leaf.flatten(1) for leaf in names.flatten(per_sample).values()], 1)  # [S parameters]
print("norms", [f"{norm:.3f}" for norm in rows.norm(dim=1)])
print(f"noise scale {rows.var(0).sum() / rows.mean(0).square().sum():.1f} samples")
