"""MoVQGAN against the reference's numbers, and its laws."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from lumina_fn import vq
from lumina_fn.config import MOVQGAN_67M, MOVQGAN_102M, MOVQGAN_270M, VQConfig
from ops import conv
from tests.support import paths

GOLDENS = paths.GOLDENS / "movqgan"
M1 = VQConfig(channels=32, multipliers=(1, 2, 2, 4), res_blocks=2, attn_levels=(3,), codes=256)
M2 = VQConfig(channels=32, multipliers=(1, 1, 2), res_blocks=1, attn_levels=(1, 2), codes=300)
CASES = [("m1_real_like_ch32", M1, "sq64"), ("m1_real_like_ch32", M1, "r96x64"), ("m2_small_ch32_122", M2, "r48x80"), ("m2_small_ch32_122", M2, "sq32")]  # fmt: skip
TINY = VQConfig(channels=8, multipliers=(1, 2), res_blocks=1, attn_levels=(1,), codes=16, groups=4)


def reference_tree(tensors, cfg):
    """The reference's tensors in a tree, by walking the tree beside the reference's names."""
    take = lambda key: tensors[key]

    def build(node, key):
        match node:
            case vq.Conv():
                return vq.Conv(take(key + ".weight"), take(key + ".bias"))
            case vq.GroupNorm():
                return vq.GroupNorm(take(key + ".weight"), take(key + ".bias"))
            case vq.SpatialNorm():
                return vq.SpatialNorm(
                    build(node.norm, key + ".norm_layer"),
                    build(node.gain, key + ".conv_y"),
                    build(node.bias, key + ".conv_b"),
                )
            case vq.Res():
                parts = (build(getattr(node, n), f"{key}.{n}") for n in ("norm1", "conv1", "norm2", "conv2"))
                return vq.Res(*parts, tuple(build(c, key + ".nin_shortcut") for c in node.shortcut))
            case vq.Attention():
                return vq.Attention(
                    *(build(c, f"{key}.{n}") for c, n in zip(node, ("norm", "q", "k", "v", "proj_out"), strict=True))
                )
            case vq.Middle():
                return vq.Middle(
                    *(build(c, f"{key}.{n}") for c, n in zip(node, ("block_1", "attn_1", "block_2"), strict=True))
                )

    def coder(node, key, levels, resample):
        def level(part, key):
            blocks = tuple(build(b, f"{key}.block.{j}") for j, b in enumerate(part.blocks))
            attentions = tuple(build(a, f"{key}.attn.{j}") for j, a in enumerate(part.attentions))
            return vq.Level(blocks, attentions, tuple(build(c, f"{key}.{resample}.conv") for c in part.resample))

        walked = tuple(level(part, f"{key}.{levels}.{i}") for i, part in enumerate(node.levels))
        return vq.Coder(
            build(node.conv_in, key + ".conv_in"),
            walked,
            build(node.middle, key + ".mid"),
            build(node.norm_out, key + ".norm_out"),
            build(node.conv_out, key + ".conv_out"),
        )

    meta = vq.init(cfg, device="meta")
    return vq.Params(
        coder(meta.encoder, "encoder", "down", "downsample"), coder(meta.decoder, "decoder", "up", "upsample"),
        take("quantize.embedding.weight"), build(meta.quant_conv, "quant_conv"), build(meta.post_quant_conv, "post_quant_conv"),
    )  # fmt: skip


def load(name, cfg):
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    return reference_tree(
        {k.removeprefix("param."): v.float() for k, v in tensors.items() if k.startswith("param.")}, cfg
    ), tensors


@pytest.mark.parametrize("winograd", [False, True])  # as large pictures with many channels are convolved
@pytest.mark.parametrize(("name", "cfg", "case"), CASES)
def test_golden(name, cfg, case, winograd, monkeypatch):
    if winograd:
        monkeypatch.setattr(conv, "WIDE", 1)
        monkeypatch.setattr(conv, "LARGE", 0)
    params, tensors = load(name, cfg)
    golden = lambda key: tensors[f"{case}.{key}"]
    image = golden("image")
    z = vq.latent(params, image, cfg)
    torch.testing.assert_close(z, golden("latent"), atol=1e-5, rtol=1e-5)
    codes = vq.encode(params, image, cfg)
    assert codes.dtype == torch.int64
    clear = golden("argmin_margin") > 1e-4
    assert clear.any()
    assert torch.equal(codes.flatten()[clear], golden("indices")[clear])
    near = lambda got, want: torch.testing.assert_close(got, want, atol=2e-5 * want.abs().max().item(), rtol=0)
    near(vq.decode_latent(params, golden("quant"), cfg), golden("decoded"))
    drawn = vq.decode(params, golden("indices").view(codes.shape), cfg)
    near(drawn, golden("decode_code"))
    off = (vq.pixels(drawn).int() - golden("decode_code_u8").int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 1e-3
    torch.testing.assert_close(image, golden("image_u8").permute(0, 3, 1, 2).float() / 127.5 - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "cfg"), [("67M", MOVQGAN_67M), ("102M", MOVQGAN_102M), ("270M", MOVQGAN_270M)])
def test_released_sizes(name, cfg):
    stated = json.loads((GOLDENS / f"movqgan_{name}_keys.json").read_text())
    tree = reference_tree({key: torch.empty(shape, device="meta") for key, shape in stated["keys"].items()}, cfg)
    shapes = [t.shape for t in tree_leaves(vq.init(cfg, device="meta"))]
    assert [t.shape for t in tree_leaves(tree)] == shapes
    assert len({id(t) for t in tree_leaves(tree)}) == stated["n_keys"]
    assert sum(s.numel() for s in shapes) == stated["param_count"]


@pytest.fixture(scope="module")
def tiny():
    return vq.init(TINY, seed=1)


def pictures(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_batch_is_its_singles(tiny):
    image = pictures(3, 3, 6, 10)
    together = vq.latent(tiny, image, TINY)
    torch.testing.assert_close(together, torch.cat([vq.latent(tiny, one[None], TINY) for one in image]))
    codes = vq.encode(tiny, image, TINY)
    assert codes.shape == (3, 3, 5)
    drawn = vq.decode(tiny, codes, TINY)
    assert drawn.shape == image.shape
    torch.testing.assert_close(drawn, torch.cat([vq.decode(tiny, one[None], TINY) for one in codes]))


def test_memory_layout_changes_nothing(tiny):
    image = pictures(2, 3, 8, 12)
    torch.testing.assert_close(
        vq.latent(tiny, image.contiguous(memory_format=torch.channels_last), TINY), vq.latent(tiny, image, TINY)
    )


def test_nearest_is_the_least_squared_distance():
    codebook, z = pictures(40, 4), pictures(2, 4, 50, 30)  # more cells than are compared at once
    distance = (z.permute(0, 2, 3, 1)[..., None, :] - codebook).pow(2).sum(-1)
    assert torch.equal(vq.nearest(codebook, z), distance.argmin(-1))


def test_a_row_of_the_codebook_is_its_own_code(tiny):
    codes = torch.arange(TINY.codes).view(1, 4, 4)
    assert torch.equal(vq.nearest(tiny.codebook, vq.lookup(tiny.codebook, codes)), codes)


def test_sides_must_be_multiples(tiny):
    with pytest.raises(ValueError, match="multiples of 2"):
        vq.encode(tiny, pictures(1, 3, 6, 7), TINY)


def test_gradients_under_torch_func(tiny):
    image = pictures(1, 3, 4, 4)
    loss = lambda p: (vq.decode_latent(p, vq.latent(p, image, TINY), TINY) - image).square().mean()
    grads = torch.func.grad(loss)(tiny)
    assert all(g.isfinite().all() for g in tree_leaves(grads))
    assert grads.encoder.conv_in.weight.abs().sum() > 0


def test_seeds():
    same, again, other = (vq.init(TINY, seed=s).codebook for s in (3, 3, 4))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
