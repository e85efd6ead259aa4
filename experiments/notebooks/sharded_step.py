"""A training step on a mesh as one rank computes it; notebook 4 runs it in several processes."""

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from lumina_fn import model, sharding, train
from lumina_fn.config import ModelConfig


def step(rank: int, size: int, cfg: ModelConfig, shards: Tensor, strategy: str) -> tuple[list[Tensor], int]:
    """The whole parameters' leaves after one float64 step on shards [S B T] of tokens, and how many of their numbers this rank holds."""
    mesh = sharding.Mesh(dist.group.WORLD, rank, size, "cpu", strategy, torch.float64, torch.float64)
    opt = train.AdamW(lr=1e-2, decay=0.1, clip=0.5)
    state = train.init_state(model.init(cfg, dtype=torch.float64), opt, mesh)
    state, _ = train.make_train_step(cfg, opt, mesh)(state, train.Batch(shards[rank], shards[rank]))
    whole = model.over_units(lambda unit: sharding.unshard(unit, mesh), state.params)
    return pytree.tree_leaves(whole), sum(part.numel() for part in pytree.tree_leaves(state.params))
