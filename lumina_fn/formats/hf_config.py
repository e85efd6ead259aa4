"""A Hugging Face config.json as a ModelConfig, and back."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError, listed, printable
from lumina_fn.vocab import LUMINA_CODE0, LUMINA_CODES, LUMINA_END, LUMINA_NEWLINE, LUMINA_START, LUMINA_VOCAB, Ids

LARGEST = 1 << 24  # limit of any size; a product of two is far from overflow
IMAGE_TOKEN = "IMGIMG"  # prefix of the names of image ids in `vocabulary_map`
CHAMELEON = "chameleon"  # model_type by which transformers' AutoConfig knows this kind of model; the reference derives its own from it
_REFERENCE, _TRANSFORMERS = "ChameleonXLLMXForConditionalGeneration", "ChameleonForConditionalGeneration"
_PLACEHOLDER = "<image>"  # a name that transformers looks up in `vocabulary_map`: where a prompt's picture goes

# Our name -> theirs and a default. A missing field has Hugging Face's default (Chameleon's), or is inferred from the tensors (None).
_SIZES = {
    "vocab": ("vocab_size", None),
    "width": ("hidden_size", None),
    "layers": ("num_hidden_layers", None),
    "heads": ("num_attention_heads", None),
    "kv_heads": ("num_key_value_heads", None),
    "hidden": ("intermediate_size", None),
    "max_positions": ("max_position_embeddings", 4096),
    "eps": ("rms_norm_eps", 1e-5),
    "rope_theta": ("rope_theta", 10_000.0),
    "swin_norm": ("swin_norm", False),
}
_ONLY = {  # options that the released model does not use: any other value is an error
    "attention_bias": False,
    "mlp_bias": False,
    "model_parallel_size": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "attention_chunk_size": None,
}
_ROPE = {
    "rope_type": "default",
    "type": "default",
    "partial_rotary_factor": 1.0,
}  # of transformers 5's rope_parameters, beside rope_theta
_LAYER = "full_attention"  # the only kind of layer, where layer_types lists them
# What is written where a config is not copied: the options that every version knows.
_WRITTEN = {
    "attention_bias",
    "mlp_bias",
    "model_parallel_size",
    "pad_token_id",
    "tie_word_embeddings",
    "rope_scaling",
    "hidden_act",
}
_DROPOUT = ("dropout", "attention_dropout", "hidden_dropout", "resid_dropout", "embd_dropout")
# Fields that are read elsewhere, or do not affect the computation: names, storage, token ids, generation defaults, the unused VQ of Chameleon.
_NEUTRAL = frozenset(
    """ids mask_image_logits vocabulary_map vq_config z_loss_weight initializer_range bos_token_id eos_token_id sep_token_id
    decoder_start_token_id image_token_id architectures model_type torch_dtype dtype transformers_version auto_map name _name_or_path _commit_hash
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation use_cache use_bfloat16
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript tokenizer_class prefix
    finetuning_task id2label label2id task_specific_params problem_type is_decoder tie_encoder_decoder pruned_heads
    cross_attention_hidden_size chunk_size_feed_forward pretraining_tp tf_legacy_loss gradient_checkpointing max_length min_length
    max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens""".split()  # noqa: SIM905
)


def of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes inferred from tensors' shapes (by tree path), without those whose tensors are missing or have a wrong rank."""
    layer: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        if len(shape) == 2:
            layer.setdefault(path.split(".", 2)[-1], shape)
    sizes = {}
    if "embed" in layer:
        sizes["vocab"], sizes["width"] = layer["embed"]
    if "gate" in layer:
        sizes["hidden"] = layer["gate"][0]
    head = layer.get("q_norm.gain", layer.get("k_norm.gain", (1, 0)))[1]
    for name, key in (("heads", "q"), ("kv_heads", "k")):
        if key in layer and head:
            sizes[name] = layer[key][0] // head
    if "q_norm.gain" in layer:
        sizes["head_norms"] = layer["q_norm.gain"][0] > 1
    if blocks := [int(path.split(".")[1]) for path in shapes if path.startswith("blocks.")]:
        sizes["layers"] = 1 + max(blocks)
    return sizes


def parse(config: Mapping, sizes: Mapping[str, int], where: object) -> tuple[ModelConfig, list[str]]:
    """The model that a config.json describes, and remarks for the user. Raises InputError, which lists every unsupported field.

    `sizes` replace sizes that the config omits.
    """
    known = {name for name, _ in _SIZES.values()} | {*_DROPOUT, "head_dim", "rope_parameters", "layer_types"}
    unknown = config.keys() - _NEUTRAL - _ONLY.keys() - known
    wrong = [f"this model does not have the fields {listed(sorted(unknown))}"] if unknown else []
    wrong += [
        f"{name} is {config[name]!r:.200}, supported is {value!r}"
        for name, value in _ONLY.items()
        if name in config and (config[name] != value or isinstance(config[name], bool) != isinstance(value, bool))
    ]
    theta = _rope_theta(config, wrong)
    values: dict[str, Any] = {"head_norms": bool(sizes.get("head_norms"))}
    for ours, (theirs, default) in _SIZES.items():
        value = theta if ours == "rope_theta" else config.get(theirs)
        values[ours] = value if value is not None else default if default is not None else sizes.get(ours)
    wrong += problems(values)
    if not wrong and config.get("head_dim") not in (None, values["width"] // values["heads"]):
        wrong.append(f"head_dim is {config['head_dim']!r:.200}, supported is hidden_size / num_attention_heads")
    kinds = config.get("layer_types")
    if kinds is not None and kinds != [_LAYER] * (values["layers"] or 0):
        wrong.append(f"layer_types is {kinds!r:.200}, supported is {_LAYER} for every layer")
    masked = _masked_ids(config, wrong)
    ids = read_ids(config.get("ids"), values["vocab"], wrong)
    if wrong:
        raise InputError(printable(f"{where}: {'; '.join(wrong)}"))
    notes = [f"{name} = {config[name]!r:.200} is not applied" for name in _DROPOUT if config.get(name)]
    values |= {"eps": float(values["eps"]), "rope_theta": float(values["rope_theta"])}
    return ModelConfig(**values, masked_ids=masked, ids=ids), notes


def _rope_theta(config: Mapping, wrong: list[str]) -> Any:
    """The base of the rotary angles, which transformers 5 keeps in rope_parameters and 4 beside the sizes; None if it is not said."""
    theta, given = config.get("rope_theta"), config.get("rope_parameters")
    if given is None:
        return theta
    if not isinstance(given, Mapping):
        wrong.append(f"rope_parameters is {given!r:.200}, expected an object")
        return theta
    for name, value in given.items():
        if name != "rope_theta" and (name not in _ROPE or value != _ROPE[name]):
            supported = repr(_ROPE[name]) if name in _ROPE else f"none but rope_theta, {', '.join(_ROPE)}"
            wrong.append(printable(f"rope_parameters.{name} is {value!r:.200}, supported is {supported}"))
    inner = given.get("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        wrong.append(f"rope_theta is {theta!r:.200}, and {inner!r:.200} in rope_parameters")
    return inner if theta is None else theta


def problems(values: Mapping) -> list[str]:
    """What is wrong with a ModelConfig's sizes, in Hugging Face's names."""
    wrong = []
    for field in fields(ModelConfig):
        if field.name not in _SIZES:
            continue
        name, value = _SIZES[field.name][0], values[field.name]
        if isinstance(field.default, bool):
            good, expected = isinstance(value, bool), "true or false"
        elif isinstance(field.default, float):
            good, expected = (
                isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max,
                "a positive number",
            )
        else:
            good, expected = type(value) is int and 0 < value <= LARGEST, f"a whole number from 1 to {LARGEST}"
        if not good:
            wrong.append(f"{name} is {value!r:.200}, expected {expected}")
    if not wrong and (values["width"] % values["heads"] or values["width"] // values["heads"] % 2):
        wrong.append("hidden_size / num_attention_heads must be an even whole number")
    if not wrong and values["heads"] % values["kv_heads"]:
        wrong.append("num_key_value_heads must divide num_attention_heads")
    return wrong


def _masked_ids(config: Mapping, wrong: list[str]) -> tuple[int, ...]:
    """The image ids, if the config masks their logits, as it does by default; else ()."""
    mask, names = config.get("mask_image_logits"), config.get("vocabulary_map")
    if mask not in (None, True, False):
        wrong.append(f"mask_image_logits is {mask!r:.200}, expected true or false")
    if not isinstance(names, Mapping | None):
        wrong.append("vocabulary_map is not an object of names and ids")
        names = None
    if mask is True and names is None:
        wrong.append("mask_image_logits is true but there is no vocabulary_map to tell the image ids")
    if mask is False or names is None:
        return ()
    ids = [i for name, i in names.items() if name.startswith(IMAGE_TOKEN)]
    vocab = config.get("vocab_size")
    if any(type(i) is not int or i < 0 or (type(vocab) is int and i >= vocab) for i in ids):
        wrong.append("vocabulary_map has an image id that is not below vocab_size")
        return ()
    return tuple(sorted(ids))


def read_ids(own: object, vocab: object, wrong: list[str]) -> Ids | None:
    """The special ids in a config.json, or None; faults are appended to `wrong`."""
    if own is None:
        return None
    names = [f.name for f in fields(Ids)]
    if (
        not isinstance(own, Mapping)
        or set(own) != set(names)
        or any(type(i) is not int or not 0 <= i <= LARGEST for i in own.values())
    ):
        wrong.append(f"ids must hold whole numbers from 0 to {LARGEST}: {', '.join(names)}")
        return None
    fixed = {
        "start": LUMINA_START,
        "end": LUMINA_END,
        "newline": LUMINA_NEWLINE,
        "code0": LUMINA_CODE0,
        "codes": LUMINA_CODES,
    }
    if vocab == LUMINA_VOCAB:
        wrong += [f"ids.{n} is {own[n]}, the released vocabulary has {i}" for n, i in fixed.items() if own[n] != i]
    return Ids(**own)


def write(cfg: ModelConfig, source: Mapping | None) -> dict:
    """A config.json for this model: `source` if it describes the same model, else with the fields that differ replaced.

    transformers 4 and 5 read it alike: the base of the rotary angles is where 4 looks for it, and 5 does too.
    """
    config: dict[str, Any] = {"architectures": [_REFERENCE]} if source is None else dict(source)
    config.setdefault("model_type", CHAMELEON)
    try:
        same = replace(parse(config, asdict(cfg), "config.json")[0], ids=None) == replace(cfg, ids=None)
    except InputError:
        same = False
    if same and source is not None:
        return config | ({"rope_theta": cfg.rope_theta} if "rope_parameters" in config else {})
    config |= {theirs: getattr(cfg, ours) for ours, (theirs, _) in _SIZES.items()}
    config |= {name: value for name, value in _ONLY.items() if name in _WRITTEN}
    config.pop("layer_types", None)
    if "rope_parameters" in config:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    config["mask_image_logits"] = bool(cfg.masked_ids)
    if cfg.masked_ids and _masked_ids(config, []) != cfg.masked_ids:
        config["vocabulary_map"] = {f"{IMAGE_TOKEN}{n:05d}": i for n, i in enumerate(cfg.masked_ids)}
    if cfg.ids is not None:
        config["ids"] = asdict(cfg.ids)
    return config


def write_chameleon(cfg: ModelConfig, source: Mapping | None) -> dict:
    """A config.json by which transformers' own Chameleon computes this model; it masks every id whose name begins with IMAGE_TOKEN."""
    config = write(cfg, source)
    named = config.get("vocabulary_map") or {}
    masked = {i: name for name, i in named.items() if name.startswith(IMAGE_TOKEN)} if cfg.masked_ids else {}
    others = {name: i for name, i in named.items() if not name.startswith(IMAGE_TOKEN)}
    names = {name: i for i, name in masked.items()} | {_PLACEHOLDER: 0} | others
    return config | {"model_type": CHAMELEON, "architectures": [_TRANSFORMERS], "vocabulary_map": names}
