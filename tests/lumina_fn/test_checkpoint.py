import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lumina_fn import checkpoint, model, vq
from lumina_fn.config import LUMINA_7B, MOVQGAN_67M, MOVQGAN_102M, MOVQGAN_270M, ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.formats import hf_config, names, tensor_files
from lumina_fn.vocab import Ids
from tests.support import folders
from tests.support.folders import (
    SMALL,
    TOKENIZER,
    golden,
    identical,
    parameters,
    small_state,
    write_hf,
    write_mindspeed,
)

IDS = {"start": 1, "end": 2, "newline": 3, "sep": 4, "size0": 5, "code0": 10, "codes": 16}


def refused(path: Path, load=checkpoint.load_model) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("tree", "table", "keys"),
    [
        (model.init(LUMINA_7B, device="meta"), names.TRANSFORMER, "transformer/lumina_7B_keys.json"),
        (vq.init(MOVQGAN_67M, device="meta"), names.MOVQGAN, "movqgan/movqgan_67M_keys.json"),
        (vq.init(MOVQGAN_102M, device="meta"), names.MOVQGAN, "movqgan/movqgan_102M_keys.json"),
        (vq.init(MOVQGAN_270M, device="meta"), names.MOVQGAN, "movqgan/movqgan_270M_keys.json"),
    ],
)
def test_the_tables_give_exactly_the_reference_keys_and_back(tree, table, keys):
    expected = json.loads((folders.GOLDENS / keys).read_text())["keys"]
    flat = names.flatten(tree)
    assert {names.to_source(path, table): list(t.shape) for path, t in flat.items()} == expected
    assert [names.to_native(names.to_source(path, table), table) for path in flat] == list(flat)
    assert len(expected) == len(flat)


@pytest.mark.parametrize(
    "key", ["model.layers.01.mlp.up_proj.weight", "model.layers.x.mlp.up_proj.weight", "lm_head.weight.0", "blocks.*.q"]
)
def test_a_key_that_only_resembles_one_of_the_table_is_unknown(key):
    assert names.to_native(key, names.TRANSFORMER) is None
    assert names.to_source(key, names.TRANSFORMER) is None


@pytest.mark.parametrize("name", ["t1_mha", "t2_gqa", "t3_swin", "t4_maskimg", "t5_trunc"])
@pytest.mark.parametrize("form", ["hf", "shards", "mindspeed"])
def test_a_golden_folder_gives_the_golden_logits(tmp_path, name, form):
    tensors, facts = golden(name)
    config = facts["config"] | {"vocabulary_map": {f"IMGIMG{i}": i for i in facts["image_token_ids"]} | {"A": 7}}
    if form == "mindspeed":
        folder = write_mindspeed(tmp_path / "m", parameters(tensors), iteration=3)
        (folder / "config.json").write_text(json.dumps(config))
    else:
        folder = write_hf(tmp_path / "m", parameters(tensors), config, shards=3 if form == "shards" else 1)
    params, cfg = checkpoint.load_model(folder)
    torch.testing.assert_close(model.forward(params, tensors["input_ids"], cfg), tensors["logits"], atol=1e-5, rtol=0)


def test_a_mindspeed_folder_without_config_has_its_tensors_sizes_and_the_7b_settings(tmp_path):
    _, cfg = checkpoint.load_model(write_mindspeed(tmp_path / "m", small_state()))
    assert cfg == replace(LUMINA_7B, vocab=40, width=16, layers=2, heads=4, kv_heads=2, hidden=24)


def test_sizes_that_the_config_leaves_out_are_read_off_the_tensors(tmp_path):
    _, cfg = checkpoint.load_model(write_hf(tmp_path / "m", small_state(), {"model_type": "chameleon"}))
    assert (cfg.vocab, cfg.width, cfg.layers, cfg.heads, cfg.kv_heads, cfg.hidden) == (40, 16, 2, 4, 2, 24)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True), ("mlp_bias", True), ("model_parallel_size", 2), ("pad_token_id", 1), ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 2}), ("hidden_act", "gelu"), ("sliding_window", 4096), ("head_dim", 8),
        ("hidden_size", "wide"), ("num_hidden_layers", 10**12), ("num_hidden_layers", 3000), ("vocab_size", 0), ("rms_norm_eps", -1),
        ("num_key_value_heads", 3), ("num_attention_heads", 5), ("mask_image_logits", True), ("mask_image_logits", "no"),
        ("vocabulary_map", [1]), ("ids", {"start": 1}), ("swin_norm", 1),
    ],
)  # fmt: skip
def test_a_config_field_that_cannot_be_honoured_is_named(tmp_path, field, value):
    message = refused(write_hf(tmp_path / "m", small_state(), SMALL | {field: value}))
    assert (field if value != 3000 else "3000 layers") in message


def test_all_options_of_the_optional_golden_are_named_at_once(tmp_path):
    options = {"attention_bias": True, "mlp_bias": True, "model_parallel_size": 2, "pad_token_id": 1}
    message = refused(write_hf(tmp_path / "m", small_state(), SMALL | options))
    assert all(name in message for name in options)


def test_fields_that_change_nothing_are_accepted_and_dropout_is_reported(tmp_path, caplog):
    neutral = {
        "dropout": 0.05,
        "z_loss_weight": 1e-5,
        "bos_token_id": 1,
        "use_cache": True,
        "vq_config": {"a": 1},
        "attention_dropout": 0.0,
    }
    with caplog.at_level(logging.WARNING):
        checkpoint.load_model(write_hf(tmp_path / "m", small_state(), SMALL | neutral))
    assert [r.getMessage() for r in caplog.records] == ["dropout = 0.05 is not applied"]


@pytest.mark.parametrize(
    ("mask", "expected"), [({}, (7, 9)), ({"mask_image_logits": True}, (7, 9)), ({"mask_image_logits": False}, ())]
)
def test_silence_about_image_logits_means_mask_them(mask, expected):
    config = {k: v for k, v in SMALL.items() if k != "mask_image_logits"} | mask
    named = config | {"vocabulary_map": {"IMGIMGB": 9, "IMGIMGA": 7, "word": 8}}
    assert hf_config.parse(named, {}, "config.json")[0].masked_ids == expected
    if not mask:
        assert hf_config.parse(config, {}, "config.json")[0].masked_ids == ()


def test_ids_come_from_the_config_else_from_the_tokenizer(tmp_path):
    folder = write_hf(tmp_path / "m", small_state(), SMALL)
    assert checkpoint.load_model(folder)[1].ids is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    assert checkpoint.load_model(folder)[1].ids.start == 151_665
    (folder / "config.json").write_text(json.dumps(SMALL | {"ids": IDS}))
    assert checkpoint.load_model(folder)[1].ids == Ids(**IDS)


def test_the_released_vocabulary_has_the_released_ids():
    with pytest.raises(InputError, match=r"ids.start is 1, the released vocabulary has 151665"):
        hf_config.parse(SMALL | {"vocab_size": 171_385, "ids": IDS}, {}, "config.json")


def test_all_missing_unknown_and_misshapen_tensors_are_listed(tmp_path):
    state = small_state()
    gone = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")
    for key in gone:
        del state[key]
    state |= {
        "stranger": torch.zeros(1),
        "model.norm.weight": torch.zeros(3),
        "lm_head.weight": torch.zeros(40, 16, dtype=torch.int64),
    }
    message = refused(write_hf(tmp_path / "m", state, SMALL))
    for key in (*gone, "stranger", "model.norm.weight", "lm_head.weight"):
        assert key in message
    assert "model.layers.0" not in message


def test_the_unused_vq_is_ignored_and_listed(tmp_path, caplog):
    state = small_state() | {
        "model.vqmodel.encoder.conv_in.weight": torch.zeros(2),
        "model.vqmodel.\x1b[31m": torch.zeros(1),
    }
    checkpoint.load_model(write_hf(tmp_path / "m", state, SMALL))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "2 entries" in message
    assert "model.vqmodel.encoder.conv_in.weight" in message
    assert "\x1b" not in message


def test_wrong_folders_say_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "expected" in refused(tmp_path / "empty")
    folder = write_hf(tmp_path / "m", small_state(), SMALL)
    assert "is a file" in refused(folder / "model.safetensors")
    assert "expected a MoVQGAN" in refused(folder, checkpoint.load_vq)
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)
    (folder / "config.json").write_text("[" * 100_000)
    assert "not JSON" in refused(folder)
    (folder / "config.json").write_text('{"format": "lumina_fn/9", "kind": "lumina"}')
    assert "lumina_fn/9" in refused(folder)
    write_mindspeed(tmp_path / "s", small_state())
    (tmp_path / "s" / "latest_checkpointed_iteration.txt").write_text("2000")
    assert "2000" in refused(tmp_path / "s")


def test_a_truncated_or_damaged_safetensors_file_is_named(tmp_path):
    folder = write_hf(tmp_path / "m", small_state(), SMALL)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for data in (
        whole[:-1],
        whole[:200],
        whole[:4],
        b"",
        whole + b"x",
        b"\xff" * 8 + whole[8:],
        whole.replace(b"BF16", b"F32 ", 1),
    ):
        file.write_bytes(data)
        assert str(file) in refused(folder)


def test_an_index_names_files_of_its_own_folder_only(tmp_path):
    folder = write_hf(tmp_path / "m", small_state(), SMALL, shards=2)
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "outside.safetensors")
    assert "model-00002-of-00002.safetensors" in refused(folder)
    (folder / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "outside" in refused(folder)
    index.write_text(index.read_text().replace("model-00002-of-00002", "../outside"))
    assert "outside" in refused(folder)


def test_the_snapshot_of_a_hugging_face_cache_loads(tmp_path):
    folder = write_hf(tmp_path / "repo" / "snapshots" / "abc", small_state(), SMALL)
    (tmp_path / "repo" / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "repo" / "blobs" / file.name)
        file.symlink_to(Path("..", "..", "blobs", file.name))
    assert checkpoint.load_model(folder)[1].vocab == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_model_comes_back_the_same(tmp_path, dtype):
    cfg = ModelConfig(40, 16, 2, 4, 2, 24, 64, 1e-6, 5e5, True, (7, 9), Ids(**IDS))
    params = model.init(cfg, seed=3, dtype=dtype)
    checkpoint.save_model(tmp_path / "n", params, cfg)
    back, again = checkpoint.load_model(tmp_path / "n", dtype=dtype)
    assert again == cfg
    assert type(back) is model.Params
    assert identical(names.flatten(back), names.flatten(params))
    with pytest.raises(InputError, match="exists"):
        checkpoint.save_model(tmp_path / "n", params, cfg)
    checkpoint.renew_model(tmp_path / "n", params, replace(cfg, masked_ids=()))
    assert checkpoint.load_model(tmp_path / "n")[1].masked_ids == ()


def test_a_saved_model_takes_over_the_tokenizer_and_the_hugging_face_config(tmp_path):
    source = write_hf(tmp_path / "m", small_state(), SMALL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, source)
    (source / "secret.txt").write_text("stays here")
    params, cfg = checkpoint.load_model(source)
    checkpoint.save_model(tmp_path / "n", params, cfg, source=source)
    checkpoint.save_model(tmp_path / "n2", params, cfg, source=tmp_path / "n")
    for folder in (tmp_path / "n", tmp_path / "n2"):
        assert sorted(p.name for p in folder.iterdir()) == [
            ".lumina.json", "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
        assert (folder / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert (config["format"], config["kind"], config["source_config"]) == ("lumina_fn/1", "lumina", SMALL)
        assert config["ids"]["start"] == 151_665


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
    cfg = ModelConfig(40, 16, 2, 4, 2, 24)
    with pytest.raises(ValueError, match=re.escape("blocks.2.q")):
        checkpoint.save_model(tmp_path / "n", model.init(replace(cfg, layers=3)), cfg)
    assert list(tmp_path.iterdir()) == []


def test_the_native_config_is_checked(tmp_path):
    cfg = ModelConfig(40, 16, 2, 4, 2, 24)
    checkpoint.save_model(tmp_path / "n", model.init(cfg), cfg)
    file = tmp_path / "n" / "config.json"
    good = json.loads(file.read_text())
    for change in (
        {"vocab": -1},
        {"extra": 1},
        {"masked_ids": [40]},
        {"masked_ids": 3},
        {"heads": 3},
        {"layers": 1},
        {"width": [16]},
    ):
        file.write_text(json.dumps(good | {"model": good["model"] | change}))
        refused(tmp_path / "n")
    file.write_text(json.dumps(good | {"kind": ["lumina"]}))
    refused(tmp_path / "n")


@pytest.mark.parametrize("name", ["m1_real_like_ch32", "m2_small_ch32_122"])
@pytest.mark.parametrize("lightning", [True, False])
def test_a_movqgan_checkpoint_gives_the_golden_codes(tmp_path, name, lightning, caplog):
    tensors, facts = golden(name)
    state = parameters(tensors) | {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "ema_encoder.conv_in.weight": torch.zeros(1),
    }
    torch.save(
        {"state_dict": state, "epoch": 3} if lightning else state | {"model_ema.decay": torch.tensor(0.9)},
        tmp_path / "m.ckpt",
    )
    params, cfg = checkpoint.load_vq(tmp_path / "m.ckpt" if lightning else tmp_path)
    assert (cfg.groups, cfg.codes, cfg.res_blocks) == (32, facts["n_embed"], facts["ddconfig"]["num_res_blocks"])
    assert list(cfg.multipliers) == facts["ddconfig"]["ch_mult"]
    assert "loss.discriminator.main.0.weight" in caplog.text
    assert "ema_encoder.conv_in.weight" in caplog.text
    case = min((c for c in facts["cases"]), key=lambda c: c["height"])["tag"]
    margin = tensors[f"{case}.argmin_margin"] > 1e-4
    codes = vq.encode(params, tensors[f"{case}.image"], cfg).flatten()
    assert torch.equal(codes[margin], tensors[f"{case}.indices"][margin])
    checkpoint.save_vq(tmp_path / "n", params, cfg)
    back, again = checkpoint.load_vq(tmp_path / "n")
    assert again == cfg
    assert identical(names.flatten(back), names.flatten(params))


def test_a_movqgan_with_wrong_tensors_lists_them(tmp_path):
    state = parameters(golden("m2_small_ch32_122")[0])
    del state["decoder.up.1.block.0.conv1.weight"]
    torch.save(state | {"decoder.more": torch.zeros(1), "encoder.norm_out.bias": torch.zeros(3)}, tmp_path / "m.ckpt")
    message = refused(tmp_path, checkpoint.load_vq)
    for key in ("decoder.up.1.block.0.conv1.weight", "decoder.more", "encoder.norm_out.bias"):
        assert key in message
    torch.save(small_state(), tmp_path / "m.ckpt")
    assert "no MoVQGAN" in refused(tmp_path, checkpoint.load_vq)
    torch.save({}, tmp_path / "second.ckpt")
    assert "2 of these" in refused(tmp_path, checkpoint.load_vq)


def test_our_safetensors_files_are_what_the_library_reads_and_writes(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    tensor_files.write_safetensors(tmp_path / "ours", tensors, lambda n: None)
    save_file(tensors, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        with safe_open(tmp_path / name, "pt") as file:
            assert identical({key: file.get_tensor(key) for key in file.keys()}, tensors)  # noqa: SIM118
        found = tensor_files.safetensors_header(tmp_path / name)
        assert identical({key: tensor_files.read(t, "cpu", t.dtype) for key, t in found.items()}, tensors)


def test_large_tensors_are_read_and_split_into_shards_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK", 24)
    monkeypatch.setattr(tensor_files, "SHARD", 200)
    tensors = {f"t{i}": torch.randn(3 + 7 * i, 2) for i in range(6)}
    tensor_files.write_shards(tmp_path, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) > 2
    found = {k: t for path in tmp_path.glob("*.safetensors") for k, t in tensor_files.safetensors_header(path).items()}
    assert {k: t.file.name for k, t in found.items()} == index["weight_map"]
    assert identical({k: tensor_files.read(t, "cpu", t.dtype) for k, t in found.items()}, tensors)
