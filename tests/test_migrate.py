"""A MindSpeed-MM guide becomes commands that say the same, or an error; extracted features give back exactly what was extracted."""

import importlib
import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from experiments import finetune, migrate, migration_fields, migration_shell, settings
from lumina_fn import convert, data, imported, plain_pickle, prompt, shards
from lumina_fn.errors import InputError
from tests.folders import TOKENIZER as MODEL

TOKENIZER = prompt.load_tokenizer(MODEL)
ROOT = Path(__file__).parents[1]
BASE = "examples/lumina/mgpt2"
LOADER = {"dataloader_mode": "sampler", "sampler_type": "LuminaMetaLenDistSampler", "pin_memory": True, "collate_param": {}}  # fmt: skip
PREDICTOR = {
    "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 171385,
    "max_position_embeddings": 10240, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "swin_norm": False, "mask_image_logits": False,
    "attention_bias": False, "hidden_act": "silu", "rope_scaling": None, "pad_token_id": None, "dropout": 0.0, "vocabulary_map_path": "./w",
}  # fmt: skip
FILES = {
    f"{BASE}/feature_data.json": {
        "dataset_param": {"dataset_type": "lumina", "basic_parameters": {"data_config": {"path": "./feats/data.jsonl"}}, "preprocess_parameters": {"item_processor_type": "LoadFeatureItemProcessor"}},
        "dataloader_param": {**LOADER, "shuffle": True, "drop_last": True},
    },
    f"{BASE}/feature_extract/data.json": {
        "dataset_param": {
            "dataset_type": "lumina", "basic_parameters": {"data_config": {"path": "set/data.json"}},
            "preprocess_parameters": {"item_processor_type": "TokenizerItemProcessor", "patch_size": 32, "target_size": 256},
            "tokenizer_config": {"hub_backend": "hf", "autotokenizer_name": "luminaMGPT2Tokenizer", "from_pretrained": "./w/"},
        },
        "dataloader_param": {**LOADER, "shuffle": False, "drop_last": True},
    },
    f"{BASE}/feature_extract/model.json": {"ae": {"model_id": "movqvae", "from_pretrained": "./vq.ckpt", "ch": 256, "double_z": False, "resolution": 256}},
    f"{BASE}/model.json": {
        "predictor": PREDICTOR, "z_loss_weight": 1e-5,
        "patch": {"use_fsdp1": {"sharding_strategy": "sdp", "param_dtype": "bf16", "reduce_dtype": "fp32", "forward_prefetch": True, "backward_prefetch": "backward_pre"}},
    },
    "mindspeed_mm/tools/tools.json": {"sorafeature": {"save_path": "./feats"}, "profile": {"enable": False, "ranks": [0]}},
}  # fmt: skip
HEAD = """#!/bin/bash
source /usr/local/Ascend/cann/set_env.sh  # where CANN is
export HCCL_CONNECT_TIMEOUT=1200
export CUDA_DEVICE_MAX_CONNECTIONS=1
N={devices}
NODES=${{NODES:-1}}
MBS=2
GBS=$(($N*$NODES*$MBS*2))
LAUNCH="--nproc_per_node $N \\
    --nnodes $NODES --node_rank 0 --master_addr localhost --master_port 6000"
log=$(date +%s)
mkdir -p logs
"""
EXTRACT = (
    HEAD
    + """
torchrun $LAUNCH ./mindspeed_mm/tools/feature_extraction/get_lumina_feature.py --micro-batch-size ${{MBS}} --num-workers 0 \\
  --mm-data ./examples/lumina/mgpt2/feature_extract/data.json --mm-model ./examples/lumina/mgpt2/feature_extract/model.json \\
  --mm-tool ./mindspeed_mm/tools/tools.json | tee logs/a_${{log}}.log 2>&1
"""
)
TRAIN = HEAD + """
LOAD_PATH="./converted/"; SAVE_PATH='./tuned'
ARGS="
    --tensor-model-parallel-size 1 \\
    --lr 2e-5 --min-lr 2e-5 --lr-decay-style constant --lr-warmup-iters 3 \\
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 1e-2 --clip-grad 1.0 \\
    --train-iters 500 --seed 7 --bf16 --no-load-optim \\
"
torchrun $LAUNCH pretrain_lumina.py $ARGS --micro-batch-size $MBS --global-batch-size $GBS {extra} --log-interval 1 --save-interval 100 \\
    --mm-data ./examples/lumina/mgpt2/feature_data.json --mm-model ./examples/lumina/mgpt2/model.json \\
    --load $LOAD_PATH --save "$SAVE_PATH" --ckpt-format torch_dist 2>&1 | tee logs/b_${{log}}.log
find $SAVE_PATH -type d -exec chmod 750 {{}} \\;
TIME=`grep x logs/b_${{log}}.log | awk '{{print $1}}'`
"""  # fmt: skip


def write_guide(folder: Path, changes=(), devices=8, extra="") -> Path:
    """A guide folder; `changes` are (file's end, dotted field, value), where `...` removes the field."""
    for name, value in json.loads(json.dumps(FILES)).items():
        for file, field, new in changes:
            if name.endswith("mgpt2/" + file) or name.endswith("tools/" + file):
                *path, last = field.split(".")
                inner = value
                for key in path:
                    inner = inner[key]
                inner.update({last: new}) if new is not ... else inner.pop(last)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / BASE / "pretrain.sh").write_text(TRAIN.format(devices=devices, extra=extra))
    (folder / BASE / "feature_extract/feature_extraction.sh").write_text(EXTRACT.format(devices=devices))
    return folder


def migrated(guide: Path, out: Path) -> dict[str, list[str]]:
    """The written commands by what they start, as their flags."""
    migrate.main([str(guide), "--out", str(out)])
    found = {}
    for line in (out / "commands.sh").read_text().splitlines():
        words = shlex.split(line, comments=True)
        if "-m" in words:
            found[words[words.index("-m") + 1]] = words[words.index("-m") + 2 :]
        elif "bash" in words:
            found["launch"] = words
            found["experiments.finetune"] = words[words.index("bash") + 2 :]
    return found


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """From pictures to a tuned model, pictures and both of the other formats, with the embedded default's small models."""
    guide, assets = tmp_path / "guide", ROOT / "experiments/demo/assets"
    for kind, place in (("hf", "w"), ("mindspeed", "converted")):
        convert.convert(assets / "lm", guide / place, convert.WRITERS[kind])
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
        parsed[module] = settings.parse(kind, None, found[f"experiments.{module}"])
    pre, run, draw = parsed["pretokenize"], parsed["finetune"], parsed["sample"]
    assert (pre.data, pre.out, pre.model) == (guide / "set/data.json", guide / "feats", guide / "w")
    assert (pre.vq, pre.size, pre.image_root) == (guide / "vq.ckpt", 256, guide)
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
        assert {(short, field) for field, _ in migration_fields.flat(value)} <= lines
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
    run = settings.parse(finetune.Settings, None, found["experiments.finetune"])
    assert run.batch == 4
    assert "torchrun" not in (tmp_path / "out/commands.sh").read_text()


def test_two_machines_run_the_same_script(tmp_path):
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    script.write_text(script.read_text().replace("NODES=${NODES:-1}", "NNODES=2\nNODES=$NNODES"))
    found = migrated(guide, tmp_path / "out")
    assert "experiments/launch/ascend_2x8.sh" in found["launch"]
    assert settings.parse(finetune.Settings, None, found["experiments.finetune"]).batch == 64
    assert 'NODE_RANK="${NODE_RANK:-0}" ' in (tmp_path / "out/commands.sh").read_text()
    assert "| `NNODES` | 2 | mapped |" in (tmp_path / "out/report.md").read_text()


def test_features_that_are_there_are_used(tmp_path):
    guide = write_guide(tmp_path / "guide")
    write_mindspeed(guide / "feats", [(4, 4)])
    found = migrated(guide, tmp_path / "out")
    run = settings.parse(migrate.Settings, None, found["experiments.migrate"])
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


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("if true; then MBS=4; fi", "`if` is not read"),
        ("cd elsewhere", "`cd`"),
        ("eval $X", "`eval`"),
        ("source ./other.sh", "other.sh"),
        ("ARGS=(--lr 1)", "array"),
        ("MBS=`nproc`; export HCCL_EXEC_TIMEOUT=$MBS", "nproc"),
        ("N=$1", r"\$1"),
        ("N=$(nvidia-smi | wc -l)", "nvidia-smi"),
        ("N=$UNSET", "UNSET"),
        ("N=~/n", "home"),
        ("export HCCL_CONNECT_TIMEOUT=9", "120 to 7200"),
        ("export SOMETHING=1", "SOMETHING"),
        ("python other.py", "not torchrun"),
        ("[ -f x ] && MBS=4", "&&"),
        ("cat <<EOF", "not read"),
        ("A='open", "no end"),
    ],
)
def test_a_line_that_only_a_shell_could_follow_is_named(tmp_path, line, word):
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    script.write_text(script.read_text().replace('LAUNCH="', f'{line}\nLAUNCH="', 1))
    with pytest.raises(InputError, match=word):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("line", ["rm -rf $PWD", "echo $(touch hit)", "X=`touch hit`", "touch hit > hit", "date > hit"])
def test_nothing_of_a_script_is_run(tmp_path, line, monkeypatch):
    guide = write_guide(tmp_path / "guide")
    monkeypatch.chdir(guide)
    script = guide / BASE / "pretrain.sh"
    script.write_text(script.read_text().replace("mkdir", f"{line}\nmkdir", 1))
    with suppress(InputError):  # some of these lines are read, some are refused
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert script.exists()
    assert not list(tmp_path.rglob("hit"))


WORDS = st.lists(st.sampled_from(["a", "$A", '"$A b"', "'$A'", "${B}", "${C:-d e}", '"${C:-d e}"', "$((N*3-1))", "x$A$B", "\\$A", "#n", '"q\\"r"']), min_size=1, max_size=5)  # fmt: skip


@hypothesis_settings(max_examples=25, deadline=None)
@given(WORDS, st.sampled_from(["1 2", "", " s ", "-x"]), st.integers(0, 9))
def test_words_expand_as_bash_expands_them(words, a, n):
    """Bash, which is not used anywhere else, is the oracle."""
    text = f'A=\'{a}\'\nB="$A-"\nN={n}\nV="{{$N}}"\n'
    line = "torchrun " + " ".join(words)
    with_bash = subprocess.run(["bash", "-c", f'{text}torchrun() {{ printf "<%s>" "$@"; }}\n{line}'], capture_output=True, text=True)  # fmt: skip
    script = migration_shell.Script(Path("x"))
    for statement in migration_shell.statements(text + line):
        migration_shell._follow(script, statement)
    expected = with_bash.stdout if with_bash.stdout != "<>" or script.command else ""
    assert "".join(f"<{word}>" for word in script.command) == expected


MARKS = [
    "$",
    "${",
    "$((",
    "`",
    '"',
    "'",
    "\\",
    "\n",
    "|",
    "&&",
    "<<",
    ">",
    "#",
    "~",
    "export ",
    "A=",
    "$A",
    ")",
    ";",
    "\0",
]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TRAIN)), st.sampled_from(MARKS)), min_size=1, max_size=6))
def test_a_spoilt_script_is_read_or_refused(tmp_path_factory, marks):
    text = TRAIN.format(devices=8, extra="")
    for at, mark in marks:
        text = text[:at] + mark + text[at:]
    path = tmp_path_factory.mktemp("script") / "pretrain.sh"
    path.write_text(text)
    with suppress(InputError):
        migration_shell.read(path)


@pytest.mark.parametrize(
    "text", ["''" * 200_000, "# a\n" * 200_000, '"$A"' * 100_000, "A=$A" * 100_000, "${A:-" * 100_000, "$((" * 100_000]
)
def test_a_long_script_takes_no_longer_than_its_length(tmp_path, text):
    (tmp_path / "a.sh").write_text(f"A={'x' * 60_000}\ntorchrun {text}\n")
    started = time.monotonic()
    with suppress(InputError):
        migration_shell.read(tmp_path / "a.sh")
    assert time.monotonic() - started < 5


def test_values_do_not_grow_without_end(tmp_path):
    (tmp_path / "a.sh").write_text("A=xx\n" + "A=$A$A\n" * 60 + "torchrun $A")
    with pytest.raises(InputError, match="more than"):
        migration_shell.read(tmp_path / "a.sh")


def test_configuration_files_outside_of_the_guide_are_not_read(tmp_path):
    guide = write_guide(tmp_path / "guide")
    model = guide / BASE / "model.json"
    (tmp_path / "model.json").write_text(model.read_text())
    model.unlink()
    model.symlink_to(tmp_path / "model.json")
    with pytest.raises(InputError, match="outside"):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


def items(sizes, seed=0):
    random = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        yield data.training_item(TOKENIZER, f"cat {i}", random.integers(0, 16384, size), with_size=i % 2 == 0)


def write_mindspeed(folder: Path, sizes, prefix="./sora_features") -> list:
    """As the guide's extraction writes it."""
    (folder / "features").mkdir(parents=True)
    made = list(items(sizes))
    lines = []
    for i, (ids, labels) in enumerate(made):
        torch.save({"token": ids, "label": labels}, folder / f"features/{i}_jpg.pt")
        lines.append(json.dumps({"file": f"{prefix}/features/{i}_jpg.pt", "len": len(ids)}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return made


def write_alpha(folder: Path, sizes, protocol=4) -> list:
    """As Alpha-VLLM's pre_tokenize and concat_record write it."""
    (folder / "files").mkdir(parents=True)
    made, records = list(items(sizes)), []
    for i, (ids, labels) in enumerate(made):
        (folder / f"files/{i}.pkl").write_bytes(pickle.dumps({"token": ids, "label": labels, "id": i}, protocol))
        records.append({"file": f"/data/out/files/{i}.pkl", "len": len(ids), "id": i})
    (folder / "record.json").write_text(json.dumps(records))
    return made


def converted(source: Path, out: Path) -> tuple[data.FeatureSet, list[dict]]:
    migrate.main([str(source), "--out", str(out), "--model", str(MODEL), "--size", "256"])
    return data.FeatureSet(out), [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


SIZES = st.lists(st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([4, 8])), min_size=1, max_size=4)


@hypothesis_settings(max_examples=10, deadline=None)
@given(SIZES, st.sampled_from([write_mindspeed, write_alpha]))
def test_a_set_gives_back_what_was_extracted(tmp_path_factory, sizes, write):
    tmp_path = tmp_path_factory.mktemp("features")
    made = write(tmp_path / "theirs", sizes)
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert list(found) == made
    assert quarantined == []
    assert found.origin == shards.Origin(256, 0, TOKENIZER.ids, TOKENIZER.fingerprint, "")
    manifest = [json.loads(line) for line in (tmp_path / "ours/manifest.jsonl").read_text().splitlines()]
    assert [line["row"] for line in manifest] == list(range(len(sizes)))
    assert {line["status"] for line in manifest} == {"done"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_current_protocol_are_read(tmp_path, protocol):
    made = write_alpha(tmp_path / "theirs", [(4, 8)], protocol)
    assert list(converted(tmp_path / "theirs", tmp_path / "ours")[0]) == made


def test_parts_of_a_record_are_read_in_the_order_of_their_ranks(tmp_path):
    made = write_alpha(tmp_path / "theirs", [(4, 4)] * 12)
    records = json.loads((tmp_path / "theirs/record.json").read_text())
    (tmp_path / "theirs/record.json").unlink()
    for i, record in enumerate(records):
        (tmp_path / f"theirs/{i}-of-12-record.jsonl").write_text(json.dumps(record) + "\n")
    assert list(converted(tmp_path / "theirs", tmp_path / "ours")[0]) == made


def test_duplicates_are_kept_once_and_overwritten_files_are_told(tmp_path, capsys):
    made = write_mindspeed(tmp_path / "theirs", [(4, 4), (8, 4)])
    index = tmp_path / "theirs/data.jsonl"
    first, second = index.read_text().splitlines()
    other = json.dumps({**json.loads(first), "len": 999})  # another picture with the first one's base name
    index.write_text("\n".join([other, first, second, first, second, '{"file": "fea']) + "\n")
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert list(found) == made
    assert [line["row"] for line in quarantined] == [0, 3, 4, 5]
    reasons = [line["reason"] for line in quarantined]
    assert "overwritten" in reasons[0]
    assert "same record as row 1" in reasons[1]
    assert "same record as row 2" in reasons[2]
    assert "not JSON" in reasons[3]
    assert "2 features, 2 quarantined, 2 duplicates" in capsys.readouterr().out
    manifest = [json.loads(line)["row"] for line in (tmp_path / "ours/manifest.jsonl").read_text().splitlines()]
    assert manifest == list(range(6))


def spoilt(ids, labels):
    """Items that are none, by what is wrong with them."""
    start = ids.index(TOKENIZER.ids.start)
    put = lambda values, i, value: [*values[:i], value, *values[i:][1:]]
    yield "tokens and", ids, labels[:-1]
    yield "with its caption dropped", ids[start:], ids[start:]
    yield "labels are not", ids, put(labels, 0, ids[0])
    yield "labels are not", ids, put(labels, start + 5, -100)
    yield "token 4", put(ids, start + 4, ids[0]), put(labels, start + 4, ids[0])
    yield "no image", put(ids, start + 1, ids[start + 1] + 1), put(labels, start + 1, ids[start + 1] + 1)
    yield "(bos)", put(ids, 0, ids[1]), labels
    yield "whole number", put(ids, 1, 2**40), labels
    yield "whole number", put(ids, 1, True), labels
    yield "whole number", put(ids, 1, "5"), labels
    yield "no lists", "abc", labels
    yield "no lists", [], []


def test_an_item_that_does_not_fit_is_quarantined_with_the_reason(tmp_path):
    made = write_alpha(tmp_path / "theirs", [(4, 4)] * 13)
    cases = list(spoilt(*made[0]))
    for i, (_, ids, labels) in enumerate(cases):
        path = tmp_path / f"theirs/files/{i}.pkl"
        path.write_bytes(pickle.dumps({"token": ids, "label": labels, "id": i}))
    records = [{k: v for k, v in r.items() if k != "len"} for r in json.loads((tmp_path / "theirs/record.json").read_text())]  # fmt: skip
    (tmp_path / "theirs/record.json").write_text(json.dumps(records))
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert list(found) == made[12:]
    for (word, *_), line in zip(cases, quarantined, strict=True):
        assert word in line["reason"] or "NEWTRUE" in line["reason"]


class Runs:
    def __reduce__(self):
        return os.system, ("touch hit",)


SELF: list = []
SELF.append(SELF)
HOSTILE = [
    ("system", pickle.dumps({"token": Runs(), "label": []})),
    ("system", pickle.dumps({"token": Runs(), "label": []}, 2)),
    ("system", b"cos\nsystem\n(S'touch hit'\ntR."),
    ("no lists", pickle.dumps(SELF)),
    ("whole number", pickle.dumps({"token": SELF, "label": SELF})),
    ("deep", b"(" * 100_000 + b"."),
    ("BINPERSID", b"\x80\x02X\x01\x00\x00\x00aQ."),
    ("EXT1", b"\x80\x02\x82\x01."),
    ("more than", b"\x80\x04" + bytes(plain_pickle.MAX_BYTES)),
    ("malformed", b"\x80\x04]r\xff\xff"),
    ("malformed", b"\x80\x04X\xff\xff\xff\xff."),
    ("malformed", b"\x80\x04]q\x01a."),
    ("malformed", b""),
    ("malformed", b"."),
    ("BYTEARRAY8", b"\x80\x05\x96" + b"\xff" * 8 + b"."),
]


def torch_file(content: bytes, **how) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **how) as archive:
        archive.writestr("archive/data.pkl", content)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
@pytest.mark.parametrize(("word", "content"), HOSTILE, ids=[f"{i}-{w}" for i, (w, _) in enumerate(HOSTILE)])
def test_a_hostile_pickle_is_refused_by_what_it_asks_for(tmp_path, monkeypatch, word, content, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(torch_file(content) if suffix == ".pt" else content)
    with pytest.raises(InputError, match=word):
        imported.item(path, imported.Record("x", None, None))
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    "content",
    [b"PK", b"not a zip", torch_file(b"." * 100, compression=zipfile.ZIP_DEFLATED), torch_file(pickle.dumps({}))[:-30]],
)
def test_a_file_that_is_no_torch_file_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        imported.item(tmp_path / "x.pt", imported.Record("x", None, None))


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_a_value_or_a_value_error(data):
    whole = bytearray(pickle.dumps({"token": [1, 300, 70000, 2**40, "é"], "label": [-100, {"a": []}]}, data.draw(st.integers(2, 5))))  # fmt: skip
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        plain_pickle.loads(bytes(whole))


@given(st.recursive(st.integers(-(2**70), 2**70) | st.text(), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(), s, max_size=4), max_leaves=12), st.integers(2, 5))  # fmt: skip
def test_plain_values_come_back(value, protocol):
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value


def test_no_file_outside_of_the_named_folder_is_read(tmp_path):
    write_alpha(tmp_path / "theirs", [(4, 4)] * 2)
    write_alpha(tmp_path / "secret", [(4, 4)] * 2)
    link = tmp_path / "theirs/files/link.pkl"
    link.symlink_to(tmp_path / "secret/files/0.pkl")
    inner = ["files/link.pkl", "../secret/files/1.pkl", str(tmp_path / "secret/files/1.pkl"), "files/../../secret/files/1.pkl", "\0", "files", "/dev/zero"]  # fmt: skip
    records = json.loads((tmp_path / "theirs/record.json").read_text())
    records[0]["file"] = str(tmp_path / "theirs/files/0.pkl")
    (tmp_path / "theirs/record.json").write_text(json.dumps([records[0], *({"file": f} for f in inner)]))
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert len(found) == 1
    assert [line["row"] for line in quarantined] == list(range(1, 8))
    (tmp_path / "theirs/record.json").unlink()
    (tmp_path / "theirs/record.json").symlink_to(tmp_path / "secret/record.json")
    with pytest.raises(InputError, match="outside"):
        converted(tmp_path / "theirs", tmp_path / "again")


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
    assert pieces("from-mindspeed.md") == pieces("from-mindspeed.zh.md")
    names = lambda page: [
        re.findall("`[^`]+`", line.split(" | ")[0])
        for line in (ROOT / "docs" / page).read_text().splitlines()
        if line.startswith("| `")
    ]
    assert names("from-mindspeed.md") == names("from-mindspeed.zh.md")
