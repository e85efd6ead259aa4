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
# # Tokens and pictures
#
# A picture becomes a grid of codes, the codes become tokens of the language model's vocabulary, and back. The small model that comes with the project is used;
# the released one works the same way.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from experiments.demo import grader, shapes
from lumina_fn import checkpoint, data, images, prompt, sample, vocab, vq

home = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "pyproject.toml").exists())
assets = home / "experiments/demo/assets"
tokenizer = prompt.load_tokenizer(assets / "lm")
vq_params, vq_cfg = checkpoint.load_vq(assets / "vq")
ids = tokenizer.ids


def show(pictures, titles):
    _, axes = plt.subplots(1, len(pictures), figsize=(2.2 * len(pictures), 2.6), squeeze=False)
    for axis, picture, title in zip(axes[0], pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    plt.show()


# %% [markdown]
# ## A picture is cut to a size
#
# About target x target pixels whatever its shape, sides in multiples of 32. A wide picture stays wide.

# %%
print("sizes (width, height) for 128:", images.crop_sizes(128))
wide = Image.linear_gradient("L").resize((300, 140)).convert("RGB")
print(wide.size, "->", images.fit(wide, 128).size)

# %% [markdown]
# ## Pixels to codes
#
# MoVQGAN looks at cells of 8 x 8 pixels and names each by the nearest row of its codebook: 64 x 64 pixels are 8 x 8 codes.

# %%
spec = shapes.Spec("heart", "red", "white", "in the middle")
caption, picture = shapes.caption(spec), Image.fromarray(shapes.draw(spec))
image = images.to_tensor(images.fit(picture, shapes.SIZE))[None]
codes = vq.encode(vq_params, image, vq_cfg)[0]
print(caption)
print(codes)

# %% [markdown]
# And back. The difference is what the codes cannot say.

# %%
again = vq.pixels(vq.decode(vq_params, codes[None], vq_cfg))[0].numpy()
show([picture, again], ["drawn", "through 64 codes"])
print("the grader reads:", grader.read(again))

# %% [markdown]
# ## Codes to tokens
#
# An image is `start`, its height and width in patches of 32 pixels (height first), rows of codes that each end in `newline`, and `end`.
# Before it stands the prompt, which is not predicted: its labels are -100. After it stands a separator.

# %%
image_ids = vocab.image_tokens(codes.tolist(), ids)
item_ids, labels = data.training_item(tokenizer, caption, codes, with_size=True)
print(prompt.prompt_text(caption, 64, 64, with_size=True))
print(len(item_ids), "tokens, of which", sum(label != vocab.IGNORE for label in labels), "are predicted")
assert vocab.image_codes(image_ids, ids) == codes.tolist()
assert item_ids[-len(image_ids) - 1 : -1] == image_ids

# %% [markdown]
# ## Tokens to pictures
#
# The model draws one code after another. What may follow is known at every place (`vocab.allowed`), so a picture is always well formed.
# With guidance g the scores are g (c - u) + u: c with the prompt, u without.

# %%
params, cfg = checkpoint.load_model(assets / "lm")
print("after start and 2 + 8 tokens may follow:", vocab.allowed(10, 8, 8, ids), "which is newline:", ids.newline)
how = sample.Sampling(height=64, width=64, guidance=1.5, temperature=0.5, min_p=0.05, seed=0)
drawn = sample.generate_many(
    params, [prompt.prompt_ids(tokenizer, caption, 64, 64)], cfg, how, n=4, pace=sample.Pace(batch=4)
)[0]
with torch.no_grad():
    pictures = vq.pixels(vq.decode(vq_params, drawn, vq_cfg)).numpy()
show(pictures, ["exact" if grader.grade(p, spec) else "not exact" for p in pictures])
