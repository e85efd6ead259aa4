"""The settings of experiments.finetune: its flags, their defaults and what they mean."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from experiments.devices import EnvCheck
from lumina_fn import hub
from lumina_fn.process.flags import REPEATED, Group
from lumina_fn.process.ranges import CLIP, SEED, STEPS, WEIGHT_DECAY, Z_WEIGHT, Range


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `lumina finetune`."""

    # data
    model: Annotated[
        Path,
        "the model: a native or Hugging Face folder, a run's, or OWNER/NAME of the Hugging Face Hub",
        Group("data", "--features pictures=0.7 --features sketches=0.3 --pack 4096"),
    ]
    features: Annotated[
        tuple[Path, ...],
        "a folder written by experiments.pretokenize; may be given several times: all folders are read as one set, or, as DIR=0.7, "
        "each gives its weight's share of the items, without a common epoch",
        REPEATED,
    ]
    caption_drop: Annotated[float, "probability that an item loses its caption, for guidance", Range(0, 1)] = 0.1
    order: Annotated[
        Literal["shuffled", "clustered"], "clustered: a batch's items are about equally long, which saves padding"
    ] = "shuffled"
    last: Annotated[Literal["partial", "drop"], "use or drop an epoch's last, smaller batch"] = "partial"
    pack: Annotated[
        int | None,
        "tokens of a row that holds several samples; the loss is the same (default: one sample per row)",
        Range(1, 1 << 20),
    ] = None
    long: Annotated[
        Literal["cut", "skip", "error"],
        "items with more tokens than the model takes: cut to them, as in the reference, left out, or an error that names them",
    ] = "cut"
    seed: Annotated[int, "random seed of the order and of the caption drop", SEED] = 0
    download: hub.Download = False
    # optimization
    steps: Annotated[
        int,
        "number of training steps",
        STEPS,
        Group("optimization", "--steps 2000 --batch 64 --micro-batch 2 --lr 1e-5 --schedule cosine"),
    ] = 5000
    batch: Annotated[int, "samples per step, over all processes", Range(1, 1 << 20)] = 8
    micro_batch: Annotated[
        int,
        "samples (with --pack, rows) per forward and backward of a process; a step accumulates as many micro batches as its share needs",
        Range(1, 1 << 16),
    ] = 1
    lr: Annotated[float, "peak learning rate", Range(0, 1, above=True)] = 2e-5
    warmup: Annotated[int, "steps of linear warm-up", Range(0, 10**9)] = 0
    schedule: Annotated[Literal["constant", "cosine"], "learning rate after warm-up; cosine ends at 0"] = "constant"
    weight_decay: Annotated[float, "weight decay of AdamW, on every parameter", WEIGHT_DECAY] = 1e-2
    clip: Annotated[float, "limit of the global gradient norm", CLIP] = 1.0
    z_weight: Annotated[float, "weight of the z-loss", Z_WEIGHT] = 1e-5
    # devices
    device: Annotated[
        str,
        "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is available; each process takes its own",
        Group("devices", "--device npu --strategy fsdp --dtype bfloat16 --remat all"),
    ] = "auto"
    env_check: EnvCheck = "error"
    dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16"], "precision of compute; auto: float32 on a CPU, else bfloat16"
    ] = "auto"
    strategy: Annotated[
        Literal["fsdp", "sdp", "no", "hybrid", "hybrid_zero2"],
        "how processes share the model. fsdp: parameters, gradients and optimizer state are sharded, parameters are gathered for each "
        "forward and backward; sdp: gathered once for both; no: a full copy on every process; hybrid, hybrid_zero2: fsdp, sdp within "
        "--shard-size processes, full copies across",
    ] = "fsdp"
    shard_size: Annotated[
        int | None,
        "processes that share one copy of the model under hybrid strategies; divides their number (default: those of one machine)",
        Range(1, 1 << 20),
    ] = None
    param_dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        "precision of gathered parameters; auto: that of compute; float16 is refused, with the reason",
    ] = "auto"
    reduce_dtype: Annotated[
        Literal["auto", "float64", "float32", "bfloat16", "float16"],
        "precision of sums of gradients over processes; auto: float32, or float64 if compute is; float16 is refused",
    ] = "auto"
    forward_prefetch: Annotated[
        bool, "gather the next block's parameters while the current one computes, on devices with streams"
    ] = False
    backward_prefetch: Annotated[bool, "the same in the backward"] = False
    sync: Annotated[
        bool,
        "sum gradients over processes after each micro batch; if not, once a step, which keeps a whole model's gradients in memory",
    ] = True
    remat: Annotated[
        str,
        "of how many blocks only the input is kept, and the rest computed again in the backward: a number, all, or auto: the fewest "
        "that fit into memory",
    ] = "auto"
    compile: Annotated[
        Literal["off", "blocks", "step"] | None,
        "compile nothing, one block that serves all layers, or the whole step (default: blocks; on an NPU off, the only choice there)",
    ] = None
    # checkpoints
    out: Annotated[
        Path,
        "the run's folder; a stopped run in it is continued",
        Group("checkpoints", "--out runs/tuned --save-every 200 --keep 3 --resume last-good"),
    ]
    save_every: Annotated[
        int,
        "steps between checkpoints; one more is written early and one at the end; 0: no checkpoints",
        Range(0, 10**9),
    ] = 500
    keep: Annotated[int, "number of last checkpoints to keep", STEPS] = 2
    keep_every: Annotated[int | None, "also keep the checkpoints of steps that are multiples of this", STEPS] = None
    resume: Annotated[
        str,
        "auto: continue from OUT's last checkpoint, if it has one; no: only start a new run; the step of a checkpoint; or last-good: "
        "the last checkpoint whose files are undamaged. Later checkpoints are then set aside",
    ] = "auto"
    overwrite: Annotated[bool, "start afresh in an existing OUT"] = False
    # logging
    log_every: Annotated[
        int, "steps between lines of metrics.jsonl", STEPS, Group("logging", "--log-every 1 --profile 5")
    ] = 10
    profile: Annotated[
        int,
        "number of steps to profile after warm-up, on the first process: OUT/profile/trace.json (for chrome://tracing or Perfetto) "
        "and ops.txt; 0: none",
        Range(0, 1000),
    ] = 0
    noise_scale_every: Annotated[
        int,
        "steps between measurements of the gradient noise scale, the batch size above which more samples hardly help; 0: never",
        Range(0, 10**9),
    ] = 0
