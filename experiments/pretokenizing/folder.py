"""OUT, the folder of a feature set: prepared for a run, and completed after it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.pretokenizing import shard_claims
from experiments.pretokenizing.shard_claims import Shard
from lumina_fn import as_seen, images
from lumina_fn.disk import files, marks, places, reading
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.features.parts import digest
from lumina_fn.features.shards import MANIFEST, QUARANTINE, Origin, Rejected
from lumina_fn.rows.row import Rows

ORIGIN = "origin.json"  # the settings that a set was begun with
EMPTY = np.zeros(0, np.uint8)  # instead of what is no longer needed of a shard


class Outcome(NamedTuple):
    """What became of the rows of a complete set."""

    done: int
    first: Rejected | None  # of the rows that were left out
    reasons: Counter[str]  # why rows were left out, as far as the first colon
    notes: Counter[str]  # how many of the others each note is true of


def plan(rows: Rows, origin: Origin, size: int) -> list[Shard]:
    """The set's shards: rows in their order, `size` at a time, under names with a hash of what they are made from."""
    told = []
    for number, begin in enumerate(range(0, rows.count, size)):
        part = range(begin, min(begin + size, rows.count))
        stored = [item.stored for item in rows.items(part, False)]
        made_from = [shards.FORMAT, origin.settings(), begin, stored]
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        told.append(Shard(number, shards.name(number, key), part))
    return told


def complete(out: Path, made_from: str) -> Outcome | None:
    """What became of the rows, if OUT is the whole set that is made from these rows and settings; shards are not opened.

    None if it is not, and for a set whose index does not say what it was made from.
    """
    try:
        index = shards.read_index_file(out)
        if not made_from or index.made_from != made_from:
            return None
        shards.read_index(out)
        lines = reading.lines(out / QUARANTINE, "the rows that were left out")
        rejected = [Rejected(**json.loads(line)) for _, line in lines]
    except (ValueError, TypeError, RecursionError):
        return None
    return Outcome(index.count, rejected[0] if rejected else None, _reasons(rejected), Counter(index.notes))


def _reasons(rejected: Iterable[Rejected]) -> Counter[str]:
    return Counter(re.split("[:;]", row.reason)[0] for row in rejected)


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


def finish(out: Path, origin: Origin, planned: list[Shard], rows: Rows, made_from: str) -> Outcome:
    """Write the index and the manifest of all shards, and remove shards of an earlier state of the set."""
    known, made = _checksums(out), []
    outcome = Outcome(0, None, Counter(), Counter())

    def told() -> Iterator[str]:
        nonlocal outcome
        for shard in planned:
            content = shards.read(out / shard.name)
            sha256 = shard_claims.checksum(out, shard) or known.get(shard.name) or digest(out / shard.name)
            made.append((shard.name, content._replace(rejected=[], sources=EMPTY, sha256=EMPTY), sha256))
            outcome.reasons.update(_reasons(content.rejected))
            outcome.notes.update(name for bits in content.notes.tolist() for name in as_seen.names(bits))
            first = outcome.first or next(iter(content.rejected), None)
            outcome = outcome._replace(done=outcome.done + len(content.rows), first=first)
            files_of = dict(zip(shard.rows, (item.row.file for item in rows.items(shard.rows, False)), strict=True))
            crop = lambda size: _crop(size, origin.size)
            yield from (json.dumps(line) + "\n" for line in shards.manifest(shard.name, content, files_of, crop))

    rejected = (r for shard in planned for r in shards.read(out / shard.name).rejected)
    with places.writable(out):
        files.write_atomic(out / MANIFEST, told())
        files.write_atomic(out / QUARANTINE, (json.dumps(r._asdict()) + "\n" for r in rejected))
        shards.finish(out, origin, made, outcome.notes, made_from)
        kept = {MANIFEST, QUARANTINE, ORIGIN, *shards.names(out)}
        shard_claims.forget(out)
        for path in list(out.iterdir()):
            if path.name not in kept and shards.is_ours(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()
    return outcome


def _checksums(out: Path) -> dict[str, str | None]:
    """The checksums, by shard, of the set that OUT was before; empty if it was none."""
    with suppress(InputError):
        return {entry.file: entry.sha256 for entry in shards.read_index_file(out).shards}
    return {}


def _crop(source: tuple[int, int], target: int) -> dict[str, Any] | None:
    how = images.cut(source, target)
    return how and {"size": how.size, "cover": how.cover, "corner": how.corner}
