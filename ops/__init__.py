"""What a model may call: kernels made differentiable, batchable by vmap, and traceable. Devices are chosen here, by PyTorch's dispatcher."""

from ops.adamw import adamw
from ops.attention import attention
from ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_pass
from ops.rms_norm import rms_norm

__all__ = ["adamw", "attention", "linear_cross_entropy", "linear_cross_entropy_pass", "rms_norm"]
