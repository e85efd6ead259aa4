"""Per-head layer norm + rotary embedding in one pass for Ascend in Triton, forward and backward, which no vendor op covers.

kernels/reference.py is the specification. A program walks over tokens and holds all heads of one token, whose channels lie
next to each other in memory, as two tiles: channel j, in `a`, is turned against channel j + K/2, in `b`.
"""

# pyright: reportIndexIssue=false
# A function under triton.jit is indexed by its grid; where triton is not installed the type checker cannot know that.

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program for each of the 910B2's 48 vector cores: more would queue, and each leaves a row of dgain to be summed.
PROGRAMS = 48
# A tile is a token's heads. 32 heads of 128 channels fill at most 0.68 of the unified buffer (1572864 bits a core) with loads
# doubled to overlap arithmetic; 64 heads fit too, 128 do not.


@triton.jit
def _fwd(
    x, gain, bias, angles, y, mean, rstd, tokens, period, eps,
    H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    head, channel = tl.arange(0, HEADS), tl.arange(0, CHANNELS)
    wanted = channel < HALF
    inside = (head < H)[:, None] & wanted[None, :]
    gain_a = tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    gain_b = tl.load(gain + HALF + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    bias_a = tl.load(bias + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    bias_b = tl.load(bias + HALF + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        at = token * H * 2 * HALF + head[:, None] * 2 * HALF + channel[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        m = (tl.sum(a, 1) + tl.sum(b, 1)) / (2 * HALF)
        a = tl.where(inside, a - m[:, None], 0.0)
        b = tl.where(inside, b - m[:, None], 0.0)
        r = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
        a = a * r[:, None] * gain_a + bias_a
        b = b * r[:, None] * gain_b + bias_b
        turn = angles + (token % period) * 2 * HALF + channel
        cos = tl.load(turn, mask=wanted, other=0.0)[None, :]
        sin = tl.load(turn + HALF, mask=wanted, other=0.0)[None, :]
        tl.store(y + at, (a * cos - b * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(y + at + HALF, (b * cos + a * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(mean + token * H + head, m, mask=head < H)
        tl.store(rstd + token * H + head, r, mask=head < H)


@triton.jit
def _bwd(
    dy, x, gain, angles, mean, rstd, dx, dgain, dbias, tokens, period,
    H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    head, channel = tl.arange(0, HEADS), tl.arange(0, CHANNELS)
    wanted = channel < HALF
    inside = (head < H)[:, None] & wanted[None, :]
    gain_a = tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    gain_b = tl.load(gain + HALF + channel, mask=wanted, other=0.0).to(tl.float32)[None, :]
    # Summed over tokens head by head, and over heads once at the end.
    dgain_a, dgain_b = tl.zeros([HEADS, CHANNELS], tl.float32), tl.zeros([HEADS, CHANNELS], tl.float32)
    dbias_a, dbias_b = tl.zeros([HEADS, CHANNELS], tl.float32), tl.zeros([HEADS, CHANNELS], tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        at = token * H * 2 * HALF + head[:, None] * 2 * HALF + channel[None, :]
        turn = angles + (token % period) * 2 * HALF + channel
        cos = tl.load(turn, mask=wanted, other=0.0)[None, :]
        sin = tl.load(turn + HALF, mask=wanted, other=0.0)[None, :]
        turned_a = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        turned_b = tl.load(dy + at + HALF, mask=inside, other=0.0).to(tl.float32)
        da = turned_a * cos + turned_b * sin
        db = turned_b * cos - turned_a * sin
        m = tl.load(mean + token * H + head, mask=head < H, other=0.0)[:, None]
        r = tl.load(rstd + token * H + head, mask=head < H, other=0.0)[:, None]
        a = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m) * r
        b = (tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32) - m) * r
        dgain_a += da * a
        dgain_b += db * b
        dbias_a += da
        dbias_b += db
        da *= gain_a  # zero beyond HALF, where a and b are not
        db *= gain_b
        level = ((tl.sum(da, 1) + tl.sum(db, 1)) / (2 * HALF))[:, None]
        slope = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF))[:, None]
        tl.store(dx + at, (r * (da - level - a * slope)).to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + at + HALF, (r * (db - level - b * slope)).to(dx.dtype.element_ty), mask=inside)
    mine = tl.program_id(0) * 2 * HALF + channel
    tl.store(dgain + mine, tl.sum(dgain_a, 0), mask=wanted)
    tl.store(dgain + mine + HALF, tl.sum(dgain_b, 0), mask=wanted)
    tl.store(dbias + mine, tl.sum(dbias_a, 0), mask=wanted)
    tl.store(dbias + mine + HALF, tl.sum(dbias_b, 0), mask=wanted)


def qk_norm_rotary_fwd(
    x: Tensor, gain: Tensor, bias: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x [B T H K] over each head's K, times gain [1 K] plus bias, rotated; its mean and 1 / deviation [B T H 1].

    What lies between is float32 and rounded once, at the end. angles: cosines and sines, [T 2 K/2] or [B T 2 K/2], float32.
    """
    x, angles = x.contiguous(), angles.contiguous()
    y, mean = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rstd, (programs, tokens, period, sizes) = torch.empty_like(mean), _sizes(x, angles)
    args = x, gain.contiguous(), bias.contiguous(), angles, y, mean, rstd, tokens, period, eps
    _fwd[(programs,)](*args, **sizes)
    return y, mean, rstd


def qk_norm_rotary_bwd(
    dy: Tensor, x: Tensor, gain: Tensor, angles: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gain and bias."""
    x, angles = x.contiguous(), angles.contiguous()
    programs, tokens, period, sizes = _sizes(x, angles)
    dx = torch.empty_like(x)
    dgain, dbias = x.new_empty((2, programs, x.shape[-1]), dtype=torch.float32)
    args = dy.contiguous(), x, gain.contiguous(), angles, mean.contiguous(), rstd.contiguous(), dx, dgain, dbias
    _bwd[(programs,)](*args, tokens, period, **sizes)
    return dx, dgain.sum(0, keepdim=True).to(gain.dtype), dbias.sum(0, keepdim=True).to(gain.dtype)


def _sizes(x: Tensor, angles: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Programs, tokens, after how many tokens the angles begin anew, and the tiles: powers of two that hold H and K/2."""
    B, T, H, K = x.shape
    tiles = {"HEADS": triton.next_power_of_2(H), "CHANNELS": triton.next_power_of_2(K // 2)}
    return min(B * T, PROGRAMS), B * T, angles.numel() // K, {"H": H, "HALF": K // 2, **tiles}
