"""Our weights under other libraries' names: transformers' Chameleon, and diffusers' VQModel with spatial norms.

Both are imported when they are called: a side of ours holds neither in memory.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from lumina_fn import vq
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.model import Params
from lumina_fn.vq import AnyNorm, Attention, Coder, Conv, Res, SpatialNorm

Named = Iterator[tuple[str, Tensor]]


def chameleon(params: Params, cfg: ModelConfig) -> nn.Module:
    """transformers' model of these parameters, which it shares. Its picture tokenizer is as small as it can be, and not used."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    tiny = {
        "base_channels": 32, "embed_dim": 32, "latent_channels": 32, "num_embeddings": 64, "resolution": 32,
        "channel_multiplier": [1, 1],
    }  # fmt: skip
    theirs = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=cfg.hidden, num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, max_position_embeddings=cfg.max_positions,
            rms_norm_eps=cfg.eps, attn_implementation="sdpa", vq_config=tiny, vocabulary_map={"<image>": 5, "IMGIMGA": 6},
        )
    )  # fmt: skip
    own = {name: x for name, x in theirs.state_dict().items() if ".vqmodel." in name}
    theirs.load_state_dict(own | dict(_chameleon(params, cfg)), assign=True)
    return theirs


def _chameleon(params: Params, cfg: ModelConfig) -> Named:
    yield "model.embed_tokens.weight", params.embed
    for i, p in enumerate(params.blocks):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", p.attn_norm
        yield f"{layer}.post_attention_layernorm.weight", p.mlp_norm
        for name, weight in (("q", p.q), ("k", p.k), ("v", p.v), ("o", p.out)):
            yield f"{layer}.self_attn.{name}_proj.weight", weight
        for name, norm, heads in (("q", p.q_norm, cfg.heads), ("k", p.k_norm, cfg.kv_heads)):
            # Theirs has a gain and a bias for each head.
            yield f"{layer}.self_attn.{name}_norm.weight", norm.gain.repeat(heads, 1)
            yield f"{layer}.self_attn.{name}_norm.bias", norm.bias.repeat(heads, 1)
        for name, weight in (("gate", p.gate), ("up", p.up), ("down", p.down)):
            yield f"{layer}.mlp.{name}_proj.weight", weight
    yield "model.norm.weight", params.head.norm
    yield "lm_head.weight", params.head.unembed


def movq(params: vq.Params, cfg: VQConfig) -> nn.Module:
    """diffusers' model of these parameters, which it shares."""
    from diffusers import VQModel

    levels = range(len(cfg.multipliers))
    kinds = lambda plain, attending: tuple(attending if i in cfg.attn_levels else plain for i in levels)
    theirs = VQModel(
        down_block_types=kinds("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=kinds("UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
        block_out_channels=tuple(cfg.channels * m for m in cfg.multipliers), layers_per_block=cfg.res_blocks,
        latent_channels=cfg.latent, num_vq_embeddings=cfg.codes, norm_num_groups=cfg.groups, vq_embed_dim=cfg.embed,
        norm_type="spatial",
    )  # fmt: skip
    theirs.load_state_dict(dict(_movq(params)), assign=True)
    return theirs.eval()


def _movq(params: vq.Params) -> Named:
    yield "quantize.embedding.weight", params.codebook
    yield from _conv("quant_conv", params.quant_conv)
    yield from _conv("post_quant_conv", params.post_quant_conv)
    yield from _coder("encoder", params.encoder, "down_blocks", "downsamplers", list(params.encoder.levels))
    yield from _coder("decoder", params.decoder, "up_blocks", "upsamplers", list(params.decoder.levels[::-1]))


def _coder(at: str, p: Coder, blocks: str, resamplers: str, levels: list[vq.Level]) -> Named:
    yield from _conv(f"{at}.conv_in", p.conv_in)
    for i, level in enumerate(levels):
        for j, res in enumerate(level.blocks):
            yield from _res(f"{at}.{blocks}.{i}.resnets.{j}", res)
        for j, attention in enumerate(level.attentions):
            yield from _attention(f"{at}.{blocks}.{i}.attentions.{j}", attention)
        for conv in level.resample:
            yield from _conv(f"{at}.{blocks}.{i}.{resamplers}.0.conv", conv)
    yield from _res(f"{at}.mid_block.resnets.0", p.middle.block1)
    yield from _attention(f"{at}.mid_block.attentions.0", p.middle.attention)
    yield from _res(f"{at}.mid_block.resnets.1", p.middle.block2)
    yield from _norm(f"{at}.conv_norm_out", p.norm_out)
    yield from _conv(f"{at}.conv_out", p.conv_out)


def _res(at: str, p: Res) -> Named:
    yield from _norm(f"{at}.norm1", p.norm1)
    yield from _conv(f"{at}.conv1", p.conv1)
    yield from _norm(f"{at}.norm2", p.norm2)
    yield from _conv(f"{at}.conv2", p.conv2)
    for shortcut in p.shortcut:
        yield from _conv(f"{at}.conv_shortcut", shortcut)


def _attention(at: str, p: Attention) -> Named:
    yield from _norm(f"{at}.{'spatial_norm' if isinstance(p.norm, SpatialNorm) else 'group_norm'}", p.norm)
    for name, conv in (("to_q", p.q), ("to_k", p.k), ("to_v", p.v), ("to_out.0", p.out)):
        yield f"{at}.{name}.weight", conv.weight[:, :, 0, 0]  # a linear layer there
        yield f"{at}.{name}.bias", conv.bias


def _norm(at: str, p: AnyNorm) -> Named:
    if isinstance(p, SpatialNorm):
        yield from _norm(f"{at}.norm_layer", p.norm)
        yield from _conv(f"{at}.conv_y", p.gain)
        yield from _conv(f"{at}.conv_b", p.bias)
    else:
        yield f"{at}.weight", p.gain
        yield f"{at}.bias", p.bias


def _conv(at: str, p: Conv) -> Named:
    yield f"{at}.weight", p.weight
    yield f"{at}.bias", p.bias
