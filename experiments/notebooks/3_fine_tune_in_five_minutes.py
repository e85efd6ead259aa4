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
# # Fine-tune in five minutes
#
# The small model knows circles, squares, triangles, crosses and hearts. It has never seen a star. This is `make demo` by hand, in functions: no command, no file.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from experiments.demo import grader, shapes, splits
from lumina_fn import checkpoint, data, optim, prompt, sample, train, vq

STEPS, BATCH = 300, 32
home = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "pyproject.toml").exists())
assets = home / "experiments/demo/assets"
tokenizer = prompt.load_tokenizer(assets / "lm")
params, cfg = checkpoint.load_model(assets / "lm")
vq_params, vq_cfg = checkpoint.load_vq(assets / "vq")

# %% [markdown]
# ## Pictures and captions to items
#
# 160 stars, and 800 pictures of shapes that the model knows: a model that sees only stars forgets the rest.

# %%
specs = splits.fine_tuning()
pixels = torch.from_numpy(np.stack([shapes.draw(spec) for spec in specs])).permute(0, 3, 1, 2).float() / 127.5 - 1
with torch.no_grad():
    codes = torch.cat([vq.encode(vq_params, part, vq_cfg) for part in pixels.split(32)])
items = [data.training_item(tokenizer, shapes.caption(s), c, with_size=True) for s, c in zip(specs, codes, strict=True)]
print(len(items), "items of", len(items[0][0]), "tokens;", shapes.caption(specs[0]))

# %% [markdown]
# ## Before
#
# Eight prompts that no training sees. A picture counts if the grader reads its shape, both colours and its place as the prompt says.

# %%
asked = splits.new_reported()[:8]


def draw(params):
    prompts = [prompt.prompt_ids(tokenizer, shapes.caption(spec), 64, 64) for spec in asked]
    how = sample.Sampling(height=64, width=64, guidance=1.5, temperature=0.5, min_p=0.05, seed=0)
    drawn = sample.generate_many(params, prompts, cfg, how, pace=sample.Pace(batch=8))[:, 0]
    with torch.no_grad():
        return vq.pixels(vq.decode(vq_params, drawn, vq_cfg)).numpy()


before = draw(params)
print(sum(map(grader.grade, before, asked)), "of", len(asked))

# %% [markdown]
# ## Training
#
# `step(state, batch) -> (state, metrics)`. Now and then an item loses its caption: that is what guidance needs.

# %%
opt = train.AdamW(lr=optim.cosine(1e-3, warmup=10, steps=STEPS))
step = train.make_train_step(cfg, opt)
state, losses = train.init_state(params, opt), []
for n in range(STEPS):
    epoch, k = divmod(n * BATCH, len(items))
    chosen = [int(i) for i in data.order(len(items), 0, epoch)[k : k + BATCH]]
    batch = [
        data.drop_caption(*items[i], tokenizer.ids.end) if data.drops_caption(0.1, 0, epoch, i) else items[i]
        for i in chosen
    ]
    state, metrics = step(state, data.batch(batch, max_positions=cfg.max_positions))
    losses.append(metrics["loss"])
plt.plot(torch.stack(losses))
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## After

# %%
after = draw(state.params)
print(sum(map(grader.grade, after, asked)), "of", len(asked))
figure, axes = plt.subplots(2, len(asked), figsize=(1.6 * len(asked), 3.6))
for row, pictures in zip(axes, (before, after), strict=True):
    for axis, picture, spec in zip(row, pictures, asked, strict=True):
        axis.imshow(picture)
        axis.set_title("exact" if grader.grade(picture, spec) else "not exact", fontsize=7)
        axis.axis("off")
plt.show()
