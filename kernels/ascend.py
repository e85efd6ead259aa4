"""The kernels of Ascend NPUs: torch_npu's fused op where there is one, else a composition of its ops.

Signatures and results are kernels.reference's. Every op used here has a converter to a GE graph, so that one file serves eager
execution and export. Nothing is imported from torch_npu: `torch.ops.npu` is there once it is loaded, or once
kernels.npu_fakes declares it.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.reference import adamw_of_leaf, among, wide

npu = torch.ops.npu
CAUSAL = 2048  # side of the mask that npu_fusion_attention takes for causal attention of any length
CAUSAL_MODE, WHOLE_MASK_MODE = 3, 1  # its sparse_mode: from the lower right corner; a mask for every pair


def rms_norm_fwd(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [.. D] / rms(x) * gain, and 1 / rms [.. 1], by npu_rms_norm."""
    return npu.npu_rms_norm(x, gain, eps)


def rms_norm_bwd(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and gain, by npu_rms_norm_backward."""
    dx, dgain = npu.npu_rms_norm_backward(dy, x, gain, rstd)  # dgain in float32
    return dx, dgain.to(gain.dtype)


def add_rms_norm_fwd(x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual, its rms_norm, and 1 / rms of the sum, by npu_add_rms_norm."""
    y, rstd, total = npu.npu_add_rms_norm(x, residual, gain, eps)
    return total, y, rstd


def add_rms_norm_bwd(dtotal: Tensor, dy: Tensor, total: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is also the gradient of the residual, and the gradient of gain."""
    d, dgain = rms_norm_bwd(dy, total, gain, rstd)
    return dtotal + d, dgain


def qk_norm_rotary_fwd(
    x: Tensor, gain: Tensor, bias: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x [B T H K] over each head's K, times gain [1 K] or [H K] plus bias, rotated by npu_rotary_mul; its mean and 1 / deviation [B T H 1]."""
    normed, mean, rstd = torch.native_layer_norm(wide(x), x.shape[-1:], None, None, eps)
    cos, sin = _both_halves(angles, x.dtype)
    return npu.npu_rotary_mul(normed.to(x.dtype) * gain + bias, cos, sin), mean, rstd


def qk_norm_rotary_bwd(
    dy: Tensor, x: Tensor, gain: Tensor, angles: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gain and bias."""
    cos, sin = _both_halves(angles, x.dtype)
    d = wide(npu.npu_rotary_mul(dy, cos, -sin))  # turned back
    dx = torch.ops.aten.native_layer_norm_backward(
        d * wide(gain), wide(x), x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
    normed = wide(((wide(x) - mean) * rstd).to(x.dtype))
    shared = [2] if gain.shape[0] == 1 else []
    of_gain = lambda g: g.sum([0, 1, *shared]).view(gain.shape).to(gain.dtype)
    return dx.to(x.dtype), of_gain(d * normed), of_gain(d)


def _both_halves(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines as npu_rotary_mul takes them, [1 or B, T, 1, K]: repeated for both channels of a pair."""
    angles = angles.to(dtype)[..., None, :]
    angles = angles if angles.ndim == 5 else angles[None]
    cos, sin = angles[:, :, 0], angles[:, :, 1]
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, by npu_swiglu."""
    return npu.npu_swiglu(torch.cat([gate, up], -1))


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, by npu_swiglu_backward."""
    dgate, dup = npu.npu_swiglu_backward(dy, torch.cat([gate, up], -1)).chunk(2, -1)
    return dgate.contiguous(), dup.contiguous()


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B T H K] over k, v [B T G K]: the output [B T H K] and the log-sum-exp [B T H]."""
    return _attention_fwd(q, k, v, _causal(q.device), CAUSAL_MODE)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    return _attention_bwd(dout, q, k, v, out, lse, _causal(q.device), CAUSAL_MODE)


def packed_attention_fwd(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """attention_fwd in which no query sees a key before first [B T], the position where its document starts."""
    return _attention_fwd(q, k, v, _outside(first), WHOLE_MASK_MODE)


def packed_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    return _attention_bwd(dout, q, k, v, out, lse, _outside(first), WHOLE_MASK_MODE)


def _causal(device: torch.device) -> Tensor:
    """A causal mask in Ascend's convention: True where the key is hidden from the query."""
    at = torch.arange(CAUSAL, device=device)
    return at > at[:, None]


def _outside(first: Tensor) -> Tensor:
    """[B 1 T T]: True for later keys and for keys of other documents. The TND layout would skip them, but no GE graph has its lengths."""
    at = torch.arange(first.shape[1], device=first.device)
    return ((at > at[:, None]) | (at < first[..., None]))[:, None]


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    flat = (t.flatten(2) for t in (q, k, v))
    out, top, total, *_ = npu.npu_fusion_attention(
        *flat, H, "BSH", atten_mask=mask, scale=K**-0.5, sparse_mode=mode
    )  # fmt: skip
    # The largest score of a row and its sum of exponentials, [B H T 8] with all eight alike.
    lse = (top + total.log())[..., 0].transpose(1, 2).contiguous()
    return out.view(B, T, H, K), lse


def _attention_bwd(dout, q, k, v, out, lse, mask: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    H, K = q.shape[2:]
    # exp(score - lse) is the probability itself: pass lse as the largest score, and 1 as the sum.
    top = lse.transpose(1, 2)[..., None].expand(-1, -1, -1, 8).contiguous()
    flat = (t.flatten(2) for t in (q, k, v, dout))
    grads = npu.npu_fusion_attention_grad(
        *flat, H, "BSH", atten_mask=mask, softmax_max=top, softmax_sum=torch.ones_like(top), attention_in=out.flatten(2),
        scale_value=K**-0.5, sparse_mode=mode,
    )  # fmt: skip
    dq, dk, dv = (g.view(t.shape) for g, t in zip(grads[:3], (q, k, v), strict=True))
    return dq, dk, dv


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention of q [B T H K] over the cache slots [B S G K] that seen [B T S] allows each query."""
    if q.dtype == torch.float32:  # the fused op takes half types only
        return _composed_attention(q, keys, values, seen)
    heads_first = (t.transpose(1, 2) for t in (q, keys, values))
    out, _ = npu.npu_fused_infer_attention_score(
        *heads_first, atten_mask=~seen[:, None], num_heads=q.shape[2], num_key_value_heads=keys.shape[2],
        scale=q.shape[3] ** -0.5, input_layout="BNSD",
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _composed_attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    shared = q.shape[2] // keys.shape[2]
    # The query heads that share a key head become more queries of it, so that keys are never repeated.
    queries = q.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B G R*T K]
    scores = (queries @ keys.permute(0, 2, 3, 1)).unflatten(2, (shared, -1)) * q.shape[3] ** -0.5
    scores = torch.where(seen[:, None, None], scores, torch.finfo(scores.dtype).min)
    out = torch.softmax(scores, -1).flatten(2, 3) @ values.transpose(1, 2)
    return out.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def write_cache(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """A copy of the cache [B S G K] with new [B T G K] in the slots positions [B T]."""
    return npu.npu_scatter_nd_update(cache, _slots(positions), new)


def write_cache_(cache: Tensor, positions: Tensor, new: Tensor) -> None:
    """Put new [B T G K] into the slots positions [B T] of the cache [B S G K], in place."""
    npu.npu_scatter_nd_update_(cache, _slots(positions), new)


def _slots(positions: Tensor) -> Tensor:
    """[B T 2]: row and slot of each new entry."""
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None].expand_as(positions)
    return torch.stack([rows, positions], -1)


CHUNK = 1024  # rows of logits held at once: 0.7 GB of float32 at V = 171385


def linear_cross_entropy_pass(
    x: Tensor, weight: Tensor, target: Tensor, count: Tensor, z_weight: float, masked: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels.reference.linear_cross_entropy_pass, without writes in place. npu_cross_entropy_loss holds [N V] and has no GE converter."""
    ce = z = torch.zeros((), dtype=torch.float32, device=x.device)
    dx, dweight = [], torch.zeros_like(weight, dtype=torch.float32)
    hidden = among(masked, len(weight), x.device)
    for xs, targets in zip(x.split(CHUNK), target.split(CHUNK), strict=True):
        kept, column = targets >= 0, targets.clamp(min=0)[:, None]
        logits = (xs @ weight.t()).float()
        if masked:
            logits = torch.where(hidden, torch.finfo(torch.float32).min, logits)
        hit, lse = logits.gather(1, column)[:, 0], torch.logsumexp(logits, 1)
        ce = ce + torch.where(kept, lse - hit, 0).sum()
        z = z + torch.where(kept, lse * lse, 0).sum()
        r = 1 + 2 * z_weight * lse
        p = torch.softmax(logits, 1).scatter_add(1, column, -1 / r[:, None]).to(x.dtype)
        r = (torch.where(kept, r, 0) / count)[:, None]
        dx.append((r * (p @ weight)).to(x.dtype))
        dweight = dweight + p.t() @ (r * xs).to(p.dtype)
    return ce / count, z / count, torch.cat(dx), dweight.to(weight.dtype)


def adamw(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], *rest: Any
) -> tuple[list[Tensor], ...]:
    """AdamW's new params, mu and nu. npu_apply_adam_w is not used: it takes lr and powers of b1 and b2 from the host, which would wait."""
    new = [adamw_of_leaf(*leaf, *rest) for leaf in zip(params, grads, mu, nu, strict=True)]
    return tuple(map(list, zip(*new, strict=True)))


def adamw_(params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], *rest: Any) -> None:
    """AdamW's update of params, mu and nu, in place; grads are not changed."""
    for p, g, m, v in zip(params, grads, mu, nu, strict=True):
        for old, new in zip((p, m, v), adamw_of_leaf(p, g, m, v, *rest), strict=True):
            old.copy_(new)


def join(leaves: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The leaves end to end in one vector of `size` numbers of `dtype`, padded with zeros."""
    flat = torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])
    return torch.constant_pad_nd(flat, [0, size - flat.numel()]) if size > flat.numel() else flat


# Collectives for graphs; eager execution uses torch.distributed's.
def all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """Every rank's vector, one after the other."""
    return _waited(torch.ops._c10d_functional.all_gather_into_tensor(x, size, group))


def reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    """This rank's part of the sum over ranks."""
    return _waited(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", size, group))


def all_reduce(x: Tensor, group: str, size: int) -> Tensor:
    """The sum over ranks."""
    return _waited(torch.ops._c10d_functional.all_reduce(x, "sum", group))


def _waited(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)
