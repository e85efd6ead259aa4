"""Muon for convolutions: momentum made orthogonal, Adam for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

On the demo's tokenizer 150 steps of it reach what 1700 steps of Adam at twice the batch did.
"""

import torch
import torch.utils._pytree as pytree
from jaxtyping import Float
from torch import Tensor

MOMENTUM, B1, B2, EPS = 0.9, 0.9, 0.99, 1e-8
QUINTIC = 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration


def orthogonal(g: Float[Tensor, "O K"], rounds: int = 5) -> Float[Tensor, "O K"]:
    """About U V' of g = U S V'."""
    a, b, c = QUINTIC
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def is_matrix(leaf: Tensor) -> bool:
    """A convolution with more inputs than an embedding of the latent has."""
    return leaf.ndim == 4 and leaf[0].numel() > 8


@torch.no_grad()
def update(params, grads, moments, step: int, matrix_lr: float, lr: float):
    """New (params, mu, nu) after the step-th update, counted from 0; the given trees are written over."""
    mu, nu = moments
    for p, g, m, v in zip(*map(pytree.tree_leaves, (params, grads, mu, nu)), strict=True):
        if is_matrix(p):
            m.mul_(MOMENTUM).add_(g)
            turned = orthogonal((g + MOMENTUM * m).flatten(1)).view_as(p)
            p.sub_(turned, alpha=matrix_lr * max(1, p.shape[0] / p[0].numel()) ** 0.5)
        else:
            m.lerp_(g, 1 - B1)
            v.lerp_(g * g, 1 - B2)
            deviation = (v / (1 - B2 ** (step + 1))).sqrt_().add_(EPS)
            p.addcdiv_(m, deviation, value=-lr / (1 - B1 ** (step + 1)))
    return params, mu, nu
