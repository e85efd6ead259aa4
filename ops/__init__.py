"""What a model may call: kernels made differentiable, batchable by vmap, and traceable. Devices are chosen here, by PyTorch's dispatcher."""

from kernels import reference
from ops.adamw import adamw
from ops.attention import attention, attention_bwd, attention_fwd, cached_attention, packed_attention
from ops.cache import write_cache
from ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_pass
from ops.qk_norm_rotary import qk_norm_rotary, qk_norm_rotary_bwd, qk_norm_rotary_fwd
from ops.rms_norm import add_rms_norm, add_rms_norm_bwd, add_rms_norm_fwd, rms_norm, rms_norm_bwd, rms_norm_fwd
from ops.swiglu import swiglu, swiglu_bwd, swiglu_fwd

__all__ = [
    "REFERENCES", "adamw", "add_rms_norm", "attention", "cached_attention", "linear_cross_entropy",
    "linear_cross_entropy_pass", "packed_attention", "qk_norm_rotary", "rms_norm", "swiglu", "write_cache",
]  # fmt: skip

# Decompositions for a compiler that fuses better than an opaque call: Inductor.
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
