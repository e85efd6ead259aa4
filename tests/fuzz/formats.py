"""The formats that are read from strangers: valid files of each, the reader, and how a case is laid into a folder."""

import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from experiments import pretokenize
from lumina_fn import (
    checkpoint,
    data,
    dataset,
    imported,
    model,
    prompt,
    safe_pickle,
    shards,
    sources,
    tensor_files,
    torch_zip,
    vq,
)
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.errors import InputError
from tests import folders
from tests.fuzz import pickles, pictures, tokenizers_small
from tests.fuzz.law import CANARY
from tests.fuzz.mutate import mutated
from tests.small_run import CODES

Mutate = Callable[[random.Random], bytes]


class Format(NamedTuple):
    seeds: Sequence[bytes]  # valid, or an attack
    mutate: Mutate
    place: Callable[[bytes], object]  # puts a case into the folder
    read: Callable[[], object]  # returns what must not hold the canary
    refusal: type[Exception] = InputError


class Ground(NamedTuple):
    """Where a format's cases are played: what is in `folder` may be read, nothing in `outside`."""

    folder: Path
    outside: Path


def ground(root: Path) -> Ground:
    """An empty folder, and one beside it that no file may lead to."""
    folder, outside = root / "folder", root / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(outside / "secret.png")
    (outside / "secret.json").write_text(json.dumps({CANARY: CANARY}))
    return Ground(folder, outside)


def _json(seeds: Sequence[object], words: Sequence[str] = ()) -> tuple[list[bytes], Mutate]:
    data = [s if isinstance(s, bytes) else json.dumps(s).encode() for s in seeds]
    return data, lambda pick: mutated(data, pick, words, 0.8)


def _roads(at: Ground, name: str) -> list[str]:
    """Words that lead to a file outside of the folder."""
    return [
        f"../outside/{name}",
        str(at.outside / name),
        f"linked/{name}",
        name,
        f"./{name}",
        f"images/../../outside/{name}",
    ]


def _rows(at: Ground, lines: bool) -> Format:
    (at.folder / "images").mkdir()
    (at.folder / "linked").symlink_to(at.outside)
    (at.folder / "images" / "link.png").symlink_to(at.outside / "secret.png")
    Image.new("RGB", (40, 40), "red").save(at.folder / "images" / "a.png")
    (at.folder / "images" / "b.png").write_bytes(b"no picture")
    ids = folders.write_tokenizer(at.folder, CODES)
    tokenizer = prompt.load_tokenizer(at.folder)
    origin = shards.Origin(64, 0, ids, tokenizer.fingerprint, "vq")
    rows = [{"file": f"images/{n}.png", "prompt": f"{n} or so", "extra": [1, {"x": None}]} for n in "ab"]
    if lines:
        seeds, mutate = _json(
            [b"\n".join(json.dumps(r).encode() for r in rows * 2)], [*_roads(at, "secret.png"), "images/link.png"]
        )
    else:
        trailing = b'\xef\xbb\xbf[{"file": "images/a.png", "prompt": "a \\" , ] b",}, ]\n'
        seeds, mutate = _json([rows, rows[0], trailing], [*_roads(at, "secret.png"), "images/link.png"])
    file = at.folder / ("data.jsonl" if lines else "data.json")
    secret = data.hashlib.sha256((at.outside / "secret.png").read_bytes()).digest()

    def read() -> object:
        found = dataset.read_rows(file)
        pretokenize.plan(found, origin, 1024)
        told = [pretokenize.prepare(i, row, [at.folder], tokenizer, 64, 0) for i, row in enumerate(found[:8])]
        return [CANARY if getattr(t, "sha256", None) == secret else getattr(t, "reason", "") for t in told]

    if not lines:
        seeds = [*seeds, b'["' + b'\\"' * 2000]
    return Format(seeds, mutate, file.write_bytes, read)


STATE = {key: tensor for key, tensor in folders.small_state().items() if ".layers.1." not in key}
CONFIG = {**folders.SMALL, "num_hidden_layers": 1}


def _tensors(path: Path) -> object:
    source = sources.open_source(path)
    for tensor in source.tensors.values():
        tensor_files.read(tensor, "cpu", torch.float32)
    return source.remarks, source.config


def _header(seeds: Sequence[bytes], words: Sequence[str], pick: random.Random) -> bytes:
    """A safetensors file with another header, its length set right in most cases."""
    whole = pick.choice(seeds)
    length = int.from_bytes(whole[:8], "little")
    if pick.random() < 0.3:
        return mutated(seeds, pick)
    header = mutated([whole[8 : 8 + length]], pick, words, 0.8)
    said = len(header) if pick.random() < 0.95 else pick.choice((0, 1, 2**63, 2**64 - 1, 16 << 20, length))
    return said.to_bytes(8, "little") + header + whole[8 + length :]


def _safetensors(at: Ground) -> Format:
    folders.write_hf(at.folder / "hf", STATE, CONFIG)
    file = at.folder / "hf" / "model.safetensors"
    seeds = [file.read_bytes()]
    return Format(seeds, partial(_header, seeds, ()), file.write_bytes, partial(_tensors, at.folder / "hf"))


def _weights_index(at: Ground) -> Format:
    folders.write_hf(at.folder / "hf", STATE, CONFIG, shards=2)
    shutil.copy(at.folder / "hf" / "model-00001-of-00002.safetensors", at.outside / "secret.safetensors")
    (at.folder / "hf" / "link.safetensors").symlink_to(at.outside / "secret.safetensors")
    file = at.folder / "hf" / tensor_files.INDEX
    seeds, mutate = _json(
        [json.loads(file.read_text())], [*_roads(at, "secret.safetensors"), "link.safetensors", "config.json"]
    )
    return Format(seeds, mutate, file.write_bytes, partial(_tensors, at.folder / "hf"))


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


def _shard(at: Ground, part: str) -> Format:
    folder = write_feature_sets(at)
    file = next(folder.glob(f"{part}-*.safetensors"))
    index = json.loads((folder / shards.INDEX).read_text())
    seeds = [file.read_bytes()]

    def place(case: bytes) -> None:
        file.write_bytes(case)
        for entry in index["shards"]:
            entry["bytes"] = (folder / entry["file"]).stat().st_size
        (folder / shards.INDEX).write_text(json.dumps(index))

    def read() -> object:
        try:
            return _items(folder)
        finally:
            shards.read(file)

    words = ("rows", "lengths", "text", "codes", "sha256", "sources", "about", "U16", "I32", "U8", "F16", "I64")
    return Format(seeds, partial(_header, seeds, words), place, read if part == "features" else partial(_items, folder))


def _features_json(at: Ground) -> Format:
    folder = write_feature_sets(at)
    for i, file in enumerate(sorted(at.outside.glob("*.safetensors"))):
        (folder / f"link{i}.safetensors").symlink_to(file)
    (folder / "secret.json").symlink_to(at.outside / "secret.json")
    file = folder / shards.INDEX
    names = [path.name for path in (*folder.glob("*"), *at.outside.glob("*"))]
    seeds, mutate = _json([json.loads(file.read_text())], [*names, *(road for n in names for road in _roads(at, n))])
    return Format(seeds, mutate, file.write_bytes, partial(_items, folder))


def _zipped(seeds: Sequence[bytes], pick: random.Random) -> bytes:
    """A torch file with other bytes, or with another pickle under a right checksum."""
    whole = pick.choice(seeds)
    if pick.random() < 0.4:
        return mutated([whole], pick)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            body = old.read(info)
            if info.filename.endswith("data.pkl"):
                body = pickles.mutated_pickle([body], pick)
            elif pick.random() < 0.02:
                body = body[: pick.randrange(len(body) + 1)]
            new.writestr(info.filename, body)
            if pick.random() < 0.01:
                new.writestr(pick.choice(("x/data.pkl", "../../outside/new", "data/0", "/etc/new")), body)
    return out.getvalue() if pick.random() < 0.9 else mutated([out.getvalue()], pick)


def _saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _ckpt(at: Ground) -> Format:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, 2).T, "c": torch.zeros(3, dtype=torch.bfloat16)}
    tensors["tied"] = tensors["a"][:1]
    seeds = [
        _saved({"state_dict": tensors, "epoch": 3}),
        _saved(tensors),
        _saved({"state_dict": {**tensors, "run": pickles.Evil(at.outside)}}),
    ]
    file = at.folder / "model.ckpt"

    def read() -> object:
        try:
            found, others = torch_zip.state_dict(file, "state_dict")
        except OSError as error:  # `sources.open_source` does the same
            raise InputError(str(error)) from error
        for tensor in found.values():
            tensor_files.read(tensor, "cpu", tensor.dtype)
        return others

    return Format(seeds, partial(_zipped, seeds), file.write_bytes, read)


def _mindspeed(at: Ground) -> Format:
    folders.write_mindspeed(at.folder / "theirs", STATE, args={"iteration": 3})
    seeds = [
        _saved({"model": STATE}),
        _saved({"model": STATE, "args": pickles.Evil(at.outside), "rng_state": [1, {"x": (2,)}]}),
    ]
    file = at.folder / "theirs" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    return Format(seeds, partial(_zipped, seeds), file.write_bytes, partial(_tensors, at.folder / "theirs"))


def _foreign(at: Ground, kind: str) -> Format:
    """Features that others extracted: a file of ids and labels, and the index that lists it."""
    folders.write_tokenizer(at.folder, CODES)
    tokenizer = prompt.load_tokenizer(at.folder)
    ids, labels = data.training_item(tokenizer, "a heart", np.ones((8, 8), int), with_size=True)
    value, evil = {"token": ids, "label": labels, "id": 0}, {"token": pickles.Evil(at.outside), "label": labels}
    theirs = at.folder / "theirs"
    (theirs / "files").mkdir(parents=True)
    (theirs / "data.jsonl").write_text(json.dumps({"file": f"files/0.{kind}", "len": len(ids), "id": 0}) + "\n")
    seeds = (
        [_saved(value), _saved(evil)]
        if kind == "pt"
        else [pickles.pickle.dumps(v, p) for v in (value, evil) for p in range(6)]
    )

    def read() -> object:
        (told,) = imported.read(theirs, tokenizer)
        if isinstance(told, imported.Left):
            raise InputError(told.reason)
        return told

    mutate = partial(_zipped if kind == "pt" else pickles.mutated_pickle, seeds)
    return Format(seeds, mutate, (theirs / "files" / f"0.{kind}").write_bytes, read)


def _pickle(at: Ground) -> Format:
    seeds = pickles.seeds(at.outside)
    file = at.folder / "x.pkl"
    return Format(
        seeds,
        partial(pickles.mutated_pickle, seeds),
        file.write_bytes,
        lambda: safe_pickle.loads(file.read_bytes()) and "",
        ValueError,
    )


def _tokenizer(at: Ground, name: str) -> Format:
    folder = at.folder
    folders.write_tokenizer(folder, CODES)
    (folder / "config.json").unlink()
    specs = tokenizers_small.specs()
    words = tokenizers_small.WORDS
    seeds, mutate = _json(
        specs
        if name == "tokenizer.json"
        else [json.loads((folder / name).read_text()), {"eos_token": {"content": "</s>"}}],
        words,
    )
    (folder / "tokenizer.json").write_bytes(json.dumps(specs[0]).encode())
    (folder / "config.json").write_text(json.dumps({"ids": tokenizers_small.IDS}))

    def read() -> object:
        tokenizer = prompt.load_tokenizer(folder)
        for caption in ("a red heart", "é\u202e<eoss> \0 <s>", "x" * 300):
            if prompt.caption_problem(tokenizer, caption) is None:
                prompt.prompt_ids(tokenizer, caption, 64, 64)
        return tokenizer.fingerprint

    return Format(seeds, mutate, (folder / name).write_bytes, read)


def _config(at: Ground) -> Format:
    folders.write_hf(at.folder / "hf", STATE, CONFIG)
    ids = {"start": 1, "end": 2, "newline": 3, "sep": 4, "size0": 5, "code0": 20, "codes": 16}
    more = {"ids": ids, "vocabulary_map": {"IMGIMG1": 3, "x": 5}, "dropout": 0.1, "rope_scaling": None, "head_dim": 4}
    seeds, mutate = _json([CONFIG, {**CONFIG, **more}], ("format", "lumina_fn/1", *CONFIG, *more, "mask_image_logits"))
    return Format(seeds, mutate, (at.folder / "hf" / "config.json").write_bytes, partial(_tensors, at.folder / "hf"))


def _native(at: Ground) -> Format:
    """The configs of a small model and a small VQ, each beside its weights: a case lands in both folders."""
    lm, small = at.folder / "lm", at.folder / "vq"
    cfg = ModelConfig(
        vocab=40,
        width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        hidden=8,
        max_positions=16,
        ids=shards.Ids(1, 2, 3, 4, 5, 20, 16),
    )
    checkpoint.save_model(lm, model.init(cfg), cfg)
    vq_cfg = VQConfig(channels=4, multipliers=(1, 1), res_blocks=1, attn_levels=(1,), codes=8, groups=2)
    checkpoint.save_vq(small, vq.init(vq_cfg), vq_cfg)
    seeds, mutate = _json(
        [json.loads((f / "config.json").read_text()) for f in (lm, small)], ("lumina", "movqgan", "ids", "model_type")
    )

    def place(case: bytes) -> None:
        kind = lm if b'lumina"' in case else small
        (kind / "config.json").write_bytes(case)
        turn[0] = kind

    turn = [lm]
    return Format(seeds, mutate, place, lambda: _tensors(turn[0]))


def _picture(at: Ground) -> Format:
    folders.write_tokenizer(at.folder, CODES)
    tokenizer = prompt.load_tokenizer(at.folder)
    seeds = list(pictures.seeds().values())
    row = {"file": "x.png", "prompt": "a picture"}

    def read() -> object:
        told = pretokenize.prepare(0, row, [at.folder], tokenizer, 64, 0)
        if isinstance(told, shards.Rejected):
            raise InputError(told.reason)
        return told.source

    return Format(seeds, lambda pick: mutated(seeds, pick), (at.folder / "x.png").write_bytes, read)


FORMATS: dict[str, Callable[[Ground], Format]] = {
    "data.json": partial(_rows, lines=False),
    "JSONL": partial(_rows, lines=True),
    "safetensors": _safetensors,
    "safetensors index": _weights_index,
    "feature shard": partial(_shard, part="features"),
    "feature index": partial(_shard, part="index"),
    "features.json": _features_json,
    ".ckpt": _ckpt,
    ".pt": _mindspeed,
    "features .pt": partial(_foreign, kind="pt"),
    "features .pkl": partial(_foreign, kind="pkl"),
    "pickle": _pickle,
    "tokenizer.json": partial(_tokenizer, name="tokenizer.json"),
    "tokenizer_config.json": partial(_tokenizer, name="tokenizer_config.json"),
    "config.json, Hugging Face": _config,
    "config.json, native": _native,
    "pictures": _picture,
}
