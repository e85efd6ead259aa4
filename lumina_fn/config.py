"""The sizes of the models as frozen dataclasses: hashable, and safe to close over in a traced step."""

from dataclasses import dataclass

from lumina_fn.vocab import Ids


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the transformer; the defaults are those of the released 7.88B model."""

    vocab: int = 171_385  # V
    width: int = 4096  # D
    layers: int = 32
    heads: int = 32  # H
    kv_heads: int = 32  # G, divides H: each key and value head serves H / G query heads
    hidden: int = 11_008  # F, the gated MLP's inner width
    max_positions: int = 10_240  # longer items are truncated
    eps: float = 1e-5  # of the RMS norms; the per-head norms of q and k have 1e-5 fixed
    rope_theta: float = 10_000.0
    swin_norm: bool = False  # x + norm(f(x)) instead of x + f(norm(x))
    masked_ids: tuple[int, ...] = ()  # ids whose logits are set to the least float32 (`mask_image_logits`)
    ids: Ids | None = None  # read from the model's folder; a model without them runs but cannot be sampled
    head_norms: bool = False  # each head has gains of its own in q_norm and k_norm, as in transformers' Chameleon

    @property
    def head_width(self) -> int:
        """K, the width of an attention head."""
        return self.width // self.heads


@dataclass(frozen=True)
class VQConfig:
    """Sizes of the MoVQGAN; the feature maps of level i have 1 / 2^i of the picture's side."""

    channels: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2  # per level in the encoder; one more in the decoder
    attn_levels: tuple[int, ...] = (3,)
    latent: int = 4  # channels between encoder and quantizer convolution (z_channels)
    embed: int = 4  # width of a codebook row
    codes: int = 16_384
    groups: int = 32  # of every GroupNorm

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, along a side."""
        return 2 ** (len(self.multipliers) - 1)


LATER = {"head_norms": False}  # fields of ModelConfig that files of earlier versions lack, and what those models had
LUMINA_7B = ModelConfig()
MOVQGAN_67M = VQConfig(channels=128)
MOVQGAN_102M = VQConfig(channels=128, res_blocks=4)
MOVQGAN_270M = VQConfig()
