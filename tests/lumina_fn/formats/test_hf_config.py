"""config.json as transformers 4 and 5 write it, and models whose heads have norms of their own, as transformers' Chameleon."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import optree
import pytest
import torch

from lumina_fn import checkpoint, conversion, convert, model
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.formats import hf_config, names
from tests.support import folders
from tests.support.folders import SMALL, small_state, write_hf

FIVE = {name: value for name, value in SMALL.items() if name not in ("rope_theta", "torch_dtype")} | {
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 2,
    "sliding_window": None,
    "transformers_version": "5.24.0",
}


def test_a_config_of_transformers_5_is_the_one_of_4():
    assert hf_config.parse(FIVE, {}, "x") == hf_config.parse(SMALL, {}, "x")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_parameters.rope_type is 'yarn', supported is 'default'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor is 2.0, supported is none but rope_theta"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x', expected a positive number"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected an object"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0, and 500000.0 in rope_parameters"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding_attention'], supported is full_attention"),
        ({"layer_types": ["full_attention"]}, "supported is full_attention for every layer"),
        ({"sliding_window": 512}, "sliding_window is 512, supported is None"),
    ],
)  # fmt: skip
def test_what_is_not_neutral_is_refused_with_what_is_supported(changes, says):
    with pytest.raises(InputError) as refused:
        hf_config.parse({**FIVE, **changes}, {}, "x")
    assert says in str(refused.value)


@pytest.mark.parametrize("source", [SMALL, FIVE, None])
def test_what_is_written_says_the_base_of_the_angles_where_both_versions_look(source):
    cfg = ModelConfig(
        vocab=40, width=16, layers=2, heads=4, kv_heads=2, hidden=24, max_positions=64, eps=1e-6, rope_theta=5e5
    )
    for now in (cfg, replace(cfg, rope_theta=7e3)):
        written = hf_config.write(now, source)
        assert written["rope_theta"] == now.rope_theta
        assert written.get("rope_parameters", {}).get("rope_theta", now.rope_theta) == now.rope_theta
        assert written["model_type"] == "chameleon"
        assert hf_config.parse(json.loads(json.dumps(written)), {}, "x")[0] == now


CFG = ModelConfig(vocab=40, width=16, layers=2, heads=4, kv_heads=2, hidden=24, max_positions=64, head_norms=True)
TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def moved(cfg, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + 0.1 * torch.randn(t.shape, generator=generator), model.init(cfg))


def repeated(params, cfg):
    """The same model with a norm for each head."""
    whole = names.flatten(params)
    heads = {path: leaf.shape for path, leaf in names.flatten(model.init(cfg, device="meta")).items()}
    return names.unflatten(model.init(cfg, device="meta"), {path: t.expand(heads[path]) for path, t in whole.items()})


def test_equal_norms_of_heads_are_one_norm():
    shared = replace(CFG, head_norms=False)
    params = moved(shared)
    assert torch.equal(model.forward(repeated(params, CFG), TOKENS, CFG), model.forward(params, TOKENS, shared))


@pytest.mark.parametrize("way", ["native", "transformers", "native transformers", "transformers native"])
def test_norms_of_heads_are_kept_bit_by_bit(tmp_path, way):
    params = moved(CFG)
    checkpoint.save_model(tmp_path / "first", params, CFG)
    here = tmp_path / "first"
    for i, to in enumerate(way.split()):
        conversion.convert(here, tmp_path / str(i), conversion.WRITERS[to])
        here = tmp_path / str(i)
    found, cfg = checkpoint.load_model(here)
    assert cfg == CFG
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(params), strict=True))


def test_one_norm_is_written_for_each_head_on_request_and_read_back_as_one(tmp_path):
    first = write_hf(tmp_path / "first", small_state(), SMALL)
    assert convert.main([str(first), str(tmp_path / "t"), "--to", "hf", "--layout", "transformers"]) == 0
    written = folders.read_hf(tmp_path / "t")
    assert written["model.layers.1.self_attn.q_norm.weight"].shape == (4, 4)
    assert written["model.layers.1.self_attn.k_norm.bias"].shape == (2, 4)
    for to in ("hf", "mindspeed"):
        conversion.convert(tmp_path / "t", tmp_path / to, conversion.WRITERS[to])
        back, cfg = checkpoint.load_model(tmp_path / to, dtype=torch.bfloat16)
        assert not cfg.head_norms
        own = checkpoint.load_model(first, dtype=torch.bfloat16)[0]
        assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(back), optree.tree_leaves(own), strict=True))


@pytest.mark.parametrize("to", ["hf", "mindspeed"])
def test_norms_that_differ_are_not_made_one(tmp_path, to):
    checkpoint.save_model(tmp_path / "first", moved(CFG), CFG)
    with pytest.raises(
        InputError, match=r"blocks.0.q_norm.gain: each head has values of its own.*--layout transformers"
    ):
        conversion.convert(tmp_path / "first", tmp_path / "out", conversion.WRITERS[to])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--layout transformers: not of use with --to native"):
        convert.main([str(tmp_path / "first"), str(tmp_path / "out"), "--to", "native", "--layout", "transformers"])


def test_a_model_of_before_says_nothing_of_heads_and_is_read(tmp_path):
    shared = replace(CFG, head_norms=False)
    checkpoint.save_model(tmp_path / "a", moved(shared), shared)
    assert "head_norms" not in json.loads((tmp_path / "a/config.json").read_text())["model"]
    checkpoint.save_model(tmp_path / "b", moved(CFG), CFG)
    assert json.loads((tmp_path / "b/config.json").read_text())["model"]["head_norms"] is True
    assert checkpoint.read_config(tmp_path / "a") == shared


def test_the_masked_ids_of_transformers_are_those_of_the_model():
    for masked in ((), (7, 9)):
        cfg = replace(CFG, masked_ids=masked)
        for source in (None, SMALL | {"vocabulary_map": {"<image>": 3, "IMGIMGAZ": 7, "IMGIMGBZ": 9, "cat": 1}}):
            named = hf_config.write_chameleon(cfg, source)["vocabulary_map"]
            assert "<image>" in named
            assert tuple(sorted(i for name, i in named.items() if name.startswith("IMGIMG"))) == masked


THEIRS = """
import sys, torch
from transformers import AutoConfig, ChameleonConfig, ChameleonForConditionalGeneration as Chameleon
torch.manual_seed(0)
vq = dict(num_embeddings=8, embed_dim=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, resolution=32)
cfg = ChameleonConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      max_position_embeddings=64, vocabulary_map={"<image>": 5, "IMGIMGAZ": 7}, vq_config=vq)
own, tokens = Chameleon(cfg), torch.load(sys.argv[1] + "/tokens.pt")
for name, p in own.named_parameters():
    if "_norm." in name:
        torch.nn.init.normal_(p, 1.0, 0.3)
own.save_pretrained(sys.argv[1] + "/theirs")
ours = Chameleon.from_pretrained(sys.argv[1] + "/ours")
assert AutoConfig.from_pretrained(sys.argv[1] + "/ours").model_type == "chameleon"
with torch.no_grad():
    torch.save([own(input_ids=tokens).logits, ours(input_ids=tokens).logits], sys.argv[1] + "/logits.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make bench installs it)"
)
def test_transformers_loads_what_is_written_and_what_it_saves_is_read(tmp_path):
    shared = replace(CFG, head_norms=False, masked_ids=(7, 9))
    params = moved(shared)
    checkpoint.save_model(tmp_path / "native", params, shared)
    conversion.convert(tmp_path / "native", tmp_path / "ours", conversion.write_transformers)
    torch.save(TOKENS, tmp_path / "tokens.pt")
    subprocess.run([sys.executable, "-c", THEIRS, tmp_path], check=True, capture_output=True)
    of_theirs, of_ours = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(model.forward(params, TOKENS, shared), of_ours, rtol=1e-5, atol=1e-5)
    theirs, cfg = checkpoint.load_model(tmp_path / "theirs")
    assert cfg.head_norms
    assert cfg.masked_ids == (7,)
    torch.testing.assert_close(model.forward(theirs, TOKENS, cfg), of_theirs, rtol=1e-5, atol=1e-5)
