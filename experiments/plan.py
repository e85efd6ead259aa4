"""Predict memory and time of training per device, for any model and number of devices, before it is launched.

    lumina plan --devices 8 16 64

Nothing is allocated: memory is measured by running a step on tensors without storage, and time is computed from FLOPs, bytes and the
device's peaks. Flags that experiments.finetune also has mean the same here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lumina_fn import hub, vocab
from lumina_fn.process import entry, flags, startup
from lumina_fn.process.flags import Group

PICTURE = vocab.image_length(96, 96)  # tokens of 768 x 768 pixels
CAPTION = 184  # tokens of a long caption and of the text around it
DEVICES = ("910B", "910B-354", "910B-246", "A100", "H100")
Type = Literal["auto", "float64", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `lumina plan`."""

    devices: Annotated[
        tuple[int, ...],
        "number of devices; several numbers give a table",
        Group("devices", "--devices 8 16 --device 910B"),
    ]
    device: Annotated[str, f"{', '.join(DEVICES)}, or cpu: this machine, measured"] = "910B"
    devices_per_node: Annotated[int, "devices of a node, which are linked directly"] = 8
    efficiency: Annotated[float | None, "share of the peak FLOPs that is reached (default: 0.4; 0.7 on a CPU)"] = None
    roofline: Annotated[
        bool, "print the MFU by strategy and micro batch, and the smallest micro batch that hides communication"
    ] = False
    json: Annotated[bool, "print a list of objects instead of a table, sizes in bytes"] = False
    model: Annotated[
        Path | None,
        "a model's folder; only config.json is read (default: Lumina-mGPT 2.0, 7B)",
        Group("model", "--model runs/lm --layers 24"),
    ] = None
    download: hub.Download = False
    layers: Annotated[int | None, "number of layers, instead of the model's"] = None
    width: Annotated[int | None, "width, instead of the model's"] = None
    heads: Annotated[int | None, "attention heads, instead of the model's"] = None
    kv_heads: Annotated[
        int | None, "heads of keys and values, instead of the model's; --heads sets both if the model has equal numbers"
    ] = None
    hidden: Annotated[int | None, "width of the MLP, instead of the model's"] = None
    vocab: Annotated[int | None, "size of the vocabulary, instead of the model's"] = None
    max_positions: Annotated[int | None, "most tokens of a sample, instead of the model's"] = None
    seq: Annotated[
        int,
        "tokens of a sample, padded as in finetune; the default is a picture of 768 x 768 pixels and a long caption",
        Group("training step", "--seq 4096 --micro-batch 2 --remat all"),
    ] = PICTURE + CAPTION
    micro_batch: Annotated[int, "samples per forward and backward of a device"] = 1
    batch: Annotated[int | None, "samples per step, over all devices (default: one micro batch per device)"] = None
    dtype: Annotated[Type, "precision of compute; auto: float32 on a CPU, else bfloat16"] = "auto"
    param_dtype: Annotated[Type, "precision of gathered parameters; auto: that of compute"] = "auto"
    reduce_dtype: Annotated[
        Type, "precision of sums of gradients over devices; auto: float32, or float64 if compute is"
    ] = "auto"
    remat: Annotated[
        str, "blocks that are computed again in the backward: a number, all, or auto: the fewest that fit"
    ] = "auto"
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
    forward_prefetch: Annotated[bool, "gather the next block's parameters while the current one computes"] = False
    backward_prefetch: Annotated[bool, "the same in the backward"] = False


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    run = hub.here(flags.parse(Settings, __doc__, argv), "model")
    with startup.importing():
        from experiments.planning import plan

    return plan.main(run)


if __name__ == "__main__":
    entry.run(main)
