"""The settings of experiments.finetune: its flags, their defaults and what they mean."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from experiments.devices import EnvCheck
from lumina_fn.process.flags import REPEATED, Group
from lumina_fn.process.ranges import CLIP, SEED, STEPS, WEIGHT_DECAY, Z_WEIGHT, Range


@dataclass(frozen=True, kw_only=True)
class Settings:
    # data
    model: Annotated[
        Path,
        "the model: a native or Hugging Face folder",
        Group("data", "--features pictures=0.7 --features sketches=0.3 --pack 4096"),
    ]
    features: Annotated[
        tuple[Path, ...],
        "a folder written by experiments.pretokenize; given again, a further one: all are read as one set, or, as DIR=0.7, "
        "each as often as its weight says, without a common epoch",
        REPEATED,
    ]
    caption_drop: Annotated[float, "probability that an item loses its caption, for guidance", Range(0, 1)] = 0.1
    order: Annotated[
        Literal["shuffled", "clustered"], "clustered: a batch's items are about equally long, which saves padding"
    ] = "shuffled"
    last: Annotated[Literal["partial", "drop"], "what becomes of an epoch's last, smaller batch"] = "partial"
    pack: Annotated[
        int | None,
        "tokens of a row that several samples share; the loss is the same (default: each has its own)",
        Range(1, 1 << 20),
    ] = None
    seed: Annotated[int, "of the order and the caption drop", SEED] = 0
    # optimization
    steps: Annotated[
        int,
        "how many",
        STEPS,
        Group("optimization", "--steps 2000 --batch 64 --micro-batch 2 --lr 1e-5 --schedule cosine"),
    ] = 5000
    batch: Annotated[int, "samples per step, over all processes", Range(1, 1 << 20)] = 8
    micro_batch: Annotated[
        int,
        "samples (with --pack, rows) per forward and backward of a process; a step accumulates as many as its share needs",
        Range(1, 1 << 16),
    ] = 1
    lr: Annotated[float, "peak learning rate", Range(0, 1, above=True)] = 2e-5
    warmup: Annotated[int, "steps of linear warm-up", Range(0, 10**9)] = 0
    schedule: Annotated[Literal["constant", "cosine"], "of the learning rate after warm-up; cosine ends at 0"] = (
        "constant"
    )
    weight_decay: Annotated[float, "of AdamW, on every parameter", WEIGHT_DECAY] = 1e-2
    clip: Annotated[float, "global gradient norm", CLIP] = 1.0
    z_weight: Annotated[float, "weight of the z-loss", Z_WEIGHT] = 1e-5
    # devices
    device: Annotated[
        str,
        "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is there; each process takes its own",
        Group("devices", "--device npu --strategy fsdp --dtype bfloat16 --remat"),
    ] = "auto"
    env_check: EnvCheck = "error"
    dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16"], "of compute; auto: float32 on a CPU, else bfloat16"
    ] = "auto"
    strategy: Annotated[
        Literal["fsdp", "sdp", "no", "hybrid", "hybrid_zero2"],
        "of many processes. fsdp: parameters, gradients and optimizer in parts, gathered for each forward and backward; "
        "sdp: gathered once for both; no: whole on every process; hybrid, hybrid_zero2: fsdp, sdp within --shard-size "
        "processes, whole copies across",
    ] = "fsdp"
    shard_size: Annotated[
        int | None,
        "processes that share one copy of the model under hybrid strategies; divides their number (default: those of one machine)",
        Range(1, 1 << 20),
    ] = None
    param_dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        "of parameters while they are gathered; auto: that of compute; float16 is refused, with the reason",
    ] = "auto"
    reduce_dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        "of gradients while they are summed over processes; auto: float32, float64 where compute is; float16 is refused",
    ] = "auto"
    forward_prefetch: Annotated[
        bool, "gather the next block's parameters while one computes, on devices with streams"
    ] = False
    backward_prefetch: Annotated[bool, "the same on the way back"] = False
    sync: Annotated[
        bool,
        "sum gradients over processes after each micro batch; if not, once a step, with a whole model's gradients held",
    ] = True
    remat: Annotated[
        bool | None,
        "keep only each block's input and compute the rest again in the backward (default: for a billion parameters and more)",
    ] = None
    compile: Annotated[
        Literal["off", "blocks", "step"] | None,
        "nothing, one block for all, or the whole step (default: blocks; on an NPU off, the only choice there)",
    ] = None
    # checkpoints
    out: Annotated[
        Path,
        "the run's folder; what a stopped run left there is continued",
        Group("checkpoints", "--out runs/tuned --save-every 200 --keep 3 --resume last-good"),
    ]
    save_every: Annotated[
        int,
        "steps between checkpoints, of which one is also written early and one at the end; 0: none",
        Range(0, 10**9),
    ] = 500
    keep: Annotated[int, "checkpoints that are kept: the last ones", STEPS] = 2
    keep_every: Annotated[int | None, "steps whose multiples' checkpoints are kept too", STEPS] = None
    resume: Annotated[
        str,
        "auto: from OUT's last checkpoint, if it has one; no; the step of a checkpoint; or last-good: the last whose files are "
        "as they were written. Later checkpoints are then set aside",
    ] = "auto"
    overwrite: Annotated[bool, "start afresh in an existing OUT"] = False
    # logging
    log_every: Annotated[
        int, "steps between lines of metrics.jsonl", STEPS, Group("logging", "--log-every 1 --profile 5")
    ] = 10
    profile: Annotated[
        int,
        "steps whose time is taken apart, once it is warm: OUT/profile/trace.json (for chrome://tracing or Perfetto) and ops.txt, "
        "of the first process; 0: none",
        Range(0, 1000),
    ] = 0
    noise_scale_every: Annotated[
        int,
        "steps between measurements of the gradient noise scale, the batch beyond which more samples hardly help; 0: never",
        Range(0, 10**9),
    ] = 0
