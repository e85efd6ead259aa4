"""OUT, the folder of a feature set: prepared for a run, and completed after it."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.pretokenizing import shard_claims
from experiments.pretokenizing.shard_claims import Shard
from lumina_fn import as_seen, images
from lumina_fn.disk import files, marks, places, reading
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.features.dataset import Keys
from lumina_fn.features.parts import digest
from lumina_fn.features.shards import MANIFEST, QUARANTINE, Origin, Rejected

ORIGIN = "origin.json"  # the settings that a set was begun with


def plan(rows: Sequence[Any], origin: Origin, size: int, keys: Keys) -> list[Shard]:
    """The set's shards: rows in their order, `size` at a time, under names with a hash of what they are made from."""
    told = []
    for number, begin in enumerate(range(0, len(rows), size)):
        part = range(begin, min(begin + size, len(rows)))
        made_from = [shards.FORMAT, origin.settings(), begin, rows[begin : part.stop], *(keys if any(keys) else ())]
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        told.append(Shard(number, shards.name(number, key), part))
    return told


def begin(out: Path, origin: Origin, planned: list[Shard], *, overwrite: bool, shard: int, retry: bool) -> None:
    """Prepare OUT: as a new set, or as that of an earlier run with the same settings. Raises InputError for anything else."""
    with places.writable(out):
        out.mkdir(exist_ok=True)
        if overwrite:
            marks.check(out, shards.KIND, is_ours)
            files.empty(out, is_ours)
        files.remove_unfinished(out)
        made = json.dumps({**origin.settings(), "shard": shard}, indent=1) + "\n"
        if (out / ORIGIN).exists():
            _same(out, json.loads(made))
        elif others := sorted(path.name for path in out.iterdir() if path.name != marks.NAME):
            raise InputError(f"{out} is no feature set (it holds {others[0]}): give another place")
        if marks.read(out) is None:
            files.write_atomic(out / marks.NAME, marks.text(shards.KIND, []))
        if not (out / ORIGIN).exists():
            files.write_atomic(out / ORIGIN, made)
        shard_claims.begin(out)
        if retry:
            (out / shards.INDEX).unlink(missing_ok=True)  # the set is unfinished until they are made again
            for planned_shard in planned:
                path = out / planned_shard.name
                if path.exists() and shards.read(path).rejected:
                    path.unlink()


def is_ours(path: str) -> bool:
    """Whether pretokenize writes this path below OUT (a folder's path ends with "/")."""
    own = path in (MANIFEST, QUARANTINE, ORIGIN) or shards.is_ours(path) or shard_claims.is_ours(path)
    return own or ("/" not in path and files.is_unfinished(Path(path)))


def _same(out: Path, now: dict[str, Any]) -> None:
    """Raises InputError if OUT was begun with other settings."""
    try:
        then = reading.json_object(out / ORIGIN, "the settings that a feature set was begun with")
    except InputError as error:
        raise InputError(f"{error}; give another place, or --overwrite to start afresh") from error
    stored = {"pictures": "as-stored"}  # what older versions did
    then, now = stored | then, stored | now
    if wrong := [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]:
        raise InputError(
            f"{out} was begun otherwise: {'; '.join(wrong)}; give another place, or --overwrite to start afresh"
        )


def finish(
    out: Path, origin: Origin, planned: list[Shard], files_of: Sequence[Any]
) -> tuple[list[Rejected], Counter[str]]:
    """Write the index and the manifest of all shards, and remove shards of an earlier state of the set.

    `files_of` are the files that the rows name. Returns the rejected rows, and how many of the others each note is true of.
    """
    known = _checksums(out)
    read = [
        (
            shard.name,
            shards.read(out / shard.name),
            shard_claims.checksum(out, shard) or known.get(shard.name) or digest(out / shard.name),
        )
        for shard in planned
    ]
    name_of = dict(enumerate(files_of))
    rejected = [r for _, content, _ in read for r in content.rejected]
    told = (
        line
        for name, content, _ in read
        for line in shards.manifest(name, content, name_of, lambda size: _crop(size, origin.size))
    )
    with places.writable(out):
        files.write_atomic(out / MANIFEST, "".join(json.dumps(line) + "\n" for line in told))
        files.write_atomic(out / QUARANTINE, "".join(json.dumps(r._asdict()) + "\n" for r in rejected))
        shards.finish(out, origin, read)
        kept = {MANIFEST, QUARANTINE, ORIGIN, *shards.names(out)}
        shard_claims.forget(out)
        for path in list(out.iterdir()):
            if path.name not in kept and shards.is_ours(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
    notes = Counter(name for _, content, _ in read for bits in content.notes.tolist() for name in as_seen.names(bits))
    return rejected, notes


def _checksums(out: Path) -> dict[str, str | None]:
    """The checksums, by shard, of the set that OUT was before; empty if it was none."""
    with suppress(InputError):
        return {entry.file: entry.sha256 for entry in shards.read_index_file(out).shards}
    return {}


def _crop(source: tuple[int, int], target: int) -> dict[str, Any] | None:
    how = images.cut(source, target)
    return how and {"size": how.size, "cover": how.cover, "corner": how.corner}
