"""What training takes before it is launched: memory and time per device, for any model and number of devices.

    lumina plan --devices 8 16 64

Nothing is allocated: memory is that of a step walked on tensors without storage, time is FLOPs and bytes over a device's peaks.
Flags that experiments.finetune has too mean the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lumina_fn import vocab
from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import Group

PICTURE = vocab.image_length(96, 96)  # tokens of 768 x 768 pixels
CAPTION = 184  # tokens of a long one, and of what stands around it
DEVICES = ("910B", "910B-354", "910B-246", "A100", "H100")
Type = Literal["auto", "float64", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    devices: Annotated[
        tuple[int, ...], "how many; several numbers give a table", Group("devices", "--devices 8 16 --device 910B")
    ]
    device: Annotated[str, f"{', '.join(DEVICES)}, or cpu: this machine, measured"] = "910B"
    devices_per_node: Annotated[int, "that are linked directly"] = 8
    efficiency: Annotated[float | None, "of the device's peak FLOPs that are reached (default: 0.4; 0.7 on a CPU)"] = (
        None
    )
    roofline: Annotated[
        bool, "instead: the share of the device's peak by strategy and micro batch, and where communication hides"
    ] = False
    json: Annotated[bool, "print a list of objects instead of a table, sizes in bytes"] = False
    model: Annotated[
        Path | None,
        "a model's folder, of which config.json is read (default: Lumina-mGPT 2.0, 7B)",
        Group("model", "--model runs/lm --layers 24"),
    ] = None
    layers: Annotated[int | None, "instead of the model's"] = None
    width: Annotated[int | None, "instead of the model's"] = None
    heads: Annotated[int | None, "instead of the model's"] = None
    kv_heads: Annotated[int | None, "instead of the model's; as --heads where the model has as many of both"] = None
    hidden: Annotated[int | None, "the MLP's width, instead of the model's"] = None
    vocab: Annotated[int | None, "instead of the model's"] = None
    max_positions: Annotated[int | None, "instead of the model's"] = None
    seq: Annotated[
        int,
        "tokens of a sample, padded as finetune pads: a picture of 768 x 768 and its caption",
        Group("training step", "--seq 4096 --micro-batch 2 --remat"),
    ] = PICTURE + CAPTION
    micro_batch: Annotated[int, "samples per forward and backward of a device"] = 1
    batch: Annotated[int | None, "samples per step, over all devices (default: a micro batch for each)"] = None
    dtype: Annotated[Type, "of compute; auto: float32 on a CPU, else bfloat16"] = "auto"
    param_dtype: Annotated[Type, "of gathered parameters; auto: that of compute"] = "auto"
    reduce_dtype: Annotated[Type, "of gradients while they are summed; auto: float32, float64 where compute is"] = (
        "auto"
    )
    remat: Annotated[bool | None, "recompute in the backward (default: for a billion parameters and more)"] = None
    compile: Annotated[Literal["off", "blocks"], "what is compiled"] = "blocks"
    strategy: Annotated[
        Literal["fsdp", "sdp", "no", "hybrid", "hybrid_zero2"],
        "as in finetune",
        Group("sharding", "--strategy hybrid --shard-size 8"),
    ] = "fsdp"
    shard_size: Annotated[
        int | None, "devices that share a copy under hybrid strategies (default: those of a node)"
    ] = None
    sync: Annotated[bool, "sum gradients over devices after each micro batch; if not, once a step"] = True
    forward_prefetch: Annotated[bool, "gather the next block's parameters while one computes"] = False
    backward_prefetch: Annotated[bool, "the same on the way back"] = False


def main(argv: Sequence[str] | None = None) -> int:
    run = flags.parse(Settings, __doc__, argv)
    with startup.importing():
        from experiments.planning import plan

    return plan.main(run)


if __name__ == "__main__":
    entry.run(main)
