"""What torch_npu's ops compute, as Huawei's documentation of them says it, in plain float32 on a CPU: the numbers of rung 5.

Written from that documentation and not from kernels/, whose calls they judge. What the device would refuse, or leave undefined,
is an error here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

COMPRESSED = 2048  # side of the mask that sparse_mode 3 stands for causal attention of any length with
STATS = 8  # copies of a row's statistic, a block of 32 bytes
TAKEN = (torch.float16, torch.bfloat16, torch.float32)
EVERYTHING = 2147483647  # pre_tockens and next_tockens that leave nothing out


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    for t in tensors:
        if t.dtype not in TAKEN:
            raise RuntimeError(f"{t.dtype} is not taken by the device's fused ops; expected one of {TAKEN}")
    return tuple(t.float() for t in tensors)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    x, gain = _float(input, gamma)
    rstd = torch.rsqrt((x * x).mean(_normed(gamma), keepdim=True) + epsilon)
    return (x * rstd * gain).to(input.dtype), rstd


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    d, x, gain = _float(dy, input, gamma)
    unit = x * rstd
    dunit = d * gain
    dx = rstd * (dunit - unit * (dunit * unit).mean(_normed(gamma), keepdim=True))
    return dx.to(input.dtype), (d * unit).sum_to_size(gamma.shape)


def _normed(gamma: Tensor) -> list[int]:
    """The axes that are normed: the last ones, those of gamma."""
    return list(range(-gamma.ndim, 0))


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = sum(_float(x1, x2)).to(x1.dtype)
    return *npu_rms_norm(total, gamma, epsilon), total


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    x, cos, sin = _rotary(input, r1, r2, rotary_mode)
    if rotate is not None:
        raise NotImplementedError("npu_rotary_mul with a matrix")
    return (x * cos + _quarter_turn(x) * sin).to(input.dtype)


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    x, cos, sin = _rotary(input, r1, r2, rotary_mode)
    if input.shape[-1] % 64:
        raise RuntimeError(f"npu_rotary_mul_backward: head width {input.shape[-1]}, expected a multiple of 64")
    (d,) = _float(grad)
    dx = d * cos - _quarter_turn(d * sin)  # a quarter turn's transpose is its opposite
    dcos, dsin = (d * x).sum_to_size(r1.shape), (d * _quarter_turn(x)).sum_to_size(r2.shape)
    return dx.to(input.dtype), dcos.to(input.dtype), dsin.to(input.dtype)


def _rotary(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> tuple[Tensor, ...]:
    if mode != "half":
        raise NotImplementedError(f"npu_rotary_mul, rotary_mode {mode}")
    fits = all(r in (1, n) for r, n in zip(r1.shape, x.shape, strict=True))
    if not (x.ndim == r1.ndim == r2.ndim == 4 and fits and r1.shape == r2.shape and r1.shape[-1] == x.shape[-1]):
        raise RuntimeError(f"npu_rotary_mul: {list(x.shape)} by {list(r1.shape)} and {list(r2.shape)}")
    return _float(x, r1, r2)


def _quarter_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = _float(*input.chunk(2, dim))
    return (F.silu(gate) * up).to(input.dtype)


def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    d, gate, up = _float(grad_output, *input.chunk(2, dim))
    on = torch.sigmoid(gate)
    return torch.cat([d * up * on * (1 + gate * (1 - on)), d * gate * on], dim).to(input.dtype)


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: None = None,
    padding_mask: None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = EVERYTHING, next_tockens: int = EVERYTHING, inner_precise: int = 0, prefix: None = None,
    actual_seq_qlen: None = None, actual_seq_kvlen: None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: None = None, dropout_mask: None = None, seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:  # fmt: skip
    """Also each row's largest score and the sum of exponentials below it; seed, offset and size of a dropout that there is not."""
    _refuse(pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink, dropout_mask)
    _refuse(keep_prob != 1, pre_tockens != EVERYTHING, next_tockens != EVERYTHING, softmax_layout)
    q, k, v = _heads(query, key, value, head_num, input_layout)
    scores = _scores(q, k, scale, _hidden(atten_mask, sparse_mode, q, k))
    largest = scores.amax(-1, keepdim=True)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    out = _joined(exponentials / total @ v, query, input_layout)
    stats = (t.expand(*t.shape[:-1], STATS).contiguous() for t in (largest, total))
    return out, *stats, query.new_empty(0), 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *, pse: None = None,
    padding_mask: None = None, atten_mask: Tensor | None = None, softmax_max: Tensor, softmax_sum: Tensor,
    softmax_in: Tensor | None = None, attention_in: Tensor, scale_value: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = EVERYTHING, next_tockens: int = EVERYTHING, inner_precise: int = 0, seed: int = 0,
    offset: int = 0, numels: int = 0, prefix: None = None, actual_seq_qlen: None = None, actual_seq_kvlen: None = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: None = None,
) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:  # fmt: skip
    """Nothing of the forward is computed again that the caller hands over: probabilities are exp(score - max) / sum."""
    _refuse(pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink)
    _refuse(keep_prob != 1, pre_tockens != EVERYTHING, next_tockens != EVERYTHING, softmax_layout)
    q, k, v = _heads(query, key, value, head_num, input_layout)
    d, out, _ = _heads(dy, attention_in, attention_in, head_num, input_layout)
    largest, total = (_stat(t, q) for t in (softmax_max, softmax_sum))
    p = (_scores(q, k, scale_value, _hidden(atten_mask, sparse_mode, q, k)) - largest).exp() / total
    dscores = p * (d @ v.mT - (d * out).sum(-1, keepdim=True)) * scale_value
    dq, dk, dv = dscores @ k, dscores.mT @ q, p.mT @ d
    shared = lambda g: g.unflatten(1, (-1, q.shape[1] // _kv_heads(query, key, head_num, input_layout))).sum(2)
    grads = (_joined(g, t, input_layout) for g, t in ((dq, query), (shared(dk), key), (shared(dv), value)))
    return *grads, None, torch.empty(0)


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None, num_heads: int = 1,
    scale: float = 1.0, pre_tokens: int = EVERYTHING, next_tokens: int = EVERYTHING, input_layout: str = "BSH",
    num_key_value_heads: int = 0, sparse_mode: int = 0, inner_precise: int = 0, softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _refuse(*others.values(), pre_tokens != EVERYTHING, next_tokens != EVERYTHING, sparse_mode not in (0, 1))
    given = _kv_heads(query, key, num_heads, input_layout)
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"npu_fused_infer_attention_score of {query.dtype}: expected bfloat16 or float16")
    if (num_key_value_heads or num_heads) != given:
        raise RuntimeError(f"npu_fused_infer_attention_score: {given} heads of keys, told {num_key_value_heads}")
    q, k, v = _heads(query, key, value, num_heads, input_layout)
    if atten_mask is not None and q.shape[2] == 1:  # one query: [B Skv] and [B 1 Skv] are masks, too
        atten_mask = atten_mask.reshape(atten_mask.shape[0], 1, 1, -1)
    elif atten_mask is not None and atten_mask.ndim == 3:
        atten_mask = atten_mask[:, None]
    scores = _scores(q, k, scale, _hidden(atten_mask, 1, q, k))
    lse = scores.logsumexp(-1, keepdim=True)
    return _joined((scores - lse).exp() @ v, query, input_layout), lse if softmax_lse_flag else torch.empty(0)


def _refuse(*given: Any) -> None:
    """None of the options that are not simulated."""
    if any(one is not None and one is not False and one != 0 and one != "" for one in given):
        raise NotImplementedError(f"an option that is not simulated: {given}")


def _kv_heads(query: Tensor, key: Tensor, heads: int, layout: str) -> int:
    return key.shape[1] if layout == "BNSD" else key.shape[2] // (query.shape[2] // heads)


def _heads(query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str) -> tuple[Tensor, ...]:
    """Float32 [B N S D] of each, keys and values repeated for the query heads that they serve."""
    if layout not in ("BSH", "BNSD"):
        raise NotImplementedError(f"attention, layout {layout}")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}: expected one dtype")
    kv_heads = _kv_heads(query, key, heads, layout)
    if layout == "BSH":
        apart = lambda t, n: t.unflatten(2, (n, -1)).transpose(1, 2)
        query, key, value = apart(query, heads), apart(key, kv_heads), apart(value, kv_heads)
    if query.shape[1] != heads or heads % kv_heads:
        raise RuntimeError(f"attention of {query.shape[1]} heads on {kv_heads}, told {heads}")
    q, k, v = _float(query, key, value)
    return q, *(t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))


def _joined(x: Tensor, like: Tensor, layout: str) -> Tensor:
    return (x.transpose(1, 2).flatten(2) if layout == "BSH" else x).to(like.dtype).contiguous()


def _hidden(mask: Tensor | None, sparse_mode: int, q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys a query does not see: True, or 1, is masked out. Without a mask all are seen, whatever sparse_mode says."""
    if sparse_mode not in (0, 1, 3):
        raise NotImplementedError(f"attention, sparse_mode {sparse_mode}")
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError(f"atten_mask of {mask.dtype}: expected bool or uint8")
    (B, N, queries, _), keys = q.shape, k.shape[2]
    if sparse_mode == 3:
        later = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
        if mask.shape != later.shape or not torch.equal(mask.bool(), later):
            raise RuntimeError(
                f"sparse_mode 3 with a mask {list(mask.shape)}: expected 2048 x 2048, True above the diagonal"
            )
        return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)  # from the lower right corner
    shapes = ([queries, keys], [1, 1, queries, keys], [B, 1, queries, keys], [B, N, queries, keys])
    if list(mask.shape) not in shapes:
        raise RuntimeError(f"atten_mask {list(mask.shape)}: expected one of {shapes}")
    return mask.bool()


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    scores = q @ k.mT * scale
    if hidden is None:
        return scores
    if hidden.all(-1).any():
        raise RuntimeError("a query sees no key at all: what the device makes of it is undefined")
    return scores.masked_fill(hidden, -torch.inf)


def _stat(stat: Tensor, q: Tensor) -> Tensor:
    """One of the eight copies of a row's statistic."""
    if stat.dtype != torch.float32 or list(stat.shape) != [*q.shape[:3], STATS] or (stat != stat[..., :1]).any():
        raise RuntimeError(
            f"{list(stat.shape)} of {stat.dtype}: expected float32 {[*q.shape[:3], STATS]}, all eight alike"
        )
    return stat[..., :1]


def npu_scatter_nd_update(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return npu_scatter_nd_update_(input.clone(), indices, updates)


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    depth = indices.shape[-1]
    if updates.shape != (*indices.shape[:-1], *input.shape[depth:]) or updates.dtype != input.dtype:
        raise RuntimeError(
            f"npu_scatter_nd_update: {list(updates.shape)} at {list(indices.shape)} of {list(input.shape)}"
        )
    at = indices.reshape(-1, depth).long()
    if ((at < 0) | (at >= torch.tensor(input.shape[:depth]))).any():
        raise RuntimeError(f"npu_scatter_nd_update: an index outside {list(input.shape[:depth])}")
    rows = updates.reshape(-1, *input.shape[depth:])
    input[tuple(at.T)] = rows
    if not torch.equal(input[tuple(at.T)], rows):
        raise RuntimeError("npu_scatter_nd_update: two values for one place; which one stays is undefined")
    return input


def npu_apply_adam_w(
    beta1_power: float, beta2_power: float, lr: float, weight_decay: float, beta1: float, beta2: float, epsilon: float,
    grad: Tensor, max_grad_norm: Tensor | None, amsgrad: bool | None, maximize: bool | None, *, out: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """The powers are those of the step before: beta ** (t - 1)."""
    _refuse(amsgrad, max_grad_norm)
    var, m, v = _float(*out)
    (g,) = _float(-grad if maximize else grad)
    m, v = m * beta1 + (1 - beta1) * g, v * beta2 + (1 - beta2) * g * g
    spread = (v / (1 - beta2_power * beta2)).sqrt() + epsilon
    var = var * (1 - lr * weight_decay) - lr / (1 - beta1_power * beta1) * m / spread
    for old, new in zip(out, (var, m, v), strict=True):
        old.copy_(new)
    return out


def matmul_backward(grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """torch_npu differentiates matmul as one op, for which a CPU has no kernel."""
    x = self[None] if self.ndim == 1 else self
    y = other[:, None] if other.ndim == 1 else other
    d = grad[..., None] if other.ndim == 1 else grad
    d = d.unsqueeze(-2) if self.ndim == 1 else d
    dx, dy = lambda: (d @ y.mT).sum_to_size(x.shape), lambda: (x.mT @ d).sum_to_size(y.shape)
    return dx().view(self.shape) if mask[0] else None, dy().view(other.shape) if mask[1] else None


NPU: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    **{
        getattr(torch.ops.npu, function.__name__).default: function
        for function in (
            npu_rms_norm, npu_rms_norm_backward, npu_add_rms_norm, npu_rotary_mul, npu_rotary_mul_backward, npu_swiglu,
            npu_swiglu_backward, npu_fusion_attention, npu_fusion_attention_grad, npu_fused_infer_attention_score,
            npu_scatter_nd_update, npu_scatter_nd_update_,
        )
    },
    torch.ops.npu.npu_apply_adam_w.out: npu_apply_adam_w,
    torch.ops.aten.matmul_backward.default: matmul_backward,
}  # fmt: skip
