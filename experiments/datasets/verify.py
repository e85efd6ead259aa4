"""`experiments.dataset verify`: encode some pictures of a feature set again, and check that sources, codes and captions are the same."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from experiments import devices
from experiments.datasets import inspection
from experiments.datasets.inspection import Reading
from experiments.pretokenizing import rows as rows_of
from lumina_fn import checkpoint, data, images, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.disk import lookup
from lumina_fn.errors import InputError, printable
from lumina_fn.prompt import Tokenizer
from lumina_fn.rows import opened
from lumina_fn.rows.row import Item

if TYPE_CHECKING:
    from experiments.dataset import Verify


class Compared(NamedTuple):
    """The comparison of a row: how many codes were compared, how many are equal, and what is wrong."""

    codes: int
    equal: int
    fault: str | None


def verify(run: "Verify") -> int:
    """Compare a sample and print a line for every row that differs; returns the exit code, 1 if one does. Raises InputError."""
    lookup.check_roots(run.image_root)
    features = data.FeatureSet(run.features)
    damaged = list(features.damaged())
    for fault in damaged:
        print(printable(fault))
    if damaged:
        return 1
    if n := features.unchecked():
        print(
            printable(
                f"{n} shards have no checksum: an earlier version wrote them; run the same experiments.pretokenize again"
            )
        )
    done = {e["item"]: e for e in inspection.read_manifest(features) if e["status"] == "done"}
    if not done:
        raise InputError(f"{run.features}: the set is empty; there is nothing to verify")
    rows = opened.opened(run.data, rows_of.how(run, features.origin.seed))
    tokenizer = _same_tokenizer(run.model, features) if run.model else None
    params, cfg = same_vq(run.vq, features, devices.checked_device(run))
    reading = Reading([*rows.roots, *run.image_root], features.origin.size, features.origin.pictures == "as-seen")
    sample = sorted(np.random.default_rng(run.seed).permutation(len(features))[: run.n].tolist())
    total, faults = Compared(0, 0, None), 0
    made = Made(features, params, cfg, tokenizer, reading)
    for item in sample:
        entry = done[item]
        row = rows.item(entry["row"]) if entry["row"] < rows.count else None
        found = _compare(entry, row, item, made, run.allow)
        total = Compared(total.codes + found.codes, total.equal + found.equal, None)
        if found.fault:
            faults += 1
            print(printable(f"row {entry['row']} ({entry['file']}): {found.fault}"))
    share = f"{total.equal / total.codes:.4%} of {total.codes} codes" if total.codes else "no codes compared"
    print(
        f"{len(sample) - faults} of {len(sample)} rows are the same ({1 - faults / len(sample):.1%}); {share} are equal"
    )
    return 1 if faults else 0


def same_vq(path: Path, features: data.FeatureSet, device: torch.device) -> tuple[vq.Params, VQConfig]:
    """The MoVQGAN at this path, on the device. Raises InputError if the features record the fingerprint of another one."""
    params, cfg = checkpoint.load_vq(path)
    if features.origin.vq and (found := data.fingerprint(params)) != features.origin.vq:
        raise InputError(
            f"--vq {path}: its fingerprint is {found[:12]}, the features were made with {features.origin.vq[:12]}; give the one that made them"
        )
    return pytree.tree_map(lambda t: t.to(device), params), cfg


def _same_tokenizer(path: Path, features: data.FeatureSet) -> Tokenizer:
    tokenizer = prompt.load_tokenizer(path)
    if tokenizer.fingerprint != features.origin.tokenizer:
        raise InputError(
            f"--model {path}: its tokenizer's fingerprint is {tokenizer.fingerprint[:12]}, the features were made with "
            f"{features.origin.tokenizer[:12]}; give the model that they were made for"
        )
    return tokenizer


class Made(NamedTuple):
    """A feature set, and the models and folders that it was made with."""

    features: data.FeatureSet
    params: vq.Params
    cfg: VQConfig
    tokenizer: Tokenizer | None
    reading: Reading


def _compare(entry: dict, row: Item | None, item: int, made: Made, allow: float) -> Compared:
    features, params, cfg, tokenizer, reading = made
    changed = lambda why: Compared(0, 0, why)
    if row is None:
        return changed("there is no such row now")
    if row.row.file != entry["file"]:
        return changed(f"the row names {row.row.file} now")
    try:
        loaded = reading.load(row)
        if entry["sha256"] not in (digest := loaded.sha256.hex(), None):
            return changed(f"the source changed: its sha256 is {digest[:12]}, it was {entry['sha256'][:12]}")
    except InputError as error:
        return changed(f"the source cannot be read now: {error}")
    caption = row.row.prompt or ""
    feature = features.feature(item)
    height, width = feature.codes.shape
    if tokenizer and feature.text not in [
        prompt.prompt_ids(tokenizer, caption, 8 * width, 8 * height, with_size) for with_size in (True, False)
    ]:
        return changed("the caption is not the one that was encoded")
    with torch.inference_mode():
        tensor = images.to_tensor(loaded.image)[None].to(params.codebook.device)
        codes = vq.encode(params, tensor, cfg)[0].cpu().numpy()
    if codes.shape != feature.codes.shape:
        return changed(f"{codes.shape} codes, it has {feature.codes.shape}")
    differ = int((codes != feature.codes).sum())
    fault = f"{differ} of {codes.size} codes differ" if differ > allow * codes.size else None
    return Compared(codes.size, codes.size - differ, fault)
