"""The formats that are read from strangers, by name: valid files of each, the reader, and how a case is laid into a folder."""

from collections.abc import Callable
from functools import partial

from tests.fuzz import dataset_formats, feature_formats, row_formats, state_formats, weight_formats
from tests.fuzz.playground import Format, Ground

FORMATS: dict[str, Callable[[Ground], Format]] = {
    "data.json": partial(dataset_formats.row_file, lines=False),
    "JSONL": partial(dataset_formats.row_file, lines=True),
    "CSV": row_formats.table,
    "captions": row_formats.caption,
    "tar": row_formats.tar,
    "Parquet": row_formats.parquet,
    "profiles": row_formats.profile,
    "safetensors": weight_formats.safetensors,
    "safetensors index": weight_formats.index,
    "feature shard": partial(feature_formats.shard, part="features"),
    "feature index": partial(feature_formats.shard, part="index"),
    "features.json": feature_formats.index,
    ".ckpt": weight_formats.ckpt,
    ".pt": weight_formats.mindspeed,
    "features .pt": partial(feature_formats.extracted, kind="pt"),
    "features .pkl": partial(feature_formats.extracted, kind="pkl"),
    "pickle": weight_formats.pickle,
    "tokenizer.json": partial(dataset_formats.tokenizer_file, name="tokenizer.json"),
    "tokenizer_config.json": partial(dataset_formats.tokenizer_file, name="tokenizer_config.json"),
    "config.json, Hugging Face": weight_formats.config,
    "config.json, native": weight_formats.native_config,
    "pictures": dataset_formats.picture,
    "mark": state_formats.mark,
    "lock": state_formats.lock,
    "checkpoint manifest": partial(state_formats.checkpoint, part="manifest"),
    "checkpoint manifest, signed": partial(state_formats.checkpoint, part="signed"),
    "checkpoint index, signed": partial(state_formats.checkpoint, part="index"),
}
