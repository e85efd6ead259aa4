"""What features are made from: rows, pictures, and the tokenizer of the captions."""

import json

from PIL import Image

from experiments.pretokenizing import folder
from experiments.pretokenizing.rows import Recipe, prepare
from lumina_fn import data, prompt
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.rows import opened
from lumina_fn.rows.row import Item, Row
from tests.fuzz import pictures, tokenizers_small
from tests.fuzz.law import CANARY
from tests.fuzz.mutate import mutated
from tests.fuzz.playground import Format, Ground, json_cases, roads
from tests.support import folders
from tests.support.small_run import CODES


def row_file(at: Ground, lines: bool) -> Format:
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
        seeds, mutate = json_cases(
            [b"\n".join(json.dumps(r).encode() for r in rows * 2)], [*roads(at, "secret.png"), "images/link.png"]
        )
    else:
        trailing = b'\xef\xbb\xbf[{"file": "images/a.png", "prompt": "a \\" , ] b",}, ]\n'
        seeds, mutate = json_cases([rows, rows[0], trailing], [*roads(at, "secret.png"), "images/link.png"])
    file = at.folder / ("data.jsonl" if lines else "data.json")
    secret = data.hashlib.sha256((at.outside / "secret.png").read_bytes()).digest()

    def read() -> object:
        found = opened.opened(file)
        folder.plan(found, origin, 1024)
        recipe = Recipe(found.roots, tokenizer, 64, 0)
        items = found.items(range(min(found.count, 8)), True)
        told = [prepare(i, item, recipe) for i, item in enumerate(items)]
        return [CANARY if getattr(t, "sha256", None) == secret else getattr(t, "reason", "") for t in told]

    if not lines:
        seeds = [*seeds, b'["' + b'\\"' * 2000]
    return Format(seeds, mutate, file.write_bytes, read)


def tokenizer_file(at: Ground, name: str) -> Format:
    folder = at.folder
    folders.write_tokenizer(folder, CODES)
    (folder / "config.json").unlink()
    specs = tokenizers_small.specs()
    words = tokenizers_small.WORDS
    seeds, mutate = json_cases(
        specs
        if name == "tokenizer.json"
        else [json.loads((folder / name).read_text()), {"eos_token": {"content": "</s>"}}],
        words,
    )
    (folder / "tokenizer.json").write_bytes(json.dumps(specs[0]).encode())
    (folder / "config.json").write_text(json.dumps({"ids": tokenizers_small.IDS}))

    def read() -> object:
        tokenizer = prompt.load_tokenizer(folder, tried=True)  # no process is started under the law
        for caption in ("a red heart", "é\u202e<eoss> \0 <s>", "x" * 300):
            if prompt.caption_problem(tokenizer, caption) is None:
                prompt.prompt_ids(tokenizer, caption, 64, 64)
        return tokenizer.fingerprint

    return Format(seeds, mutate, (folder / name).write_bytes, read)


def picture(at: Ground) -> Format:
    folders.write_tokenizer(at.folder, CODES)
    tokenizer = prompt.load_tokenizer(at.folder)
    seeds = list(pictures.seeds().values())
    row, recipe = Item(Row("x.png", "a picture"), None), Recipe([at.folder], tokenizer, 64, 0)

    def read() -> object:
        told = prepare(0, row, recipe)
        if isinstance(told, shards.Rejected):
            raise InputError(told.reason)
        return told.source

    return Format(seeds, lambda pick: mutated(seeds, pick), (at.folder / "x.png").write_bytes, read)
