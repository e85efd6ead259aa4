"""A small model's step as `plan` describes it, really taken."""

import torch
import torch.distributed as dist

from lumina_fn import model, sharding, train
from lumina_fn.config import ModelConfig
from lumina_fn.costs.cost import Setup

TINY = ModelConfig(vocab=96, width=32, layers=5, heads=4, kv_heads=2, hidden=48)
STRATEGIES = [
    ("fsdp", None),
    ("sdp", None),
    ("no", None),
    ("hybrid", 1),
    ("hybrid_zero2", 2),
]  # of two, with shard sizes


def step_of(rank: int, size: int, cfg: ModelConfig, setup: Setup):
    """A real step, its state and its batch."""
    mesh = None
    if size > 1:
        mesh = sharding.Mesh(
            dist.group.WORLD, rank, size, "cpu", setup.strategy, setup.param_dtype, setup.reduce_dtype, setup.shard_size
        )
    step = train.make_train_step(
        cfg, train.AdamW(), mesh, dtype=setup.dtype, compile="blocks" if setup.compiled else "off", remat=setup.remat,
        donate=True, sync=setup.sync,
    )  # fmt: skip
    state = train.init_state(model.init(cfg), train.AdamW(), mesh)
    tokens = torch.randint(cfg.vocab, (setup.micro_batches, setup.micro_batch, setup.tokens))
    return step, state, train.Batch(tokens, tokens.clone())
