"""The same model under torch's own FullyShardedDataParallel and plain autograd: what our sharding is held against.

Its units are ours (the embedding, each block, the head), start from the same tensors and call the same functions.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn import functional as F

import ops
from lumina_fn.config import ModelConfig
from lumina_fn.loss import Batch, predicted
from lumina_fn.model import Head, Params, block, rope
from lumina_fn.optim import AdamW
from lumina_fn.vocab import IGNORE

Z_WEIGHT = 1e-5  # train.make_train_step's default

STRATEGIES = {
    "fsdp": ShardingStrategy.FULL_SHARD,
    "sdp": ShardingStrategy.SHARD_GRAD_OP,
    "no": ShardingStrategy.NO_SHARD,
}


class Unit(nn.Module):
    """A unit's leaves as a module's parameters; forward(*args) is fn(unit, *args)."""

    def __init__(self, unit: Any, fn: Callable[..., Tensor]):
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(unit)
        self.leaves, self.fn = nn.ParameterList(leaf.clone() for leaf in leaves), fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(pytree.tree_unflatten(list(self.leaves), self.spec), *args)


class Model(nn.Module):
    """forward(tokens, labels, count) is the loss over `count`."""

    def __init__(
        self, params: Params, cfg: ModelConfig, wrap: Callable[[nn.Module], nn.Module], *, z_weight: float, remat: bool
    ):
        super().__init__()
        keep = checkpoint_wrapper if remat else lambda unit: unit
        layer = lambda p, x, angles: block(p, x, angles, cfg)[0]
        self.cfg = cfg
        self.embed = wrap(Unit(params.embed, lambda table, tokens: F.embedding(tokens, table)))
        self.blocks = nn.ModuleList(wrap(keep(Unit(p, layer))) for p in params.blocks)
        self.head = wrap(Unit(params.head, partial(_head_loss, cfg=cfg, z_weight=z_weight)))

    def forward(self, tokens: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        x, angles = self.embed(tokens), rope(torch.arange(tokens.shape[1]), self.cfg)
        for layer in self.blocks:
            x = layer(x, angles)
        return self.head(x, labels, count)


def _head_loss(p: Head, x: Tensor, labels: Tensor, count: Tensor, *, cfg: ModelConfig, z_weight: float) -> Tensor:
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    normed = ops.rms_norm(x, p.norm, cfg.eps).flatten(0, 1)
    return ops.linear_cross_entropy(normed, p.unembed, targets, count, z_weight=z_weight, masked=cfg.masked_ids)[0]


def make_step(
    params: Params, cfg: ModelConfig, opt: AdamW, strategy: str, *,
    remat: bool = False, sync: bool = True,
) -> Callable[[Batch], tuple[Tensor, Tensor]]:  # fmt: skip
    """step(batch) -> (loss, gradient norm) as train.make_train_step's, on the default process group. It keeps the state itself."""
    wrap = partial(
        FullyShardedDataParallel,
        sharding_strategy=STRATEGIES[strategy],
        device_id=torch.device("cpu"),
        backward_prefetch=None,  # nothing overlaps on a CPU: the unit that is gathered ahead would only take memory
    )
    model = wrap(Model(params, cfg, wrap, z_weight=Z_WEIGHT, remat=remat))
    optimizer = torch.optim.AdamW(
        model.parameters(), opt.lr, (opt.b1, opt.b2), opt.eps, weight_decay=opt.decay, fused=True
    )

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        micro = [Batch(*b) for b in zip(*batch, strict=True)] if batch.tokens.ndim == 3 else [batch]
        count, total = predicted(batch.labels, cfg), torch.zeros(())
        dist.all_reduce(count)
        for i, (tokens, labels) in enumerate(micro, 1):
            with nullcontext() if sync or i == len(micro) else model.no_sync():
                part = model(tokens, labels, count)
                (part * dist.get_world_size()).backward()  # FSDP takes the mean over ranks
            total += part.detach()
        norm = model.clip_grad_norm_(opt.clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return total, norm

    return step
