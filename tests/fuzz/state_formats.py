"""What a run keeps of itself: marks, locks, checkpoints' manifests and indices."""

import hashlib
import json
from collections.abc import Callable
from functools import partial

from lumina_fn.disk import locks, marks
from lumina_fn.errors import InputError
from lumina_fn.state import manifest
from tests.fuzz.mutate import mutated
from tests.fuzz.playground import Format, Ground, json_cases, roads


def mark(at: Ground) -> Format:
    """Of a folder that is to be replaced: accepted or refused, and nothing in it changes."""
    folder = at.folder / "result"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (folder / name).write_text(name)
    names = ["a", "sub/b", "sub", ".", "..", *roads(at, "secret.json")]
    seeds, mutate = json_cases([json.loads(marks.text("result", ["a", "sub/b"]))], names)

    def read() -> object:
        marks.check(folder, "result")
        return marks.sort_out(folder)

    return Format(seeds, mutate, (folder / marks.NAME).write_bytes, read)


def lock(at: Ground) -> Format:
    """What another program left in the place of a lock stays, unless it is a process's number."""
    place, seeds = (
        at.folder / ".out.lock",
        [b"12345", b"", b"12 \n", b"\0" * 40, b"9" * 300, "\u0661\u0662".encode(), b"a thesis"],
    )

    def read() -> object:
        before = place.read_bytes()
        try:
            with locks.one_writer(at.folder / "out"):
                if before and not (before.strip().isdigit() and len(before) <= 20):
                    raise AssertionError("another's file was taken for a lock")
        except InputError:
            if place.read_bytes() != before:
                raise AssertionError("another's file was changed") from None
            raise
        return place.read_bytes() == before

    return Format(seeds, lambda pick: mutated(seeds, pick), place.write_bytes, read, writes=True)


def checkpoint(at: Ground, part: str) -> Format:
    """A manifest or an index, and the same with every checksum right, as somebody makes it who knows how."""
    folder = at.folder / "checkpoints"
    tmp = manifest.unfinished(folder, 2)
    (tmp / "shard_00000" / "d").mkdir(parents=True)
    (tmp / "shard_00000" / "d" / "data").write_text("numbers")
    manifest.seal_shard(tmp, 0)
    content = {"parts": 1, "flat": False, "dtype": "float32", "shapes": {"head.norm": [4]}, "meta": {"settings": {}}}
    manifest.commit(folder, 2, {**content, "scalars": {"step": 2, "skipped": 0, "streak": 0}})
    whole = json.loads((folder / "2" / manifest.MANIFEST).read_text())
    index = json.loads((folder / "2" / "shard_00000.json").read_text())
    words = ["d/data", "shard_00000.json", "float64", "1e400", *roads(at, "secret.json")]
    seeds, mutate = json_cases([index if part == "index" else whole["content"]], words)
    seeds = [*seeds, (folder / "2" / manifest.MANIFEST).read_bytes()] if part == "manifest" else seeds

    def sign(case: bytes) -> None:
        try:
            value = json.loads(case)
        except (ValueError, RecursionError):
            (folder / "2" / manifest.MANIFEST).write_bytes(case)
            return
        inner = whole["content"]
        if part == "index":
            data = manifest._text(value)
            (folder / "2" / "shard_00000.json").write_bytes(data)
            inner = {**inner, "indices": {"shard_00000.json": [len(data), hashlib.sha256(data).hexdigest()]}}
        else:
            inner = value
        digest = hashlib.sha256(manifest._text(inner)).hexdigest()
        (folder / "2" / manifest.MANIFEST).write_bytes(manifest._text({"sha256": digest, "content": inner}))

    place: Callable[[bytes], object] = (folder / "2" / manifest.MANIFEST).write_bytes if part == "manifest" else sign
    return Format(seeds, mutate, place, partial(_checked, folder))


def _checked(folder) -> object:
    try:
        return manifest.check(folder, 2)
    except InputError as error:  # Damaged and Unusable are kinds of it
        raise InputError(str(error)) from error
