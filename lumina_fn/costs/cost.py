"""How a model is trained, and its costs by arithmetic: FLOPs, bytes between devices, and an upper bound of memory."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.utils._pytree as pytree

from kernels import reference
from lumina_fn import model
from lumina_fn.config import ModelConfig
from lumina_fn.sharding import Mesh

REMAT_FROM = 10**9  # parameters, above which activations are what exceeds memory


@dataclass(frozen=True)
class Setup:
    """How a model is trained: the settings of `make_train_step` and of its mesh; the step overwrites its state (donate)."""

    devices: int = 1  # 1: no mesh
    strategy: str = "fsdp"
    shard_size: int | None = None  # for the hybrids
    tokens: int = 1024  # T
    micro_batch: int = 1  # B
    micro_batches: int = 1  # A
    dtype: torch.dtype = torch.float32  # of compute
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    remat: bool | int = False  # the number of blocks that are computed again; True: all
    compiled: bool = False  # the blocks
    sync: bool = True
    forward_prefetch: bool = False
    backward_prefetch: bool = False
    cpu: bool = False  # on a CPU a received part needs memory of its own, and malloc keeps some of the freed memory

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of rank 0 (None: one device). Its process groups do not exist: tensors without storage are never sent."""
        if self.devices == 1:
            return None
        if not self.strategy.startswith("hybrid"):
            return Mesh("none", 0, self.devices, "meta", self.strategy, self.param_dtype, self.reduce_dtype)
        within = "fsdp" if self.strategy == "hybrid" else "sdp"
        assert self.shard_size is not None, "a hybrid strategy has a shard size"
        mesh = Mesh("none", 0, self.shard_size, "meta", within, self.param_dtype, self.reduce_dtype)
        object.__setattr__(mesh, "replicas", ("none", self.devices // self.shard_size))
        return mesh

    @property
    def masters(self) -> torch.dtype:
        """The dtype of the master parameters and of AdamW's moments."""
        return torch.promote_types(self.dtype, torch.float32)

    def recomputed(self, cfg: ModelConfig) -> int:
        """The number of blocks, the first ones, that keep only their input for the backward."""
        eager = not self.compiled and self.mesh is not None and self.mesh.regathers
        return cfg.layers if self.remat is True or eager else min(int(self.remat), cfg.layers)


def parameters(cfg: ModelConfig) -> int:
    """The number of the model's parameters."""
    return sum(leaf.numel() for leaf in pytree.tree_leaves(model.init(cfg, device="meta")))


def flops(cfg: ModelConfig, tokens: int) -> int:
    """The model's FLOPs per token of a training step over sequences of `tokens` tokens.

    6 for each parameter of a matrix product (all but the embedding), and 6 L D T for causal attention, L layers.
    """
    return 3 * (cfg.layers * _block_flops(cfg, tokens) + 2 * cfg.vocab * cfg.width)


def recomputed_flops(cfg: ModelConfig, tokens: int, blocks: int) -> int:
    """The FLOPs per token that remat of this many blocks adds: their forward once more."""
    return blocks * _block_flops(cfg, tokens)


def _block_flops(cfg: ModelConfig, tokens: int) -> int:
    """FLOPs per token of a block's forward: 2 for each parameter of its matrices, and 2 D T for causal attention."""
    K, D = cfg.head_width, cfg.width
    matrices = 2 * cfg.heads * K * D + 2 * cfg.kv_heads * K * D + 3 * cfg.hidden * D
    return 2 * matrices + 2 * cfg.heads * K * tokens


def most_memory(cfg: ModelConfig, setup: Setup) -> int:
    """An upper bound of a step's bytes on one device, by arithmetic alone; `footprint.peak` measures them, mostly half of this or less."""
    size, tokens = setup.masters.itemsize, setup.micro_batch * setup.tokens
    parts = 16 * parameters(cfg)  # masters, moments, gradients, gathered and summed ones: at most two of each
    wide = cfg.width + cfg.hidden + (cfg.heads + cfg.kv_heads) * cfg.head_width
    blocks = tokens * (8 * wide * (cfg.layers + 4) + 8 * cfg.heads * setup.tokens)  # the latter: one block's scores
    loss = 8 * (min(tokens, 2 * reference.CHUNK) * cfg.vocab + tokens * cfg.width)
    return size * (parts + blocks + loss)


class Traffic(NamedTuple):
    """The collectives of one kind in a step."""

    kind: Literal["gathers forward", "gathers backward", "reduce-scatters", "all-reduces"]
    size: int  # bytes of the whole vectors
    ranks: int  # ranks that take part
    stride: int  # distance between the numbers of those ranks


def traffic(cfg: ModelConfig, setup: Setup) -> list[Traffic]:
    """The collectives of a step over parameters and gradients."""
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
    """The largest number of units that are gathered, or cast, at the same time."""
    mesh = setup.mesh
    dtype = setup.dtype if mesh is None else setup.param_dtype
    if dtype == setup.masters and (mesh is None or mesh.shards[1] == 1):
        return 0
    if mesh is None or not mesh.regathers:
        return cfg.layers + 1  # the blocks, which are kept for their backward, and the head
    return 1 + (setup.forward_prefetch or setup.backward_prefetch)
