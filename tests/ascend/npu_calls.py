"""Calls of torch_npu's ops as kernels.ascend makes them, and what is compared of their outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.npu_fakes import FAKES

Call = tuple[tuple[Any, ...], dict[str, Any]]
B, T, S, H, G, K, D = 2, 6, 9, 4, 2, 64, 48  # batch, time, slots of a cache, query and key heads, head width, width


def calls(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[str, Call]]:
    """Name of the op and its arguments, of each case by name."""
    empty: Callable[..., Tensor] = lambda *shape, dtype=dtype: torch.empty(shape, device=device, dtype=dtype)
    stat = lambda *shape: empty(*shape, dtype=torch.float32)
    hidden = lambda *shape: empty(*shape, dtype=torch.bool)
    x, gain, turned = empty(B, T, D), empty(D), empty(B, H, T, K).transpose(1, 2)
    heads, angles = empty(B, T, H, K), (empty(1, T, 1, K), empty(1, T, 1, K))
    flat = empty(B, T, H * K), empty(B, T, G * K), empty(B, T, G * K)
    split = empty(B, H, T, K), empty(B, G, T, K), empty(B, G, T, K)
    causal = {"atten_mask": hidden(2048, 2048), "sparse_mode": 3}
    whole = {"atten_mask": hidden(B, 1, T, T), "sparse_mode": 1}
    kept = {"softmax_max": stat(B, H, T, 8), "softmax_sum": stat(B, H, T, 8)}
    slots = empty(B, T, 2, dtype=torch.int64)
    cache, keys, wide_mask = empty(B, S, G, K), empty(B, G, S, K), {"atten_mask": hidden(B, 1, 1, S)}
    infer = {"num_heads": H, "num_key_value_heads": G, "input_layout": "BNSD", "scale": 0.1}
    return {
        "rms_norm": ("npu_rms_norm", ((x, gain, 1e-5), {})),
        "rms_norm of a view": ("npu_rms_norm", ((turned, empty(K)), {})),
        "rms_norm_backward": ("npu_rms_norm_backward", ((x, x, gain, stat(B, T, 1)), {})),
        "add_rms_norm": ("npu_add_rms_norm", ((x, x, gain, 1e-5), {})),
        "rotary_mul": ("npu_rotary_mul", ((heads, *angles), {})),
        "rotary_mul of a view": ("npu_rotary_mul", ((turned, *angles), {})),
        "rotary_mul_backward": ("npu_rotary_mul_backward", ((heads, heads, *angles), {})),
        "swiglu": ("npu_swiglu", ((x,), {})),
        "swiglu of an axis": ("npu_swiglu", ((x, 1), {})),
        "swiglu_backward": ("npu_swiglu_backward", ((empty(B, T, D // 2), x), {})),
        "attention": ("npu_fusion_attention", ((*flat, H, "BSH"), causal)),
        "attention, heads first": ("npu_fusion_attention", ((*split, H, "BNSD"), causal)),
        "packed attention": ("npu_fusion_attention", ((*flat, H, "BSH"), whole)),
        "attention_grad": ("npu_fusion_attention_grad", ((*flat, flat[0], H, "BSH"), {**causal, **kept, "attention_in": flat[0]})),
        "attention_grad, heads first": ("npu_fusion_attention_grad", ((*split, split[0], H, "BNSD"), {**whole, **kept, "attention_in": split[0]})),
        "decoding": ("npu_fused_infer_attention_score", ((empty(B, H, 1, K), keys, keys), {**infer, **wide_mask})),
        "decoding, flat": ("npu_fused_infer_attention_score", (flat, {**infer, "input_layout": "BSH"})),
        "decoding with lse": ("npu_fused_infer_attention_score", ((empty(B, H, 1, K), keys, keys), {**infer, "softmax_lse_flag": True})),
        "write_cache": ("npu_scatter_nd_update", ((cache, slots, empty(B, T, G, K)), {})),
        "write_cache_": ("npu_scatter_nd_update_", ((cache, slots, empty(B, T, G, K)), {})),
    }  # fmt: skip


def outlines(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, list[Any]]:
    """What each case returns: of a tensor its shape, strides and dtype, anything else as it is."""
    made = calls(device, dtype)
    assert {op for op, _ in made.values()} == {fake.__name__ for fake in FAKES}
    return {name: outline(getattr(torch.ops.npu, op)(*args, **kwargs)) for name, (op, (args, kwargs)) in made.items()}


def outline(output: Any) -> list[Any]:
    if isinstance(output, tuple | list):
        return [outline(one) for one in output]
    return [list(output.shape), list(output.stride()), str(output.dtype)] if isinstance(output, Tensor) else [output]
