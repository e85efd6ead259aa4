"""A MindSpeed-MM guide's folder laid out as theirs is, and the commands that it becomes."""

import json
import shlex
from pathlib import Path

from experiments import migrate

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
