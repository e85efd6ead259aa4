"""How a model is trained, and what that takes by arithmetic: FLOPs, bytes between devices, and a bound on those in memory."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.utils._pytree as pytree

from kernels import reference
from lumina_fn import model
from lumina_fn.config import ModelConfig
from lumina_fn.sharding import Mesh

REMAT_FROM = 10**9  # parameters: from here on activations are what does not fit


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as `make_train_step` and its mesh are told; the step writes over its state."""

    devices: int = 1  # one has no mesh
    strategy: str = "fsdp"
    shard_size: int | None = None  # of the hybrids
    tokens: int = 1024  # T
    micro_batch: int = 1  # B
    micro_batches: int = 1  # A
    dtype: torch.dtype = torch.float32  # of compute
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    remat: bool = False
    compiled: bool = False  # the blocks
    sync: bool = True
    forward_prefetch: bool = False
    backward_prefetch: bool = False
    cpu: bool = False  # where a part is received before it is added, and malloc keeps some of what is freed

    @property
    def mesh(self) -> Mesh | None:
        """Rank 0's, with groups that nobody formed: of tensors without storage no byte is sent."""
        if self.devices == 1:
            return None
        if not self.strategy.startswith("hybrid"):
            return Mesh("none", 0, self.devices, "meta", self.strategy, self.param_dtype, self.reduce_dtype)
        within = "fsdp" if self.strategy == "hybrid" else "sdp"
        mesh = Mesh("none", 0, self.shard_size, "meta", within, self.param_dtype, self.reduce_dtype)
        object.__setattr__(mesh, "replicas", ("none", self.devices // self.shard_size))
        return mesh

    @property
    def masters(self) -> torch.dtype:
        """Of the parameters that are kept, and of AdamW's moments."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def keeps_inputs(self) -> bool:
        """Whether a block keeps only its input."""
        return self.remat or (not self.compiled and self.mesh is not None and self.mesh.regathers)


def parameters(cfg: ModelConfig) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(model.init(cfg, device="meta")))


def flops(cfg: ModelConfig, tokens: int) -> int:
    """The model's FLOPs per token of a training step over sequences of `tokens`.

    That is 6 for each parameter that multiplies (the embedding is looked up), and 6 L D T for causal attention.
    """
    return 3 * (cfg.layers * _block_flops(cfg, tokens) + 2 * cfg.vocab * cfg.width)


def recomputed_flops(cfg: ModelConfig, tokens: int) -> int:
    """What keeping only the blocks' inputs adds to them, per token: their forward once more."""
    return cfg.layers * _block_flops(cfg, tokens)


def _block_flops(cfg: ModelConfig, tokens: int) -> int:
    """Of a block's forward, per token: 2 for each parameter of its matrices, 2 D T for half of the scores and of what they weigh."""
    K, D = cfg.head_width, cfg.width
    matrices = 2 * cfg.heads * K * D + 2 * cfg.kv_heads * K * D + 3 * cfg.hidden * D
    return 2 * matrices + 2 * cfg.heads * K * tokens


def most_memory(cfg: ModelConfig, setup: Setup) -> int:
    """Bytes that a step on one device stays below, by arithmetic alone; `footprint.peak` says how many it holds, mostly half or less."""
    size, tokens = setup.masters.itemsize, setup.micro_batch * setup.tokens
    parts = 16 * parameters(cfg)  # masters, moments, gradients, gathered and summed ones: of each at most two
    wide = cfg.width + cfg.hidden + (cfg.heads + cfg.kv_heads) * cfg.head_width
    blocks = tokens * (8 * wide * (cfg.layers + 4) + 8 * cfg.heads * setup.tokens)  # of one the scores, written out
    loss = 8 * (min(tokens, 2 * reference.CHUNK) * cfg.vocab + tokens * cfg.width)
    return size * (parts + blocks + loss)


class Traffic(NamedTuple):
    """What a step's collectives of one kind move."""

    kind: Literal["gathers forward", "gathers backward", "reduce-scatters", "all-reduces"]
    size: int  # bytes of the whole vectors
    ranks: int  # that share them
    stride: int  # from one of those to the next


def traffic(cfg: ModelConfig, setup: Setup) -> list[Traffic]:
    """A step's collectives over parameters and gradients."""
    mesh = setup.mesh
    if mesh is None:
        return []
    units = model.init(cfg, device="meta")
    count = lambda tree: sum(leaf.numel() for leaf in pytree.tree_leaves(tree))
    (_, shards), (_, replicas) = mesh.shards, mesh.replicas
    reductions = setup.micro_batches if setup.sync else 1
    whole, reduced = setup.micro_batches * setup.param_dtype.itemsize, reductions * setup.reduce_dtype.itemsize
    moved = [
        Traffic("gathers forward", count(units) * whole, shards, 1),
        Traffic("gathers backward", count(units.blocks) * whole * mesh.regathers, shards, 1),
        Traffic("reduce-scatters", count(units) * reduced, shards, 1),
        Traffic("all-reduces", count(units) * reduced // shards, replicas, shards),
    ]
    return [one for one in moved if one.size and one.ranks > 1]


def whole_units(cfg: ModelConfig, setup: Setup) -> int:
    """How many units are gathered, or cast, at once at the most."""
    mesh = setup.mesh
    dtype = setup.dtype if mesh is None else setup.param_dtype
    if dtype == setup.masters and (mesh is None or mesh.shards[1] == 1):
        return 0
    if mesh is None or not mesh.regathers:
        return cfg.layers + 1  # the blocks, which wait for their backward, and the head
    return 1 + (setup.forward_prefetch or setup.backward_prefetch)
