"""The training loss: next-token cross-entropy with a z-loss; and the gradients of the head in one pass."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vjp
from torch.nn import functional as F

import ops
from lumina_fn.config import ModelConfig
from lumina_fn.model import Head, Params, trunk
from lumina_fn.vocab import IGNORE


class Batch(NamedTuple):
    """Rows of token ids, and the label of each token."""

    tokens: Int[Tensor, "B T"]  # or [A B T]: A accumulated micro batches
    labels: Int[Tensor, "B T"]  # IGNORE where a token is not predicted


class Packed(NamedTuple):
    """A batch whose rows hold several documents; labels of a document's first token are IGNORE."""

    tokens: Int[Tensor, "B T"]  # or [A B T]
    labels: Int[Tensor, "B T"]
    first: Int[Tensor, "B T"]  # for each position, the position where its document starts


def predicted(labels: Tensor, cfg: ModelConfig) -> Int[Tensor, ""]:
    """The number of tokens that a batch predicts."""
    return (labels[..., 1 : cfg.max_positions] != IGNORE).sum()


def loss(
    params: Params, batch: Batch | Packed, cfg: ModelConfig, *, z_weight: float = 1e-5, count: Tensor | int | None = None,
    gather=lambda unit: unit, remat=lambda f: f,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Next-token cross-entropy + z_weight * z-loss, and both terms; sums over predicted tokens / count (None: this batch's own)."""
    tokens, labels, *first = batch
    count = predicted(labels, cfg).clamp(min=1) if count is None else torch.as_tensor(count, device=labels.device)
    x = trunk(params, tokens, cfg, *first, gather=gather, remat=remat)
    head = gather(params.head)
    total, ce, z = ops.linear_cross_entropy(
        _normed(head.norm, x, cfg), head.unembed, _targets(labels, x), count, z_weight=z_weight, masked=cfg.masked_ids
    )
    return total, {"ce": ce, "z": z}


def head_gradients(
    p: Head, x: Float[Tensor, "B T D"], labels: Int[Tensor, "B _"], cfg: ModelConfig, *, z_weight: float, count: Tensor
) -> tuple[Head, Tensor, Tensor]:
    """The gradients of the head and of x, and [loss, ce, z], by the fused pass alone: autograd would copy [V D] once more."""
    normed, pull = vjp(lambda gain, x: _normed(gain, x, cfg), p.norm, x)[:2]  # without has_aux there is no third
    ce, z, d_normed, d_unembed = ops.linear_cross_entropy_pass(
        normed, p.unembed, _targets(labels, x), count, z_weight, list(cfg.masked_ids)
    )
    d_norm, dx = pull(d_normed)
    return Head(d_norm, d_unembed), dx, torch.stack([ce + z_weight * z, ce, z])


def _normed(gain: Tensor, x: Tensor, cfg: ModelConfig) -> Float[Tensor, "N D"]:
    return ops.rms_norm(x, gain, cfg.eps).flatten(0, 1)


def _targets(labels: Tensor, x: Tensor) -> Int[Tensor, " N"]:
    """The next token of each position of x; the last position predicts nothing."""
    return F.pad(labels[:, 1 : x.shape[1]], (0, 1), value=IGNORE).flatten()
