"""MoVQGAN, which turns pictures into codes and back, as pure functions over a tree of tensors.

Axes: B batch   C channels   H W positions at any level   h w latent cells   N codebook rows   E width of a codebook row
Encoder and decoder have the same tree structure; their norms differ and are passed as a callable, `norm(p, x)`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

import ops
from lumina_fn.config import VQConfig

NORM_EPS = 1e-6
ROWS = 2048  # latent cells compared with the codebook at once: [2048, 16384] distances are 128 MiB


class Conv(NamedTuple):
    """Weight and bias of a convolution."""

    weight: Float[Tensor, "O C kh kw"]
    bias: Float[Tensor, " O"]


class GroupNorm(NamedTuple):
    """Gain and bias of a group norm, per channel."""

    gain: Float[Tensor, " C"]
    bias: Float[Tensor, " C"]


class SpatialNorm(NamedTuple):
    """A group norm whose gain and bias vary over the picture: 1 x 1 convolutions of the quantized latent."""

    norm: GroupNorm
    gain: Conv
    bias: Conv


AnyNorm = GroupNorm | SpatialNorm
Normalize = Callable[[AnyNorm, Tensor], Tensor]


class Res(NamedTuple):
    """The parameters of a residual block with two convolutions."""

    norm1: AnyNorm
    conv1: Conv
    norm2: AnyNorm
    conv2: Conv
    shortcut: tuple[Conv, ...]  # one convolution where the width changes, else empty


class Attention(NamedTuple):
    """The parameters of an attention block; its projections are 1 x 1 convolutions."""

    norm: AnyNorm
    q: Conv
    k: Conv
    v: Conv
    out: Conv


class Level(NamedTuple):
    """The blocks that work at one resolution, and the step to the next one."""

    blocks: tuple[Res, ...]
    attentions: tuple[Attention, ...]  # one after every block, or empty
    resample: tuple[Conv, ...]  # to the next coarser (encoder) or finer (decoder) level; empty at the last


class Middle(NamedTuple):
    """The blocks at the coarsest resolution."""

    block1: Res
    attention: Attention
    block2: Res


class Coder(NamedTuple):
    """The parameters of the encoder or of the decoder."""

    conv_in: Conv
    levels: tuple[Level, ...]  # finest first in both; the decoder applies them in reverse
    middle: Middle
    norm_out: AnyNorm
    conv_out: Conv


class Params(NamedTuple):
    """The parameters of the MoVQGAN."""

    encoder: Coder
    decoder: Coder
    codebook: Float[Tensor, "N E"]
    quant_conv: Conv
    post_quant_conv: Conv


def conv(
    p: Conv, x: Float[Tensor, "B C H W"], stride: int = 1, padding: int | None = None
) -> Float[Tensor, "B O H2 W2"]:
    """The convolution with zeros around the picture; padding None: half of the kernel, which keeps the size at stride 1."""
    if p.weight.shape[-1] == 3 and stride == 1 and padding is None:
        return ops.conv3x3(x, p.weight, p.bias)
    return F.conv2d(x, p.weight, p.bias, stride, p.weight.shape[-1] // 2 if padding is None else padding)


def group_norm(p: GroupNorm, x: Float[Tensor, "B C H W"], groups: int) -> Float[Tensor, "B C H W"]:
    """x with mean 0 and variance 1 over each group of channels, times gain plus bias per channel."""
    return F.group_norm(x, groups, p.gain, p.bias, NORM_EPS)


def spatial_norm(
    p: SpatialNorm, x: Float[Tensor, "B C H W"], zq: Float[Tensor, "B E h w"], groups: int
) -> Float[Tensor, "B C H W"]:
    """group_norm of x, times a gain plus a bias for each pixel, which are convolutions of the quantized latent zq."""
    # A 1 x 1 convolution commutes with nearest upsampling: convolve the latent cells and broadcast each result to its pixels.
    apart = rearrange(group_norm(p.norm, x, groups), "B C (h y) (w x) -> B C h y w x", h=zq.shape[-2], w=zq.shape[-1])
    over = lambda p: rearrange(conv(p, zq), "B C h w -> B C h 1 w 1")
    return rearrange(torch.addcmul(over(p.bias), apart, over(p.gain)), "B C h y w x -> B C (h y) (w x)")


def res(p: Res, x: Float[Tensor, "B C H W"], norm: Normalize) -> Float[Tensor, "B O H W"]:
    """x plus two convolutions of it, each after a norm and SiLU; the shortcut convolution changes the width of x."""
    # Reusing one name frees each intermediate result: at most three tensors of a large picture are in memory.
    y = norm(p.norm1, x)
    y = F.silu(y)
    y = conv(p.conv1, y)
    y = norm(p.norm2, y)
    y = F.silu(y)
    y = conv(p.conv2, y)
    for shortcut in p.shortcut:
        x = conv(shortcut, x)
    return x + y


def attention(p: Attention, x: Float[Tensor, "B C H W"], norm: Normalize) -> Float[Tensor, "B C H W"]:
    """x plus attention of every position over all positions, with one head and scale C^-0.5."""
    y = norm(p.norm, x)
    q, k, v = (rearrange(conv(w, y), "B C H W -> B 1 (H W) C") for w in (p.q, p.k, p.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return x + conv(p.out, rearrange(y, "B 1 (H W) C -> B C H W", H=x.shape[-2]))


def blocks(p: Level, norm: Normalize) -> Iterator[Callable[[Tensor], Tensor]]:
    """A level's blocks in order, as functions; applied one by one, each frees its intermediate results before the next."""
    for i, block in enumerate(p.blocks):
        yield partial(res, block, norm=norm)
        for attn in p.attentions[i : i + 1]:
            yield partial(attention, attn, norm=norm)


def middle(p: Middle, x: Float[Tensor, "B C h w"], norm: Normalize) -> Float[Tensor, "B C h w"]:
    """The output of the blocks at the coarsest resolution."""
    return res(p.block2, attention(p.attention, res(p.block1, x, norm), norm), norm)


def encoder(p: Coder, image: Float[Tensor, "B 3 H W"], cfg: VQConfig) -> Float[Tensor, "B z h w"]:
    """The encoder's output, which `quant_conv` turns into the latent."""
    norm = lambda n, x: group_norm(n, x, cfg.groups)
    x = conv(p.conv_in, image)
    for part in p.levels:
        for block in blocks(part, norm):
            x = block(x)
        for down in part.resample:
            x = conv(down, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    return conv(p.conv_out, F.silu(norm(p.norm_out, middle(p.middle, x, norm))))


def decoder(
    p: Coder, z: Float[Tensor, "B z h w"], zq: Float[Tensor, "B E h w"], cfg: VQConfig
) -> Float[Tensor, "B 3 H W"]:
    """The picture of the decoder's input z; its norms depend on the quantized latent zq."""
    norm = lambda n, x: spatial_norm(n, x, zq, cfg.groups)
    x = middle(p.middle, conv(p.conv_in, z), norm)
    for part in reversed(p.levels):
        for block in blocks(part, norm):
            x = block(x)
        for up in part.resample:
            x = conv(up, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return conv(p.conv_out, F.silu(norm(p.norm_out, x)))


def latent(params: Params, image: Float[Tensor, "B 3 H W"], cfg: VQConfig) -> Float[Tensor, "B E h w"]:
    """The latent that is quantized, of pictures in [-1, 1]. Raises ValueError unless the sides are multiples of cfg.downsampling."""
    if image.shape[-1] % cfg.downsampling or image.shape[-2] % cfg.downsampling:
        raise ValueError(
            f"a picture of {image.shape[-1]} x {image.shape[-2]}: sides must be multiples of {cfg.downsampling}"
        )
    return conv(params.quant_conv, encoder(params.encoder, image, cfg))


def nearest(codebook: Float[Tensor, "N E"], z: Float[Tensor, "B E h w"]) -> Int[Tensor, "B h w"]:
    """The codebook row at the least squared distance from each latent cell, compared in float32 or wider."""
    wide = torch.promote_types(z.dtype, torch.float32)
    rows, book = rearrange(z, "B E h w -> (B h w) E").to(wide), codebook.to(wide)
    squares = book.pow(2).sum(1)
    codes = [torch.addmm(squares, part, book.T, alpha=-2).argmin(1) for part in rows.split(ROWS)]
    return torch.cat(codes).unflatten(0, (z.shape[0], *z.shape[2:]))


def lookup(codebook: Float[Tensor, "N E"], codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B E h w"]:
    """The codebook row of each code."""
    return rearrange(F.embedding(codes, codebook), "B h w E -> B E h w")


def encode(params: Params, image: Float[Tensor, "B 3 H W"], cfg: VQConfig) -> Int[Tensor, "B h w"]:
    """The codes of pictures in [-1, 1], one for each cell of cfg.downsampling pixels a side. Raises ValueError as `latent` does."""
    return nearest(params.codebook, latent(params, image, cfg))


def decode_latent(params: Params, zq: Float[Tensor, "B E h w"], cfg: VQConfig) -> Float[Tensor, "B 3 H W"]:
    """The pictures of a quantized latent, about [-1, 1] and not clamped."""
    return decoder(params.decoder, conv(params.post_quant_conv, zq), zq, cfg)


def decode(params: Params, codes: Int[Tensor, "B h w"], cfg: VQConfig) -> Float[Tensor, "B 3 H W"]:
    """The pictures of these codes, about [-1, 1] and not clamped."""
    return decode_latent(params, lookup(params.codebook, codes), cfg)


def pixels(image: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    """Pictures in [-1, 1] as bytes 0..255, channels last."""
    return rearrange((image.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8), "B C H W -> B H W C")


def init(
    cfg: VQConfig, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Params:
    """Random parameters that preserve the size of signals approximately; with device="meta", shapes and dtypes only."""
    if torch.device(device).type == "meta":
        draw = torch.empty  # torch.randn imports PyTorch's compiler there, which takes two seconds
    else:
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(seed))
    normal = lambda *shape: draw(shape, device=device, dtype=dtype)
    ones = lambda n: torch.ones(n, device=device, dtype=dtype)
    zeros = lambda n: torch.zeros(n, device=device, dtype=dtype)
    widths = [cfg.channels * m for m in cfg.multipliers]
    last = len(widths) - 1

    def new_conv(source: int, target: int, k: int = 3, size: float = 1.0) -> Conv:
        return Conv(normal(target, source, k, k).mul_(size / (source * k * k) ** 0.5), zeros(target))

    group = lambda c: GroupNorm(ones(c), zeros(c))

    def spatial(c: int) -> SpatialNorm:
        gain, bias = new_conv(cfg.embed, c, 1), new_conv(cfg.embed, c, 1)
        return SpatialNorm(group(c), gain._replace(bias=ones(c)), bias)

    def coder(norm: Callable[[int], AnyNorm], inputs: int, outputs: int, plan: list[tuple[int, list[int]]]) -> Coder:
        """`plan`: for each level, finest first, the width that enters it and the widths after each of its blocks."""
        decoding = norm is spatial

        def new_res(source: int, target: int) -> Res:
            shortcut = (new_conv(source, target, 1),) if source != target else ()
            last = new_conv(target, target, size=0.1)  # a block is almost the identity at first
            return Res(norm(source), new_conv(source, target), norm(target), last, shortcut)

        new_attention = lambda c: Attention(norm(c), *(new_conv(c, c, 1, size) for size in (1.0, 1.0, 1.0, 0.1)))

        def new_level(i: int, source: int, targets: list[int]) -> Level:
            blocks = tuple(new_res(a, b) for a, b in zip([source, *targets[:-1]], targets, strict=True))
            attentions = tuple(new_attention(c) for c in targets if i in cfg.attn_levels)
            final = i == 0 if decoding else i == last
            return Level(blocks, attentions, () if final else (new_conv(targets[-1], targets[-1]),))

        first, deep = (widths[-1] if decoding else cfg.channels), widths[-1]
        return Coder(
            new_conv(inputs, first), tuple(new_level(i, *step) for i, step in enumerate(plan)),
            Middle(new_res(deep, deep), new_attention(deep), new_res(deep, deep)),
            norm(widths[0] if decoding else deep), new_conv(widths[0] if decoding else deep, outputs),
        )  # fmt: skip

    down = list(zip([cfg.channels, *widths[:-1]], ([w] * cfg.res_blocks for w in widths), strict=True))
    up = list(zip([*widths[1:], widths[-1]], ([w] * (cfg.res_blocks + 1) for w in widths), strict=True))
    return Params(
        coder(group, 3, cfg.latent, down), coder(spatial, cfg.latent, 3, up),
        normal(cfg.codes, cfg.embed), new_conv(cfg.latent, cfg.embed, 1), new_conv(cfg.embed, cfg.latent, 1),
    )  # fmt: skip
