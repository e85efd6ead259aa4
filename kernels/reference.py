"""What each fused kernel computes, in plain PyTorch, for any device: the specification and the CPU path.

Axes: B batch, T time, S cache slots, H query heads, G key and value heads, K head width, D width, V vocabulary, N rows.
Nothing here is differentiable by itself; `ops/` pairs each forward with its backward.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_KERNELS = ("cpu", "meta")  # devices whose attention is that of CPUs: on meta tensors a CPU's memory is planned


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_fwd(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [.. D] / rms(x) * gain, and 1 / rms [.. 1] for the backward; the mean square in float32. gain may have any shape that broadcasts."""
    y = wide(x)
    rstd = torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return gain * (y * rstd).to(x.dtype), rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and gain."""
    normed, scaled = wide(x) * rstd, wide(dy) * wide(gain)
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    dgain = (wide(dy) * wide(normed.to(x.dtype))).sum_to_size(gain.shape)
    return dx.to(x.dtype), dgain.to(gain.dtype)


def add_rms_norm_fwd(x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual, its rms_norm, and 1 / rms of the sum."""
    total = x + residual
    return (total, *rms_norm_fwd(total, gain, eps))


def add_rms_norm_bwd(dtotal: Tensor, dy: Tensor, total: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is also the gradient of the residual, and the gradient of gain."""
    d, dgain = rms_norm_bwd(dy, total, gain, rstd)
    return dtotal + d, dgain


def rotate(x: Tensor, angles: Tensor, sign: int = 1) -> Tensor:
    """x [B T H K] with channels j and j + K/2 rotated as a pair (Hugging Face's pairing) by angles, or by -angles.

    angles holds cosines and sines, [T 2 K/2] or one set for each row [B T 2 K/2].
    """
    cos, sin = (a.to(x.dtype)[..., None, :] for a in angles.unbind(-2))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin] if sign > 0 else [a * cos + b * sin, b * cos - a * sin], -1)


def qk_norm_rotary_fwd(
    x: Tensor, gain: Tensor, bias: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x [B T H K] over each head's K, times gain [1 K] or [H K] plus bias, rotated; its mean and 1 / deviation [B T H 1]."""
    normed, mean, rstd = torch.native_layer_norm(wide(x), x.shape[-1:], None, None, eps)
    return rotate(normed.to(x.dtype) * gain + bias, angles), mean, rstd


def qk_norm_rotary_bwd(
    dy: Tensor, x: Tensor, gain: Tensor, angles: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gain and bias."""
    d, normed = wide(rotate(dy, angles, -1)), (wide(x) - mean) * rstd
    scaled = d * wide(gain)
    centred = scaled - scaled.mean(-1, keepdim=True)
    dx = rstd * (centred - normed * (scaled * normed).mean(-1, keepdim=True))
    of_gain = lambda g: g.sum_to_size(gain.shape).to(gain.dtype)
    return dx.to(x.dtype), of_gain(d * wide(normed.to(x.dtype))), of_gain(d)


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both have one shape."""
    return F.silu(gate) * up


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    g, d = wide(gate), wide(dy)
    s = torch.sigmoid(g)
    return (d * wide(up) * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B T H K] over k, v [B T G K]; the output [B T H K] and the log-sum-exp [B T H]."""
    if q.device.type not in CPU_KERNELS:
        return written_out_attention_fwd(q, k, v)
    q, k, v = (_heads_first(t) for t in (q, *_repeat(q, k, v)))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if q.device.type not in CPU_KERNELS:
        return written_out_attention_bwd(dout, q, k, v, out, lse)
    wide_k, wide_v = _repeat(q, k, v)
    heads_first = [_heads_first(t) for t in (dout, q, wide_k, wide_v, out, lse)]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, True)
    # The gradient of a key head is the sum over the query heads that read it.
    dk, dv = (d.transpose(1, 2).unflatten(2, (k.shape[2], -1)).sum(3) for d in (dk, dv))
    return dq.transpose(1, 2).contiguous(), dk.contiguous(), dv.contiguous()


def written_out_attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """attention_fwd for devices that lack the CPU's fused kernel; it holds [B H T T] in float32."""
    scores = _causal_scores(q, k)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhts,bshk->bthk", (scores - lse[..., None]).exp(), wide(_repeat(q, k, v)[1]))
    return out.to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def written_out_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """attention_bwd for devices that lack the CPU's fused kernel; it holds [B H T T] in float32."""
    wide_k, wide_v = map(wide, _repeat(q, k, v))
    p, d = (_causal_scores(q, k) - lse.transpose(1, 2)[..., None]).exp(), wide(dout)
    level = (d * wide(out)).sum(-1).transpose(1, 2)[..., None]  # the softmax's backward subtracts it
    dscores = p * (torch.einsum("bthk,bshk->bhts", d, wide_v) - level) * q.shape[-1] ** -0.5
    dk, dv = (
        torch.einsum("bhts,bthk->bshk", x, y).unflatten(2, (k.shape[2], -1)).sum(3)
        for x, y in ((dscores, wide(q)), (p, d))
    )
    dq = torch.einsum("bhts,bshk->bthk", dscores, wide_k)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scores [B H T T] in float32, -inf where the key is later than the query."""
    at = torch.arange(q.shape[1], device=q.device)
    scores = torch.einsum("bthk,bshk->bhts", wide(q), wide(_repeat(q, k, k)[0])) * q.shape[-1] ** -0.5
    return scores.masked_fill(at > at[:, None], -torch.inf)


def packed_attention_fwd(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """attention_fwd in which no query sees a key before first [B T], the position where its document starts."""
    out, lse = q.new_empty(q.shape), wide(q.new_empty(q.shape[:3]))
    for part in documents(first):
        out[part], lse[part] = attention_fwd(q[part], k[part], v[part])
    return out, lse


def packed_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = grads = [t.new_empty(t.shape) for t in (q, k, v)]
    for part in documents(first):
        for whole, of_part in zip(grads, attention_bwd(*(t[part] for t in (dout, q, k, v, out, lse))), strict=True):
            whole[part] = of_part
    return dq, dk, dv


def documents(first: Tensor) -> list[tuple[slice, slice]]:
    """The row and the positions of each document. A causal call for each takes 0.4 to 0.6 of the time of one masked call."""
    length = first.shape[1]
    found = []
    for row, starts in enumerate(first.tolist()):
        edges = [*(t for t, start in enumerate(starts) if t == start), length]
        found += [(slice(row, row + 1), slice(a, b)) for a, b in pairwise(edges)]
    return found


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention of q [B T H K] over the slots of a cache [B S G K] that seen [B T S] allows each query."""
    if q.device.type == "cpu":  # reading a value back is cheap here: skip the slots that no query sees
        used = int(seen.flatten(0, 1).any(0).nonzero()[-1]) + 1
        keys, values, seen = keys[:, :used], values[:, :used], seen[..., :used]
    # Query heads that share a key head become more queries of it: keys are never repeated. No einops: it takes 20 us a call.
    (T, H), G = q.shape[1:3], keys.shape[2]
    q = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    seen = seen[:, None, None].expand(-1, -1, H // G, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen)
    return out.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def write_cache_(cache: Tensor, positions: Tensor, new: Tensor) -> None:
    """Put new [B T G K] into the slots positions [B T] of a cache [B S G K]."""
    rows = torch.arange(len(cache), device=cache.device)[:, None]
    cache[rows, positions] = new


def _heads_first(x: Tensor) -> Tensor:
    """[B H T ..] for the CPU's flash attention, which reads wrong numbers, without an error, unless the last axis is contiguous."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    times = q.shape[2] // k.shape[2]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))


def among(ids: Sequence[int], size: int, device: torch.device) -> Tensor:
    """A mask [size] of the ascending ids, computed from their runs: a traced graph cannot carry a constant on a device."""
    at, found = torch.arange(size, device=device), torch.zeros(size, dtype=torch.bool, device=device)
    starts = [i for i, n in enumerate(ids) if i == 0 or n != ids[i - 1] + 1]
    for start, end in pairwise([*starts, len(ids)]):
        found = found | ((at >= ids[start]) & (at <= ids[end - 1]))
    return found


PART = 512  # rows of the unembedding in one product on a CPU: 186 of 190 GFLOP/s; all rows at once reach 127
CHUNK = 512  # rows of logits held at once: 0.88 of the sgemm ceiling at V = 171385 and 351 MB


def linear_cross_entropy_pass(
    x: Tensor, weight: Tensor, target: Tensor, count: Tensor, z_weight: float, masked: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ce, z, dx [N D] and dweight [V D] of rows x [N D] against target [N] under weight [V D], over chunks of rows.

    ce and z are sums over rows with a target >= 0, divided by count; the gradients are those of ce + z_weight * z.
    With p = softmax(l) and r = 1 + 2 z_weight lse the gradient of a row's logits is r p - onehot = r (p - onehot / r), so r and 1 / count
    scale rows of dx and x, never [chunk, V]. x, target and count may share leading axes, weight too; the results then have them.
    """
    *lead, N, _ = x.shape
    V = weight.shape[-2]
    ce = z = sums = wide(x.new_zeros(lead))
    dx, dweight = torch.empty_like(x), torch.zeros(*lead, *weight.shape[-2:], dtype=sums.dtype, device=x.device)
    buffer = x.new_empty(*lead, min(CHUNK, N), V)
    hidden = among(masked, V, x.device)
    for start in range(0, N, CHUNK):
        rows = slice(start, min(start + CHUNK, N))
        xs, kept = x[..., rows, :], target[..., rows] >= 0
        column = target[..., rows].clamp(min=0)[..., None]
        logits = wide(_logits(xs, weight, buffer[..., : xs.shape[-2], :]))
        if masked:
            logits.masked_fill_(hidden, torch.finfo(torch.float32).min)
        hit, top = logits.gather(-1, column)[..., 0], logits.amax(-1)
        p = torch.softmax(logits, -1, out=logits)
        lse = top - p.amax(-1).log()  # the largest probability is 1 / sum(exp(l - top))
        ce = ce + torch.where(kept, lse - hit, 0).sum(-1)
        z = z + torch.where(kept, lse * lse, 0).sum(-1)
        r = 1 + 2 * z_weight * lse
        p.scatter_add_(-1, column, -1 / r[..., None])
        p, r = p.to(x.dtype), (torch.where(kept, r, 0) / count[..., None])[..., None]
        dx[..., rows, :] = r * (p @ weight)
        scaled = (r * xs).to(p.dtype)
        if p.ndim == 2 and p.dtype == dweight.dtype:
            dweight.addmm_(p.t(), scaled)
        else:
            dweight += p.mT @ scaled
    return ce / count, z / count, dx, dweight.to(weight.dtype)


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x @ weight.T, in out. On a CPU in parts of the vocabulary: one product over all of it reaches two thirds of the peak."""
    if x.device.type != "cpu" or x.ndim > 2:
        return torch.matmul(x, weight.mT, out=out)
    for rows, columns in zip(weight.split(PART), out.split(PART, 1), strict=True):
        torch.mm(x, rows.t(), out=columns)
    return out


def adamw_of_leaf(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, count: Tensor, lr: Tensor, scale: Tensor, skip: Tensor,
    b1: float, b2: float, eps: float, decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """AdamW's `count`-th update of one leaf by elementwise ops: new p, m and v. Scalars broadcast."""
    n, g = count.to(wide(p[:0]).dtype), g * scale
    m_, v_ = m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)
    step = lr / (1 - torch.pow(b1, n))
    p_ = p * (1 - lr * decay) - step * m_ / ((v_ / (1 - torch.pow(b2, n))).sqrt() + eps)
    return torch.where(skip.bool(), p, p_), torch.where(skip.bool(), m, m_), torch.where(skip.bool(), v, v_)


def adamw_(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], count: Tensor, lr: Tensor, scale: Tensor,
    skip: Tensor, b1: float, b2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    """AdamW's `count`-th update in place, with gradients scale * grads (in place too), unless skip is 1.0."""
    torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]  # torch has no public name for it
    # The fused kernel ignores strides: it pairs the n-th numbers in memory of a leaf's four tensors.
    p, g, m, v = ([x.contiguous() for x in leaves] for leaves in (params, grads, mu, nu))
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]  # torch has no public name for it
        p, g, m, v, [], [count.float() for _ in p],
        lr=lr, beta1=b1, beta2=b2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False, found_inf=skip.float(),
    )  # fmt: skip
    for old, new in zip((*params, *mu, *nu), (*p, *m, *v), strict=True):
        if old is not new:
            old.copy_(new)


def join(leaves: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The leaves end to end in one vector, padded with zeros. torch.cat, a cast and a pad would each hold another copy."""
    flat = leaves[0].new_empty(size, dtype=dtype)
    *places, rest = flat.split([*(n := [leaf.numel() for leaf in leaves]), size - sum(n)])
    for place, leaf in zip(places, leaves, strict=True):
        place.copy_(leaf.reshape(-1))
    rest.zero_()
    return flat
