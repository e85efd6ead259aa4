"""What each fused kernel computes, in plain PyTorch, for any device: the specification and the CPU path.

Axes: B batch, T time, H query heads, G key and value heads, K head width, D width, V vocabulary, N rows.
Nothing here is differentiable by itself; `ops/` pairs each forward with its backward.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_fwd(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [.. D] / rms(x) * gain, and 1 / rms [.. 1] for the backward; the mean square in float32."""
    y = wide(x)
    rstd = torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return gain * (y * rstd).to(x.dtype), rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed, scaled = wide(x) * rstd, wide(dy) * wide(gain)
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    dgain = (wide(dy) * wide(normed.to(x.dtype))).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dgain.to(gain.dtype)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B T H K] over k, v [B T G K]; the output [B T H K] and the log-sum-exp [B T H]."""
    q, k, v = (t.transpose(1, 2) for t in (q, *_repeat(q, k, v)))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide_k, wide_v = _repeat(q, k, v)
    heads_first = [t.transpose(1, 2) for t in (dout, q, wide_k, wide_v, out, lse)]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, True)
    # A key head's gradient is the sum over the query heads it serves.
    dk, dv = (d.transpose(1, 2).unflatten(2, (k.shape[2], -1)).sum(3) for d in (dk, dv))
    return dq.transpose(1, 2), dk, dv


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    times = q.shape[2] // k.shape[2]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
