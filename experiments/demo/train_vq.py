"""Train the embedded default's picture tokenizer: MoVQGAN's architecture, 1.1 M parameters, on drawn pictures of every shape.

    OMP_NUM_THREADS=1 python -m experiments.demo.train_vq --out runs/vq

Resumes from OUT/state.safetensors and ends with the folder OUT/model. It sees the new shape too: it learns to draw patches, never a word.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional as F

from experiments.demo import muon, progress, shapes
from experiments.demo.grader import grade
from lumina_fn import checkpoint, vq
from lumina_fn.config import VQConfig
from lumina_fn.process import entry
from lumina_fn.process.flags import parse


@dataclass(frozen=True)
class Settings:
    out: Path = Path("runs/vq")
    steps: int = 2400
    seed: int = 0
    batch: int = 8
    matrix_lr: float = 0.01  # of Muon; both fall linearly to 0
    lr: float = 1.5e-3  # of Adam
    codes: int = 512
    crop: int = 40  # pixels: most steps see a window around the object, which costs less than half
    crop_until: float = 0.75  # of the steps
    quantize_from: int = 60  # steps without the codebook, before it starts at their k-means
    revive_until: float = 0.7  # of the steps; afterwards the codebook only settles
    average_from: float = 0.8  # of the steps; the result is a running average of the weights
    commitment: float = 0.25
    merge: float = 0.15  # codes closer than this become one: the language model then has fewer to tell apart
    log_every: int = 20
    save_every: int = 200


class State(NamedTuple):
    step: Tensor
    params: vq.Params
    mu: vq.Params
    nu: vq.Params
    average: vq.Params
    uses: Tensor  # [N] running mean of how often a code is used in a step
    sums: Tensor  # [N E] running mean of what it then stands for


def config(codes: int) -> VQConfig:
    # 8 groups, not 32: with 32 channels those would be one channel each and would wash out flat colours.
    return VQConfig(channels=32, multipliers=(1, 1, 2, 2), res_blocks=1, attn_levels=(3,), codes=codes, groups=8)


def to_unit(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def window(spec: shapes.Spec, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square of `size` pixels, on whole cells, around the object."""
    corner = [
        8 * rng.integers(max(0, c - size + 16) // 8, min(shapes.SIZE - size, c - 16) // 8 + 1)
        for c in shapes.POSITIONS[spec.position]
    ]
    return shapes.draw(spec)[corner[1] : corner[1] + size, corner[0] : corner[0] + size]


def objective(params: vq.Params, image: Tensor, cfg: VQConfig, commitment: float, quantized: bool):
    """The reconstruction's loss, straight through the quantizer; the codebook itself follows by running means."""
    z = vq.latent(params, image, cfg)
    codes = vq.nearest(params.codebook, z.detach())
    nearest = vq.lookup(params.codebook, codes).detach()
    zq, commit = (z + (nearest - z).detach(), F.mse_loss(z, nearest)) if quantized else (z, z.square().mean() * 0)
    off = vq.decode_latent(params, zq, cfg) - image
    edges = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
    square = off.square().mean()
    return off.abs().mean() + square + 0.5 * edges + commitment * commit, (square, z, codes)


def gradients(params: vq.Params, *args):
    """The objective's gradient by torch.autograd: a quarter less time than torch.func.grad, which takes group norms apart."""
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss, (square, z, codes) = objective(pytree.tree_unflatten(leaves, spec), *args)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)  # the codebook takes no part
    return pytree.tree_unflatten(grads, spec), (square.detach(), z.detach(), codes)


def k_means(points: Tensor, n: int, generator: torch.Generator, rounds: int = 8) -> Tensor:
    """n centres among points [P E]; an empty one restarts at a random point."""
    draw = lambda n: points[torch.randint(len(points), (n,), generator=generator)]
    centres = draw(n) + 0.01 * points.std(0) * torch.randn(n, points.shape[1], generator=generator)
    for _ in range(rounds):
        own = torch.cdist(points, centres).argmin(1)
        size = torch.bincount(own, minlength=n)[:, None]
        centres = torch.where(
            size > 0, torch.zeros_like(centres).index_add(0, own, points) / size.clamp(min=1), draw(n)
        )
    return centres


def follow(
    state: State, z: Tensor, codes: Tensor, revive: bool, generator: torch.Generator, decay: float = 0.98
) -> State:
    """The codebook moves to the running mean of the latents it stands for; unused codes restart at badly served latents."""
    rows, own = z.permute(0, 2, 3, 1).flatten(0, 2), codes.flatten()
    uses = decay * state.uses + (1 - decay) * torch.bincount(own, minlength=len(state.uses))
    sums = decay * state.sums + (1 - decay) * torch.zeros_like(state.sums).index_add(0, own, rows)
    dead = (uses < 0.01).nonzero()[:, 0]
    if revive and len(dead):
        far = (rows - state.params.codebook[own]).square().sum(1).clamp(min=1e-8)
        dead = dead[: len(rows)]
        uses[dead], sums[dead] = 0.02, 0.02 * rows[torch.multinomial(far, len(dead), generator=generator)]
    codebook = torch.where(uses[:, None] > 1e-6, sums / uses[:, None].clamp(min=1e-6), state.params.codebook)
    return state._replace(params=state.params._replace(codebook=codebook), uses=uses, sums=sums)


def step(state: State, specs: list[shapes.Spec], s: Settings, cfg: VQConfig) -> tuple[State, dict[str, float]]:
    n = int(state.step)
    part = n / s.steps
    rng, generator = np.random.default_rng((s.seed, n)), torch.Generator().manual_seed(s.seed * s.steps + n)
    chosen = [specs[i] for i in rng.integers(len(specs), size=s.batch)]
    image = to_unit([window(c, s.crop, rng) if part < s.crop_until else shapes.draw(c) for c in chosen])
    if n == s.quantize_from:
        with torch.no_grad():
            many = to_unit([shapes.draw(specs[i]) for i in rng.integers(len(specs), size=128)])
            points = vq.latent(state.params, many, cfg).permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)
        codebook = k_means(points, s.codes, generator)
        state = state._replace(
            params=state.params._replace(codebook=codebook), uses=torch.full((s.codes,), 0.1), sums=0.1 * codebook
        )
    grads, (square, z, codes) = gradients(state.params, image, cfg, s.commitment, n >= s.quantize_from)
    pace = min(1, (n + 1) / 20) * (1 - part)
    params, mu, nu = muon.update(state.params, grads, (state.mu, state.nu), n, pace * s.matrix_lr, pace * s.lr)
    state = state._replace(step=state.step + 1, params=params, mu=mu, nu=nu)
    if n >= s.quantize_from:
        state = follow(state, z, codes, part < s.revive_until, generator)
    keep = 0.99 if part >= s.average_from else 0.0
    average = pytree.tree_map(lambda a, p: keep * a + (1 - keep) * p, state.average, state.params)
    psnr = 10 * torch.log10(4 / square)
    return state._replace(average=average), {"psnr": psnr.item(), "codes": int((state.uses > 0.01).sum())}


def start(s: Settings, cfg: VQConfig) -> State:
    params = vq.init(cfg, seed=s.seed)
    fresh = lambda like: pytree.tree_map(like, params)
    zeros = lambda *shape: torch.zeros(shape)
    moments = fresh(torch.zeros_like), fresh(torch.zeros_like)
    step = torch.zeros((), dtype=torch.int64)
    return State(step, params, *moments, fresh(torch.clone), zeros(s.codes), zeros(s.codes, cfg.embed))


@torch.no_grad()
def compact(params: vq.Params, codes: Tensor, radius: float) -> vq.Params:
    """The codebook without rows that `codes` do not use, and with one row, the most used, for all within `radius` of it."""
    book, uses = params.codebook, torch.bincount(codes.flatten(), minlength=len(params.codebook))
    near = torch.cdist(book, book) < radius
    kept, gone = [], uses == 0
    for i in uses.argsort(descending=True, stable=True).tolist():
        if not gone[i]:
            kept.append(i)
            gone = gone | near[i]
    return params._replace(codebook=book[kept])


@torch.no_grad()
def finish(state: State, cfg: VQConfig, s: Settings, specs: list[shapes.Spec]) -> dict[str, float]:
    """Save the averaged parameters as they will be read, in bfloat16; how well they redraw every picture."""
    params = pytree.tree_map(lambda p: p.bfloat16().float(), state.average)
    pictures = [shapes.draw(spec) for spec in specs]
    parts = [to_unit(pictures[i : i + 32]) for i in range(0, len(pictures), 32)]
    latents = [vq.latent(params, part, cfg) for part in parts]
    params = compact(params, torch.cat([vq.nearest(params.codebook, z) for z in latents]), s.merge)
    cfg = replace(cfg, codes=len(params.codebook))
    codes = [vq.nearest(params.codebook, z) for z in latents]
    drawn = np.concatenate([vq.pixels(vq.decode(params, c, cfg)).numpy() for c in codes])
    exact = np.mean([grade(picture, spec) for picture, spec in zip(drawn, specs, strict=True)])
    psnr = 10 * np.log10(255**2 / np.square(drawn.astype(float) - np.stack(pictures)).mean())
    checkpoint.save_vq(s.out / "model", pytree.tree_map(lambda p: p.bfloat16(), params), cfg, overwrite=True)
    return {"exact": float(exact), "psnr": float(psnr), "codes": cfg.codes}


def main(argv: Sequence[str] | None = None) -> None:
    s = parse(Settings, __doc__, argv)
    cfg, path = config(s.codes), s.out / "state.safetensors"
    s.out.mkdir(parents=True, exist_ok=True)
    state, seconds = progress.restore(path, start(s, cfg))
    specs = list(chain.from_iterable(shapes.specs(shape) for shape in shapes.SHAPES))
    begun = time.time() - seconds
    while (n := int(state.step)) < s.steps:
        state, metrics = step(state, specs, s, cfg)
        if n % s.log_every == 0:
            shown = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{n} {time.time() - begun:.0f} s {shown}", flush=True)
        if (n + 1) % s.save_every == 0 or n + 1 == s.steps:
            progress.store(path, state, time.time() - begun)
    result = {"seconds": round(time.time() - begun), **finish(state, cfg, s, specs)}
    print(json.dumps(result | {name: str(value) for name, value in asdict(s).items()}))


if __name__ == "__main__":
    entry.run(main)
