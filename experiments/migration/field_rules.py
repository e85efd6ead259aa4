"""What each field of the MindSpeed-MM guide's files and each flag of its scripts means here: a flag, nothing, or a refusal.

A field that is in no table is refused: it could change results.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from experiments.migration.expansion import opened, readable
from lumina_fn.config import LUMINA_7B
from lumina_fn.errors import InputError

ABSENT = object()
MAX_DEPTH = 8  # of a JSON file; the guide's have 4
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32", "tf32": "float32"}


class Line(NamedTuple):
    """A line of the report: what one field means here."""

    file: str
    field: str
    value: str
    kind: Literal["mapped", "not needed", "note", "yourself", "carried", "asked", "refused"]
    here: str


class To(NamedTuple):
    """The field becomes this flag, with the field's value."""

    flag: str
    absent: object = ABSENT  # MindSpeed-MM's value if the field is not given


class Carried(NamedTuple):
    """The field becomes this variable of the launch scripts; where it is known only when a script runs, commands.sh takes it then."""

    flag: str
    absent: object = ABSENT


class Only(NamedTuple):
    """The field is not needed if it has one of these values; any other value would change results, and is refused."""

    values: tuple
    why: str
    absent: object = ABSENT


class Free(NamedTuple):
    """The field is not needed: results do not depend on its value."""

    why: str
    absent: object = ABSENT


class Size(NamedTuple):
    """A size of the model: the field must agree with config.json in the model's folder, or else with the released model."""

    name: str  # in config.json
    released: object
    absent: object = ABSENT


Rule = To | Carried | Only | Free | Size
_OFF, _ONE = (False,), (1,)
_LOADER = "there is one kind of dataset, read in the process itself"
_TENSORS = "read off the checkpoint's tensors"

TOOLS: dict[str, Rule] = {
    "sorafeature.save_path": To("OUT of pretokenize"),
    "profile.*": Free("profiling changes no result"),
    "memory_profile.*": Free("profiling changes no result"),
}
_DATASET: dict[str, Rule] = {
    "dataset_param.dataset_type": Only(("lumina",), "the one kind of dataset"),
    "dataset_param.basic_parameters.data_config.type": Free("the name of a group"),
    "dataset_param.basic_parameters.data_config.ratio": Only(_ONE, "every item of the set is used"),
    "dataloader_param.dataloader_mode": Only(("sampler",), _LOADER),
    "dataloader_param.sampler_type": Only(("LuminaMetaLenDistSampler",), _LOADER),
    **{f"dataloader_param.{n}": Free(_LOADER) for n in ("pin_memory", "num_workers", "prefetch_factor", "persistent_workers", "group_frame", "group_resolution")},
    "dataloader_param.collate_param": Only(({},), _LOADER),
}  # fmt: skip
DATA: dict[str, Rule] = {
    **_DATASET,
    "dataset_param.basic_parameters.data_config.path": To("DATA of pretokenize"),
    "dataset_param.preprocess_parameters.item_processor_type": Only(("TokenizerItemProcessor",), "what pretokenize does"),
    "dataset_param.preprocess_parameters.patch_size": Only((32,), "size tokens count patches of 32 pixels", 32),
    "dataset_param.preprocess_parameters.target_size": To("--size", 512),
    "dataset_param.tokenizer_config.hub_backend": Only(("hf",), "the tokenizer is read from the model's folder"),
    "dataset_param.tokenizer_config.autotokenizer_name": Only(("luminaMGPT2Tokenizer",), "likewise"),
    "dataset_param.tokenizer_config.from_pretrained": To("--model of pretokenize"),
    "dataloader_param.shuffle": Free("features keep the input's order"),
    "dataloader_param.drop_last": Free("every row is extracted: there the tail of a batch was not"),
}  # fmt: skip
AE: dict[str, Rule] = {
    "ae.model_id": Only(("movqvae",), "the one kind of picture model"),
    "ae.from_pretrained": To("--vq"),
    "ae.double_z": Only(_OFF, "the released picture model's"),
    "ae.in_channels": Only((3,), "pictures are RGB"),
    "ae.out_ch": Only((3,), "pictures are RGB"),
    "ae.dropout": Free("encoding drops nothing"),
    **{f"ae.{n}": Free(_TENSORS) for n in ("z_channels", "ch", "ch_mult", "num_res_blocks", "n_embed", "embed_dim", "attn_resolutions", "resolution")},
}  # fmt: skip
FEATURE_DATA: dict[str, Rule] = {
    **_DATASET,
    "dataset_param.basic_parameters.data_config.path": To("--features"),
    "dataset_param.preprocess_parameters.item_processor_type": Only(("LoadFeatureItemProcessor",), "what finetune reads"),
    "dataloader_param.shuffle": Only((True,), "an epoch's order is drawn from --seed; the input's own order is not offered", False),
    "dataloader_param.drop_last": To("--last", False),
}  # fmt: skip
_FSDP = "patch.use_fsdp1."
_DROPOUT = "the references' fine-tuning has none; a nonzero one is not applied here"
MODEL: dict[str, Rule] = {
    "predictor.hidden_size": Size("hidden_size", LUMINA_7B.width),
    "predictor.num_layers": Size("num_hidden_layers", LUMINA_7B.layers),
    "predictor.num_heads": Size("num_attention_heads", LUMINA_7B.heads),
    "predictor.num_key_value_heads": Size("num_key_value_heads", LUMINA_7B.kv_heads),
    "predictor.intermediate_size": Size("intermediate_size", LUMINA_7B.hidden),
    "predictor.vocab_size": Size("vocab_size", LUMINA_7B.vocab),
    "predictor.max_position_embeddings": Size("max_position_embeddings", LUMINA_7B.max_positions),
    "predictor.rms_norm_eps": Size("rms_norm_eps", LUMINA_7B.eps),
    "predictor.rope_theta": Size("rope_theta", LUMINA_7B.rope_theta),
    "predictor.swin_norm": Size("swin_norm", LUMINA_7B.swin_norm),
    "predictor.vocabulary_map_path": Free("it serves mask_image_logits alone"),
    "predictor.mask_image_logits": Only(_OFF, "fine-tuning masks nothing"),
    "predictor.attention_bias": Only(_OFF, "the released model has none"),
    "predictor.mlp_bias": Only(_OFF, "the released model has none"),
    "predictor.tie_word_embeddings": Only(_OFF, "the released model's head is its own"),
    "predictor.hidden_act": Only(("silu",), "the released model's"),
    "predictor.rope_scaling": Only((None,), "the released model's"),
    "predictor.pad_token_id": Only((None,), "the released model's"),
    "predictor.dropout": Free(_DROPOUT),
    "predictor.attention_dropout": Free(_DROPOUT),
    "predictor.bos_token_id": Free("the tokenizer has its own"),
    "predictor.eos_token_id": Free("the tokenizer has its own"),
    "predictor.initializer_range": Free("nothing is initialised"),
    "predictor.output_attentions": Free("what a forward hands out besides the loss"),
    "predictor.output_hidden_states": Free("what a forward hands out besides the loss"),
    "z_loss_weight": To("--z-weight", 1e-5),
    "dtype": To("--dtype", "bf16"),
    _FSDP + "sharding_strategy": To("--strategy"),
    _FSDP + "param_dtype": To("--param-dtype"),
    _FSDP + "reduce_dtype": To("--reduce-dtype"),
    _FSDP + "forward_prefetch": To("--forward-prefetch"),
    _FSDP + "backward_prefetch": To("--backward-prefetch"),
}

_PARALLEL = {
    "--tensor-model-parallel-size": Only(_ONE, "tensor parallelism is not offered"),
    "--pipeline-model-parallel-size": Only(_ONE, "pipeline parallelism is not offered"),
    "--virtual-pipeline-model-parallel-size": Only(_ONE, "pipeline parallelism is not offered"),
    "--context-parallel-size": Only(_ONE, "context parallelism is not offered, nor adapted there"),
    "--expert-model-parallel-size": Only(_ONE, "the model has no experts"),
    "--context-parallel-algo": Free("context parallelism is off"),
    "--num-workers": Free(_LOADER),
    "--distributed-backend": Free("hccl on NPUs, gloo on CPUs"),
    "--mm-data": Free("the path of a file in this table"),
    "--mm-model": Free("the path of a file in this table"),
    "--mm-tool": Free("the path of a file in this table"),
}
EXTRACT_FLAGS: dict[str, Rule] = {
    **_PARALLEL,
    "--micro-batch-size": Free("pretokenize's --batch changes no code"),
    "--global-batch-size": Free("pretokenize's --batch changes no code"),
    "--seed": Free("of the choice which prompts say the picture's size: here --seed, another stream"),
    "--bf16": Free("pictures are encoded in the checkpoint's precision, there as here"),
}
_SPEED = "changes speed or memory, no result but for rounding"
_SAVED = "a checkpoint holds everything here"
TRAIN_FLAGS: dict[str, Rule] = {
    **_PARALLEL,
    "--micro-batch-size": To("--micro-batch"),
    "--global-batch-size": To("--batch"),
    "--lr": To("--lr"),
    "--min-lr": To("--schedule", "0"),
    "--lr-decay-style": To("--schedule", "linear"),
    "--lr-decay-iters": To("--schedule"),
    "--lr-warmup-iters": To("--warmup", "0"),
    "--lr-warmup-init": Only((0,), "warm-up begins at 0", "0"),
    "--adam-beta1": Only((0.9,), "AdamW's b1 here", "0.9"),
    "--adam-beta2": Only((0.95,), "AdamW's b2 here", "0.999"),
    "--adam-eps": Only((1e-8,), "AdamW's eps here", "1e-8"),
    "--optimizer": Only(("adam",), "AdamW", "adam"),
    "--weight-decay": To("--weight-decay", "0.01"),
    "--clip-grad": To("--clip", "1.0"),
    "--train-iters": To("--steps"),
    "--seed": To("--seed"),
    "--log-interval": To("--log-every", "100"),
    "--save-interval": To("--save-every"),
    "--load": To("--model"),
    "--save": To("--out"),
    "--bf16": Free("compute follows model.json's dtype; parameters and AdamW's state are kept in float32"),
    "--ckpt-format": Free("checkpoints have one format"),
    **{flag: Free(_SAVED) for flag in ("--no-load-optim", "--no-load-rng", "--no-save-optim", "--no-save-rng", "--finetune")},
    **{flag: Free("finetune evaluates nothing, nor does theirs") for flag in ("--eval-interval", "--eval-iters")},
    **{flag: Free(_SPEED) for flag in ("--no-gradient-accumulation-fusion", "--use-distributed-optimizer", "--use-flash-attn", "--use-fused-rmsnorm", "--use-fused-swiglu",
        "--use-fused-rotary-pos-emb", "--overlap-grad-reduce", "--overlap-param-gather", "--recompute-granularity", "--recompute-method", "--recompute-num-layers",
        "--accumulate-allreduce-grads-in-fp32", "--use-mcore-models", "--manual-gc", "--manual-gc-interval", "--distributed-timeout-minutes")},
    **{flag: Free("what is logged beside metrics.jsonl") for flag in ("--tensorboard-dir", "--log-throughput", "--timing-log-level")},
}  # fmt: skip
LAUNCH: dict[str, Rule] = {
    "--nproc-per-node": Carried("NPUS_PER_NODE", "1"),
    "--nnodes": Carried("NNODES", "1"),
    "--node-rank": Carried("NODE_RANK", "0"),
    "--master-addr": Carried("MASTER_ADDR", "127.0.0.1"),
    "--master-port": Carried("MASTER_PORT", "29500"),
}
# Flags without a value: a word after one of them belongs to no flag.
SWITCHES = re.compile("--(bf16|finetune|no-.*|use-.*|overlap-.*|accumulate-.*|manual-gc|log-throughput)")


def refuse(lines: list[Line], file: str, field: str, value: Any, why: str) -> None:
    """Append the line of a refused field."""
    lines.append(Line(file, field, str(value), "refused", why))


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a JSON object by their dotted paths; lists and empty objects are values."""
    if prefix.count(".") > MAX_DEPTH:
        raise InputError(f"{prefix[:40]}... is nested too deeply: no file of the guide's")
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def judge(
    file: str, rules: Mapping[str, Rule], values: Mapping[str, Any], sizes: Mapping[str, Any], *, script: bool = False
) -> tuple[list[Line], dict[str, Any]]:
    """A line for every field, and the values of those that become flags; `sizes` is the content of the model's config.json.

    The flags of a `script` may have values that are open.
    """
    lines, mapped = [], {}
    absent = {field: rule.absent for field, rule in rules.items() if rule.absent is not ABSENT and field not in values}
    for field, value in [*values.items(), *absent.items()]:
        text = readable(value if isinstance(value, str) else repr(value))
        rule = rules.get(field) or rules.get(field.split(".")[0] + ".*")
        shown = f"{text}{' (their default)' if field in absent else ''}"
        line = lambda kind, here, field=field, shown=shown: lines.append(Line(file, field, shown, kind, here))
        if script and rule is not None and opened(value):
            match rule:
                case Carried(variable):
                    mapped[field] = value
                    line("mapped", f"{variable}, which commands.sh takes from its environment where it needs it")
                case Free(why):
                    line("not needed", why)
                case _:
                    line("asked", "known only when the script runs, and decides results")
            continue
        if isinstance(value, str) and not value.isprintable():  # it would become lines of commands.sh
            line("refused", "has control characters")
            continue
        match rule:
            case To(flag) | Carried(flag):
                mapped[field] = value
                line("mapped", flag)
            case Only(accepted, why):
                line(*(("not needed", why) if any(same(value, a) for a in accepted) else ("refused", why)))
            case Free(why):
                dropped = field.endswith("dropout") and why == _DROPOUT and not same(value, 0)
                line("note" if dropped else "not needed", why)
            case Size(name, released):
                known = sizes.get(name, released)
                line(*(("not needed", "read from the model's folder") if same(value, known) else (
                    "refused", f"the model's folder means {known!r}: a config.json in it must say {name} {value!r}")))  # fmt: skip
            case None:
                line("refused", "not known here, it could change results")
    return lines, mapped


def same(a: Any, b: Any) -> bool:
    """Whether two values mean the same; numbers and their texts are compared as numbers."""
    try:
        return a == b or (not isinstance(a, bool) and not isinstance(b, bool) and float(a) == float(b))
    except (TypeError, ValueError, OverflowError):
        return False
