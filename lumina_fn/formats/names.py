"""The names of parameters: our tree paths and other tools' state dict keys, in one table per tree that is read in both directions."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

import optree
from torch import Tensor

Tree = TypeVar("Tree")
Table = tuple[tuple[str, str], ...]  # (our path, their key); a * stands for the same whole numbers on both sides

TRANSFORMER: Table = (
    ("embed", "model.embed_tokens.weight"),
    ("blocks.*.attn_norm", "model.layers.*.input_layernorm.weight"),
    ("blocks.*.q", "model.layers.*.self_attn.q_proj.weight"),
    ("blocks.*.k", "model.layers.*.self_attn.k_proj.weight"),
    ("blocks.*.v", "model.layers.*.self_attn.v_proj.weight"),
    ("blocks.*.q_norm.gain", "model.layers.*.self_attn.q_norm.weight"),
    ("blocks.*.q_norm.bias", "model.layers.*.self_attn.q_norm.bias"),
    ("blocks.*.k_norm.gain", "model.layers.*.self_attn.k_norm.weight"),
    ("blocks.*.k_norm.bias", "model.layers.*.self_attn.k_norm.bias"),
    ("blocks.*.out", "model.layers.*.self_attn.o_proj.weight"),
    ("blocks.*.mlp_norm", "model.layers.*.post_attention_layernorm.weight"),
    ("blocks.*.gate", "model.layers.*.mlp.gate_proj.weight"),
    ("blocks.*.up", "model.layers.*.mlp.up_proj.weight"),
    ("blocks.*.down", "model.layers.*.mlp.down_proj.weight"),
    ("head.norm", "model.norm.weight"),
    ("head.unembed", "lm_head.weight"),
)


def _under(ours: str, theirs: str, rows: Table) -> Table:
    return tuple((f"{ours}.{a}", f"{theirs}.{b}") for a, b in rows)


_CONV: Table = (("weight", "weight"), ("bias", "bias"))
_GROUP_NORM: Table = (("gain", "weight"), ("bias", "bias"))
_SPATIAL_NORM = (
    _under("norm", "norm_layer", _GROUP_NORM) + _under("gain", "conv_y", _CONV) + _under("bias", "conv_b", _CONV)
)


def _coder(norm: Table, levels: str, resample: str) -> Table:
    res = (
        *_under("norm1", "norm1", norm), *_under("conv1", "conv1", _CONV), *_under("norm2", "norm2", norm),
        *_under("conv2", "conv2", _CONV), *_under("shortcut.0", "nin_shortcut", _CONV),
    )  # fmt: skip
    attention = (
        *_under("norm", "norm", norm), *_under("q", "q", _CONV), *_under("k", "k", _CONV), *_under("v", "v", _CONV),
        *_under("out", "proj_out", _CONV),
    )  # fmt: skip
    return (
        *_under("conv_in", "conv_in", _CONV),
        *_under("levels.*.blocks.*", f"{levels}.*.block.*", res),
        *_under("levels.*.attentions.*", f"{levels}.*.attn.*", attention),
        *_under("levels.*.resample.0", f"{levels}.*.{resample}.conv", _CONV),
        *_under("middle.block1", "mid.block_1", res),
        *_under("middle.attention", "mid.attn_1", attention),
        *_under("middle.block2", "mid.block_2", res),
        *_under("norm_out", "norm_out", norm),
        *_under("conv_out", "conv_out", _CONV),
    )


MOVQGAN: Table = (
    *_under("encoder", "encoder", _coder(_GROUP_NORM, "down", "downsample")),
    *_under("decoder", "decoder", _coder(_SPATIAL_NORM, "up", "upsample")),
    ("codebook", "quantize.embedding.weight"),
    *_under("quant_conv", "quant_conv", _CONV),
    *_under("post_quant_conv", "post_quant_conv", _CONV),
)


_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,5})(?![^.])", re.ASCII)


@cache
def _by_form(table: Table, column: int) -> dict[str, list[tuple[re.Pattern[str], str]]]:
    """For each form of a name (with a * for every number), the patterns of a column that may match, and the other column's name.

    A foreign file may hold a million keys: the form avoids matching each of them against every row.
    """
    found: dict[str, list[tuple[re.Pattern[str], str]]] = {}
    for row in table:
        pattern = re.compile(re.escape(row[column]).replace(r"\*", "(0|[1-9][0-9]{0,5})"), re.ASCII)
        found.setdefault(_NUMBER.sub("*", row[column]), []).append((pattern, row[1 - column]))
    return found


def _renamed(name: str, table: Table, column: int) -> str | None:
    for pattern, other in _by_form(table, column).get(_NUMBER.sub("*", name), ()):
        if match := pattern.fullmatch(name):
            numbers = iter(match.groups())
            return re.sub(r"\*", lambda _: next(numbers), other)  # noqa: B023
    return None


def to_native(key: str, table: Table) -> str | None:
    """Our path for their key; None for a key the table does not know."""
    return _renamed(key, table, 1)


def to_source(path: str, table: Table) -> str | None:
    """Their key for our path; None for a path the table does not know."""
    return _renamed(path, table, 0)


def key_of(path: str, table: Table) -> str:
    """Their key for a path of a tree that the table describes whole. Raises KeyError for a path it does not know."""
    if (key := to_source(path, table)) is None:
        raise KeyError(path)
    return key


def flatten(tree: Any) -> dict[str, Tensor]:
    """The tree's tensors by path: fields and positions joined by dots, such as blocks.0.q_norm.gain."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return {
        ".".join(str(getattr(e, "field", e.entry)) for e in a): leaf for a, leaf in zip(accessors, leaves, strict=True)
    }


def unflatten(like: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    """A tree of the structure of `like` with the tensors of these paths. Raises KeyError for a missing one."""
    spec = optree.tree_structure(cast("Any", like))
    return cast("Tree", optree.tree_unflatten(spec, [tensors[path] for path in flatten(like)]))
