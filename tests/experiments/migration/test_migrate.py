"""A MindSpeed-MM guide becomes commands that say the same, or an error."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from experiments import finetune, migrate
from experiments.migration import field_rules
from lumina_fn import conversion, data
from lumina_fn.errors import InputError
from lumina_fn.process.flags import parse
from tests.support.extracted_features import write_alpha, write_mindspeed
from tests.support.folders import TOKENIZER as MODEL
from tests.support.mindspeed_guide import BASE, FILES, PREDICTOR, TRAIN, migrated, write_guide
from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """From pictures to a tuned model, pictures and both of the other formats, with the embedded default's small models."""
    guide, assets = tmp_path / "guide", ROOT / "experiments/demo/assets"
    for kind, place in (("hf", "w"), ("mindspeed", "converted")):
        conversion.convert(assets / "lm", guide / place, conversion.WRITERS[kind])
    config = json.loads((guide / "w/config.json").read_text())
    own = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    sizes = {field: config.get(own.get(field, field), PREDICTOR[field]) for field in PREDICTOR}
    extract = "feature_extract/data.json"
    write_guide(guide, [
        *(("model.json", f"predictor.{field}", size) for field, size in sizes.items()),
        (extract, "dataset_param.preprocess_parameters.target_size", 64),
        ("feature_extract/model.json", "ae.from_pretrained", str(assets / "vq")),
    ], devices=1, extra="--train-iters 2")  # fmt: skip
    (guide / "set/images").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (64, 64), (50 * i, 0, 0)).save(guide / f"set/images/{i}.png")
    rows = [
        {"file": f"set/images/{i}.png", "prompt": "a red heart"} for i in range(5)
    ]  # from the guide's working directory
    (guide / "set/data.json").write_text(json.dumps(rows))
    migrated(guide, tmp_path / "out")
    script = tmp_path / "out/commands.sh"
    script.write_text(script.read_text().replace("--steps", "--compile off --steps"))  # compiling takes minutes
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(data.FeatureSet(guide / "feats")) == 5
    assert (guide / "tuned-hf/model.safetensors").exists()
    assert (guide / "tuned-mindspeed/release").is_dir()
    assert list((guide / "tuned-pictures").glob("*.png"))


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_commands_say_what_the_guide_says(tmp_path, capsys):
    guide = write_guide(tmp_path / "guide")
    found = migrated(guide, tmp_path / "out")
    parsed = {}
    for module in ("pretokenize", "finetune", "sample"):
        kind = importlib.import_module(f"experiments.{module}").Settings
        parsed[module] = parse(kind, None, found[f"experiments.{module}"])
    pre, run, draw = parsed["pretokenize"], parsed["finetune"], parsed["sample"]
    assert (pre.data, pre.out, pre.model) == (guide / "set/data.json", guide / "feats", guide / "w")
    assert (pre.vq, pre.size, pre.image_root) == (guide / "vq.ckpt", 256, (guide,))
    assert (run.model, run.out) == (guide / "converted", guide / "tuned")
    assert value(found["experiments.finetune"], "--features") == str(guide / "feats")
    assert (run.steps, run.batch, run.micro_batch, run.warmup, run.seed) == (500, 32, 2, 3, 7)
    assert (run.lr, run.weight_decay, run.clip, run.z_weight, run.caption_drop) == (2e-5, 1e-2, 1.0, 1e-5, 0.1)
    assert (run.schedule, run.strategy, run.last, run.save_every, run.log_every) == ("constant", "sdp", "drop", 100, 1)
    assert (run.dtype, run.param_dtype, run.reduce_dtype) == ("bfloat16", "bfloat16", "float32")
    assert run.forward_prefetch
    assert run.backward_prefetch
    assert (draw.model, draw.width) == (guide / "tuned/model", 256)
    words = found["launch"]
    assert {"NPUS_PER_NODE=8", "NNODES=1", "MASTER_PORT=6000", "HCCL_CONNECT_TIMEOUT=1200"} <= set(words)
    assert (ROOT / words[words.index("bash") + 1]).is_file()
    printed = capsys.readouterr().out
    assert str(guide) in printed
    assert (tmp_path / "out/commands.sh").read_text().strip() in printed
    subprocess.run(["bash", "-n", tmp_path / "out/commands.sh"], check=True)


def test_every_field_has_a_line_in_the_report(tmp_path):
    guide = write_guide(tmp_path / "guide")
    migrated(guide, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    lines = {(line["file"], line["field"]) for line in report["fields"]}
    for name, value in FILES.items():
        short = name.removeprefix(f"{BASE}/")
        assert {(short, field) for field, _ in field_rules.flat(value)} <= lines
    flags = {("pretrain.sh", flag) for flag in re.findall(r"--[a-z0-9-]+(?=[ \n])", TRAIN) if "_" not in flag}
    assert flags <= lines
    assert {line["kind"] for line in report["fields"]} <= {"mapped", "not needed", "note"}
    assert all(line["here"] for line in report["fields"])
    table = (tmp_path / "out/report.md").read_text()
    assert table.count("\n|") == len(report["fields"]) + 2


@pytest.mark.parametrize("where", [".", BASE])
def test_the_example_folder_will_do_and_so_will_its_files_alone(tmp_path, where):
    guide = write_guide(tmp_path / "guide")
    expected = migrated(guide, tmp_path / "out")
    assert migrated(guide / where, tmp_path / "again") == expected
    (guide / BASE).rename(tmp_path / "loose")
    (guide / "mindspeed_mm/tools/tools.json").rename(tmp_path / "loose/tools.json")
    found = migrated(tmp_path / "loose", tmp_path / "third")
    replaced = {k: [w.replace(str(tmp_path / "loose"), str(guide)) for w in v] for k, v in found.items()}
    assert replaced == expected


def test_one_device_needs_no_launcher(tmp_path):
    found = migrated(write_guide(tmp_path / "guide", devices=1), tmp_path / "out")
    assert "launch" not in found
    run = parse(finetune.Settings, None, found["experiments.finetune"])
    assert run.batch == 4
    assert "torchrun" not in (tmp_path / "out/commands.sh").read_text()


def test_two_machines_run_the_same_script(tmp_path):
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    script.write_text(script.read_text().replace("NODES=${NODES:-1}", "NNODES=2\nNODES=$NNODES"))
    found = migrated(guide, tmp_path / "out")
    assert "experiments/launch/ascend_2x8.sh" in found["launch"]
    assert parse(finetune.Settings, None, found["experiments.finetune"]).batch == 64
    assert 'NODE_RANK="${NODE_RANK:-0}" ' in (tmp_path / "out/commands.sh").read_text()
    assert "| `NNODES` | 2 | mapped |" in (tmp_path / "out/report.md").read_text()


def test_features_that_are_there_are_used(tmp_path):
    guide = write_guide(tmp_path / "guide")
    write_mindspeed(guide / "feats", [(4, 4)])
    found = migrated(guide, tmp_path / "out")
    run = parse(migrate.Settings, None, found["experiments.migrate"])
    assert (run.source, run.out, run.model) == (guide / "feats", guide / "feats-lumina", guide / "w")
    assert value(found["experiments.finetune"], "--features") == str(guide / "feats-lumina")
    assert "experiments.pretokenize" not in found  # a comment


FSDP = "patch.use_fsdp1"


@pytest.mark.parametrize(
    ("changes", "extra", "words"),
    [
        ([("model.json", f"{FSDP}.param_dtype", "fp16")], "", ["param_dtype", "loss scaling"]),
        ([("model.json", f"{FSDP}.sharding_strategy", "zero3")], "", ["sharding_strategy", "zero3"]),
        ([("model.json", "predictor.mask_image_logits", True)], "", ["mask_image_logits"]),
        ([("model.json", "predictor.swin_norm", True)], "", ["swin_norm", "config.json"]),
        ([("model.json", "predictor.num_layers", 16)], "", ["num_layers 16", "num_hidden_layers"]),
        ([("model.json", "predictor.lora_rank", 8)], "", ["lora_rank", "not known"]),
        ([("model.json", "predictor.hidden_act", "gelu")], "", ["hidden_act"]),
        ([("feature_extract/data.json", "dataset_param.preprocess_parameters.patch_size", 16)], "", ["patch_size 16"]),
        ([("feature_extract/data.json", "dataset_param.preprocess_parameters.target_size", 256.5)], "", ["256.5"]),
        ([("feature_extract/data.json", "dataset_param.dataset_type", "t2v")], "", ["dataset_type t2v"]),
        ([("feature_extract/data.json", "dataset_param.tokenizer_config.from_pretrained", ...)], "", ["from_pretrained"]),
        ([("feature_data.json", "dataloader_param.shuffle", False)], "", ["shuffle False"]),
        ([("feature_data.json", "dataset_param.basic_parameters.data_config.path", "other/data.jsonl")], "", ["other"]),
        ([("feature_extract/model.json", "ae.from_pretrained", "vq\nrm -rf x")], "", ["control characters"]),
        ([], "--adam-beta2 0.999", ["--adam-beta2 0.999"]),
        ([], "--context-parallel-size 2", ["--context-parallel-size 2"]),
        ([], "--tensor-model-parallel-size 2", ["--tensor-model-parallel-size 2"]),
        ([], "--fp16", ["--fp16", "not known"]),
        ([], "--lr-decay-style linear", ["linear"]),
        ([], "--lr-decay-style cosine", ["cosine", "--min-lr"]),
        ([], "--lr", ["not a usable value"]),
        ([], "--rampup-batch-size 2 2 100", ["rampup", "belongs to no flag"]),
        ([], "--global-batch-size 9", ["--global-batch-size 9"]),
        ([], "--seed ?", ["whatever files"]),
        ([], "--seed " + "9" * 5000, ["not a usable value"]),
    ],
)  # fmt: skip
def test_what_would_change_results_is_refused_by_name(tmp_path, changes, extra, words):
    guide = write_guide(tmp_path / "guide", changes, extra=extra)
    with pytest.raises(InputError) as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_refusals_are_listed_at_once(tmp_path):
    changes = [("model.json", "predictor.mlp_bias", True), ("feature_extract/data.json", "extra", 1)]
    guide = write_guide(tmp_path / "guide", changes, extra="--adam-eps 1e-6 --sequence-parallel")
    with pytest.raises(InputError) as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert all(
        word in str(error.value) for word in ("mlp_bias", "extra 1", "--adam-eps", "--sequence-parallel", "4 of")
    )


def test_their_defaults_are_told_apart_from_ours(tmp_path):
    """Megatron's beta2 is 0.999 where the flag is missing, its schedule linear."""
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    script.write_text(re.sub("--adam-beta2 0.95|--lr-decay-style constant", "", script.read_text()))
    with pytest.raises(InputError, match=r"0.999 \(their default\)") as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert "linear" in str(error.value)


def test_a_config_beside_the_weights_says_what_the_model_is(tmp_path):
    guide = write_guide(tmp_path / "guide", [("model.json", "predictor.num_layers", 16)])
    (guide / "converted").mkdir()
    (guide / "converted/config.json").write_text('{"num_hidden_layers": 16}')
    migrated(guide, tmp_path / "out")


def test_dropout_is_a_note(tmp_path, capsys):
    migrated(write_guide(tmp_path / "guide", [("model.json", "predictor.dropout", 0.05)]), tmp_path / "out")
    assert "note: model.json: predictor.dropout 0.05" in capsys.readouterr().out


def test_configuration_files_outside_of_the_guide_are_not_read(tmp_path):
    guide = write_guide(tmp_path / "guide")
    model = guide / BASE / "model.json"
    (tmp_path / "model.json").write_text(model.read_text())
    model.unlink()
    model.symlink_to(tmp_path / "model.json")
    with pytest.raises(InputError, match="outside"):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


def test_features_need_their_model_and_a_guide_needs_none(tmp_path):
    write_alpha(tmp_path / "theirs", [(4, 4)])
    with pytest.raises(InputError, match="--model"):
        migrate.main([str(tmp_path / "theirs"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--model"):
        migrate.main([str(write_guide(tmp_path / "guide")), "--out", str(tmp_path / "out"), "--model", str(MODEL)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither"):
        migrate.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="no such folder"):
        migrate.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")])


def pieces(page: str) -> tuple[list[list[int]], list[str]]:
    """A page's tables, as the cells of each row, and its code blocks with what stands before them."""
    text = (ROOT / "docs" / page).read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = [[row.count("|") for row in table.splitlines()] for table in tables]
    blocks = re.findall(r"(?:<!--[^>]*-->\n)?^```\w*\n.*?^```$", text, re.MULTILINE | re.DOTALL)
    return cells, blocks


def test_the_chinese_page_has_the_same_tables_and_blocks():
    assert pieces("how-to/from-mindspeed.md") == pieces("zh/how-to/from-mindspeed.md")
    names = lambda page: [
        re.findall("`[^`]+`", line.split(" | ")[0])
        for line in (ROOT / "docs" / page).read_text().splitlines()
        if line.startswith("| `")
    ]
    assert names("how-to/from-mindspeed.md") == names("zh/how-to/from-mindspeed.md")
