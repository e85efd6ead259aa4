"""The ops that a model calls: kernels made differentiable, batchable by vmap, and traceable. PyTorch's dispatcher chooses by device."""

from kernels import ascend, reference
from ops.adamw import adamw, adamw_op
from ops.attention import (
    attention,
    attention_bwd,
    attention_fwd,
    cached_attention,
    cached_attention_op,
    packed_attention,
    packed_attention_bwd,
    packed_attention_fwd,
)
from ops.cache import write_cache, write_cache_op
from ops.collectives import all_gather_op, all_reduce_op, reduce_scatter_op
from ops.conv import conv3x3
from ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_pass
from ops.join import join, join_op
from ops.linear import linear
from ops.qk_norm_rotary import qk_norm_rotary, qk_norm_rotary_bwd, qk_norm_rotary_fwd
from ops.rms_norm import add_rms_norm, add_rms_norm_bwd, add_rms_norm_fwd, rms_norm, rms_norm_bwd, rms_norm_fwd
from ops.swiglu import swiglu, swiglu_bwd, swiglu_fwd

__all__ = [
    "ASCEND", "REFERENCES", "adamw", "add_rms_norm", "attention", "cached_attention", "conv3x3", "join", "linear", "linear_cross_entropy",
    "linear_cross_entropy_pass", "packed_attention", "qk_norm_rotary", "rms_norm", "swiglu", "write_cache",
]  # fmt: skip

# Decompositions for Inductor, which fuses them better than it calls opaque ops.
REFERENCES = {
    rms_norm_fwd: reference.rms_norm_fwd,
    rms_norm_bwd: reference.rms_norm_bwd,
    add_rms_norm_fwd: reference.add_rms_norm_fwd,
    add_rms_norm_bwd: reference.add_rms_norm_bwd,
    qk_norm_rotary_fwd: reference.qk_norm_rotary_fwd,
    qk_norm_rotary_bwd: reference.qk_norm_rotary_bwd,
    swiglu_fwd: reference.swiglu_fwd,
    swiglu_bwd: reference.swiglu_bwd,
    attention_fwd: reference.attention_fwd,
    attention_bwd: reference.attention_bwd,
}

# Decompositions for Ascend's graph engine, which has converters for torch_npu's ops and none for ours.
ASCEND = {
    rms_norm_fwd: ascend.rms_norm_fwd,
    rms_norm_bwd: ascend.rms_norm_bwd,
    add_rms_norm_fwd: ascend.add_rms_norm_fwd,
    add_rms_norm_bwd: ascend.add_rms_norm_bwd,
    qk_norm_rotary_fwd: ascend.qk_norm_rotary_fwd,
    qk_norm_rotary_bwd: ascend.qk_norm_rotary_bwd,
    swiglu_fwd: ascend.swiglu_fwd,
    swiglu_bwd: ascend.swiglu_bwd,
    attention_fwd: ascend.attention_fwd,
    attention_bwd: ascend.attention_bwd,
    packed_attention_fwd: ascend.packed_attention_fwd,
    packed_attention_bwd: ascend.packed_attention_bwd,
    cached_attention_op: ascend.cached_attention,
    write_cache_op: ascend.write_cache,
    linear_cross_entropy_pass: ascend.linear_cross_entropy_pass,
    adamw_op: ascend.adamw,
    join_op: ascend.join,
    all_gather_op: ascend.all_gather,
    reduce_scatter_op: ascend.reduce_scatter,
    all_reduce_op: ascend.all_reduce,
}
