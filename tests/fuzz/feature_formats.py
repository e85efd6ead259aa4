"""Feature sets, our own and those that others extracted."""

import json
from functools import partial
from pathlib import Path

import numpy as np

from lumina_fn import data, prompt
from lumina_fn.errors import InputError
from lumina_fn.features import foreign, shards
from lumina_fn.features.parts import digest
from tests.fuzz import pickles
from tests.fuzz.containers import mutated_safetensors, mutated_torch_file, saved
from tests.fuzz.law import CANARY
from tests.fuzz.playground import Format, Ground, json_cases, roads
from tests.support import folders
from tests.support.small_run import CODES


def write_feature_sets(at: Ground) -> Path:
    """One in the folder, and one like it outside, whose codes are others."""
    folder = at.folder / "features"
    for place, code in ((folder, 3), (at.outside, 7)):
        place.mkdir(exist_ok=True)
        ids = shards.Ids(1, 2, 3, 4, 5, 100, CODES)
        items = [shards.Feature(i, [9] * (3 + i), np.full((8, 4 + 4 * (i % 2)), code)) for i in range(3)]
        shards.write_features(place, items, shards.Origin(64, 0, ids, "t", "v"))
    return folder


def _items(folder: Path) -> object:
    features = data.FeatureSet(folder)
    features.lengths()
    told = [features[i] for i in {*range(min(4, len(features))), len(features) - 1} if i >= 0]
    return features.origin.tokenizer, [CANARY for ids, _ in told if ids.count(107) > 8]


def shard(at: Ground, part: str) -> Format:
    folder = write_feature_sets(at)
    file = next(folder.glob(f"{part}-*.safetensors"))
    index = json.loads((folder / shards.INDEX).read_text())
    seeds = [file.read_bytes()]

    def place(case: bytes) -> None:
        file.write_bytes(case)
        for entry in index["shards"]:
            entry["bytes"] = (folder / entry["file"]).stat().st_size
            entry["sha256"] = digest(folder / entry["file"])  # or all that is read would be the checksum
        (folder / shards.INDEX).write_text(json.dumps(index))

    def read() -> object:
        try:
            return _items(folder)
        finally:
            shards.read(file)

    words = ("rows", "lengths", "text", "codes", "sha256", "sources", "about", "U16", "I32", "U8", "F16", "I64")
    return Format(
        seeds,
        partial(mutated_safetensors, seeds, words),
        place,
        read if part == "features" else partial(_items, folder),
    )


def index(at: Ground) -> Format:
    folder = write_feature_sets(at)
    for i, file in enumerate(sorted(at.outside.glob("*.safetensors"))):
        (folder / f"link{i}.safetensors").symlink_to(file)
    (folder / "secret.json").symlink_to(at.outside / "secret.json")
    file = folder / shards.INDEX
    names = [path.name for path in (*folder.glob("*"), *at.outside.glob("*"))]
    seeds, mutate = json_cases(
        [json.loads(file.read_text())], [*names, *(road for n in names for road in roads(at, n))]
    )
    return Format(seeds, mutate, file.write_bytes, partial(_items, folder))


def extracted(at: Ground, kind: str) -> Format:
    """Features that others extracted: a file of ids and labels, and the index that lists it."""
    folders.write_tokenizer(at.folder, CODES)
    tokenizer = prompt.load_tokenizer(at.folder)
    ids, labels = data.training_item(tokenizer, "a heart", np.ones((8, 8), int), with_size=True)
    value, evil = {"token": ids, "label": labels, "id": 0}, {"token": pickles.Evil(at.outside), "label": labels}
    theirs = at.folder / "theirs"
    (theirs / "files").mkdir(parents=True)
    (theirs / "data.jsonl").write_text(json.dumps({"file": f"files/0.{kind}", "len": len(ids), "id": 0}) + "\n")
    seeds = (
        [saved(value), saved(evil)]
        if kind == "pt"
        else [pickles.pickle.dumps(v, p) for v in (value, evil) for p in range(6)]
    )

    def read() -> object:
        (told,) = foreign.read(theirs, tokenizer)
        if isinstance(told, foreign.Left):
            raise InputError(told.reason)
        return told

    mutate = partial(mutated_torch_file if kind == "pt" else pickles.mutated_pickle, seeds)
    return Format(seeds, mutate, (theirs / "files" / f"0.{kind}").write_bytes, read)
