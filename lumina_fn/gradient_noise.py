"""The gradient of each shard or sample, by vmap, and the gradient noise scale.

The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162) is the batch size at which a gradient's noise is as large
as the gradient itself: below it, a larger batch saves steps in proportion; far above it, it saves none.
"""

import torch
import torch.utils._pytree as pytree
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, vmap

from lumina_fn.config import ModelConfig
from lumina_fn.loss import Batch, loss
from lumina_fn.model import Params


def shard_gradients(
    params: Params, shards: Batch, cfg: ModelConfig, *, z_weight: float = 1e-5, count: Tensor | int | None = None
) -> tuple[Params, Float[Tensor, " S"]]:
    """Each shard's gradient [S ..] and loss, for a batch [S B T]: sums over predicted tokens / count (None: each shard's own).

    With the count of all shards together they add up to the whole batch's gradient, as on N ranks. All gradients are in memory at once.
    """
    objective = lambda p, batch: loss(p, batch, cfg, z_weight=z_weight, count=count)[0]
    return vmap(grad_and_value(objective), in_dims=(None, 0))(params, Batch(*shards))


def sample_norms(params: Params, batch: Batch, cfg: ModelConfig, *, z_weight: float = 1e-5) -> Float[Tensor, " B"]:
    """For each sample of a batch [B T], the norm of the gradient of its mean loss."""
    grads, _ = shard_gradients(params, Batch(*(x[:, None] for x in batch)), cfg, z_weight=z_weight)
    return torch.linalg.vector_norm(torch.stack([g.flatten(1).norm(dim=1) for g in pytree.tree_leaves(grads)]), dim=0)


def square(grads) -> Float[Tensor, ""]:
    """The squared norm of a tree, in float32 or wider."""
    wide = lambda g: g if g.dtype == torch.float64 else g.float()
    return torch.stack([wide(g).square().sum() for g in pytree.tree_leaves(grads)]).sum()


def piece(squares: list[Tensor], share: Float[Tensor, ""]) -> Float[Tensor, "2"]:
    """A micro batch's terms of `squares` and `pieces` in `noise_and_signal`, from its units' squared gradients and its share of the tokens."""
    some = share > 0
    return torch.stack([torch.where(some, sum(squares) / share, 0.0), some.to(share.dtype)])


def noise_and_signal(
    squares: Float[Tensor, ""], pieces: Float[Tensor, ""], whole: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Unbiased estimates of a batch gradient's variance and of the true gradient's squared norm, from its pieces'.

    A piece g_k predicts the share w_k of the batch's tokens, and the g_k add up to the batch's gradient, of squared norm
    `whole`. `squares` is the sum of |g_k|^2 / w_k over the `pieces` pieces. The noise scale is noise / signal batches, both
    averaged over steps first. NaN for a single piece.
    """
    noise = (squares - whole) / (pieces - 1)
    noise = torch.where(pieces > 1, noise, torch.nan)
    return noise, whole - noise
