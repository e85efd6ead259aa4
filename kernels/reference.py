"""What each fused kernel computes, in plain PyTorch, for any device: the specification and the CPU path.

Axes: B batch, T time, H query heads, G key and value heads, K head width, D width, V vocabulary, N rows.
Nothing here is differentiable by itself; `ops/` pairs each forward with its backward.
"""

import torch
from torch import Tensor


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
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide_k, wide_v = _repeat(q, k, v)
    heads_first = [t.transpose(1, 2) for t in (dout, q, wide_k, wide_v, out, lse)]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, True)
    # A key head's gradient is the sum over the query heads it serves.
    dk, dv = (d.transpose(1, 2).unflatten(2, (k.shape[2], -1)).sum(3) for d in (dk, dv))
    return dq.transpose(1, 2).contiguous(), dk.contiguous(), dv.contiguous()


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    times = q.shape[2] // k.shape[2]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))


CHUNK = 512  # rows of logits held at once: 0.88 of the sgemm ceiling at V = 171385 and 351 MB


def linear_cross_entropy_pass(
    x: Tensor, weight: Tensor, target: Tensor, count: Tensor, z_weight: float, masked: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ce, z, dx [N D] and dweight [V D] of rows x [N D] against target [N] under weight [V D], over chunks of rows.

    ce and z are sums over rows with a target >= 0, divided by count; the gradients are those of ce + z_weight * z.
    With p = softmax(l) and r = 1 + 2 z_weight lse the gradient of a row's logits is r p - onehot = r (p - onehot / r),
    so r and 1 / count are folded into rows of dx and x, never into [chunk, V].
    """
    N, V = x.shape[0], weight.shape[0]
    ce, z = (torch.zeros((), dtype=wide(x[:0]).dtype, device=x.device) for _ in range(2))
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=ce.dtype)
    buffer = x.new_empty(min(CHUNK, N), V)
    masked_ids = torch.tensor(masked, device=x.device, dtype=torch.int64)
    for start in range(0, N, CHUNK):
        rows = slice(start, min(start + CHUNK, N))
        xs, kept = x[rows], target[rows] >= 0
        column = target[rows].clamp(min=0)[:, None]
        logits = wide(torch.mm(xs, weight.t(), out=buffer[: len(xs)]))
        if masked:
            logits.index_fill_(1, masked_ids, torch.finfo(torch.float32).min)
        hit, top = logits.gather(1, column)[:, 0], logits.amax(1)
        p = torch.softmax(logits, 1, out=logits)
        lse = top - p.amax(1).log()  # the largest probability is 1 / sum(exp(l - top))
        ce += torch.where(kept, lse - hit, 0).sum()
        z += torch.where(kept, lse * lse, 0).sum()
        r = 1 + 2 * z_weight * lse
        p.scatter_add_(1, column, -1 / r[:, None])
        p, r = p.to(x.dtype), (torch.where(kept, r, 0) / count)[:, None]
        dx[rows] = r * (p @ weight)
        dweight.addmm_(p.t(), (r * xs).to(p.dtype)) if p.dtype == dweight.dtype else dweight.add_(
            p.t() @ (r * xs).to(p.dtype)
        )
    return ce / count, z / count, dx, dweight.to(weight.dtype)


def adamw_(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], count: Tensor, lr: Tensor, scale: Tensor,
    skip: Tensor, b1: float, b2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    """AdamW's `count`-th update in place, with gradients scale * grads (in place too), unless skip is 1.0."""
    torch._foreach_mul_(grads, scale)
    torch._fused_adamw_(
        params, grads, mu, nu, [], [count.float() for _ in params],
        lr=lr, beta1=b1, beta2=b2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False, found_inf=skip.float(),
    )  # fmt: skip
