"""What a model may call: kernels made differentiable, batchable by vmap, and traceable. Devices are chosen here, by PyTorch's dispatcher."""

from kernels import reference
from ops.adamw import adamw
from ops.attention import attention, attention_bwd, attention_fwd
from ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_pass
from ops.rms_norm import rms_norm, rms_norm_bwd, rms_norm_fwd

__all__ = ["REFERENCES", "adamw", "attention", "linear_cross_entropy", "linear_cross_entropy_pass", "rms_norm"]

# Decompositions for a compiler that fuses better than an opaque call: Inductor.
REFERENCES = {
    rms_norm_fwd: reference.rms_norm_fwd,
    rms_norm_bwd: reference.rms_norm_bwd,
    attention_fwd: reference.attention_fwd,
    attention_bwd: reference.attention_bwd,
}
