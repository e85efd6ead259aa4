"""A dataset turned into features by any number of processes, killed again and again, is always the same set.

    python -u -m tests.exactly_once 10000 20 [list|tar|parquet]

draws pictures (2 % of them bad, in 15 ways; 3 % with a name that others have in other folders; or in archives, bad in 7 ways), makes the
set undisturbed with 1, 2 and 4 processes, then kills runs at random moments until each is done, and compares every byte with the first.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

from lumina_fn import checkpoint, data, vq
from lumina_fn.config import VQConfig
from tests.support import archives
from tests.support.paths import ROOT

MODEL = ROOT / "tests/goldens/tokens/toy_tokenizer_bpe"
VQ = VQConfig(channels=8, multipliers=(1, 1, 1, 1), res_blocks=1, codes=64, groups=4)
SIZE = 32


class Bad(NamedTuple):
    row: int
    reason: str  # a part of it


def draw(folder: Path, count: int, seed: int = 0) -> tuple[Path, list[Bad]]:
    """A dataset of `count` rows with its pictures; the rows that are bad, and why."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows, bad = [], []
    same = set(rng.sample(range(count), max(2, 3 * count // 100)))
    broken = dict(zip(rng.sample(sorted(set(range(count)) - same), max(15, count // 50)), _ways(), strict=False))
    for i in range(count):
        name = f"{i // 100:03d}/{'same' if i in same else i}-{rng.randrange(3)}.{rng.choice(['png', 'jpg', 'webp'])}"
        if i in same:
            name = f"{i:05d}/same.png"
        path, row = folder / name, {"file": name, "prompt": f"picture {i}"}
        path.parent.mkdir(exist_ok=True)
        size = rng.choice([(32, 32), (40, 32), (64, 64), (32, 70)])
        Image.fromarray(numbers.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
        if i in broken:
            way, reason = broken[i]
            row = way(path, row)
            bad.append(Bad(i, reason))
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json", bad


# What can be wrong with a picture and its caption in an archive: (picture, caption) -> both, and the reason.
BROKEN = [
    (lambda p, c: (p[:200], c), "cannot be read"),
    (lambda p, c: (b"", c), "zero size"),
    (lambda p, c: (b"no picture", c), "not a picture"),
    (lambda p, c: (b"P4 30000 30000\n", c), "bomb"),
    (lambda p, c: (p, " "), "no prompt"),
]
IN_TAR = [
    (lambda p, c: (None, c), "0 pictures"),
    (lambda p, c: (p, None), "no caption"),
    (lambda p, c: ("/etc/passwd", None), "a link (to /etc/passwd)"),
]
IN_PARQUET = [(lambda p, c: (None, c), "no such file"), (lambda p, c: (p, None), "no prompt")]


def draw_archive(folder: Path, count: int, form: str, seed: int = 0) -> tuple[Path, list[Bad]]:
    """The same in three tars or Parquet files: the pattern that names them, and the rows that are bad."""
    rng = random.Random(seed)
    ways = BROKEN + (IN_TAR if form == "tar" else IN_PARQUET)
    broken = dict(zip(sorted(rng.sample(range(count), max(9, count // 50))), itertools.cycle(ways), strict=False))
    for number, part in enumerate(np.array_split(np.arange(count), 3)):
        names = [f"{i:05d}.png" for i in part]
        pairs = [
            (archives.drawn(i, rng.choice([(32, 32), (40, 32), (64, 64), (32, 70)])), f"picture {i}") for i in part
        ]
        pairs = [broken[i][0](*pair) if i in broken else pair for i, pair in zip(part, pairs, strict=True)]
        path = folder / f"{number:03d}.{form}"
        if form == "tar":
            of_sample = lambda name, pair: ((name, pair[0]), (name.replace("png", "txt"), pair[1] and pair[1].encode()))
            members = [
                m for name, pair in zip(names, pairs, strict=True) for m in of_sample(name, pair) if m[1] is not None
            ]
            archives.tar(path, members)
        else:
            image = [{"bytes": pair[0], "path": name} for name, pair in zip(names, pairs, strict=True)]
            archives.parquet(path, {"image": image, "text": [caption for _, caption in pairs]}, 7)
    return folder / f"{{000..002}}.{form}", [Bad(i, reason) for i, (_, reason) in broken.items()]


def _ways() -> Iterator[tuple]:
    """What can be wrong with a row: (path, row) -> the row, and its reason."""

    def written(content: bytes):
        def way(path, row):
            path.write_bytes(content)
            return row

        return way

    def cut(path, row):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        return row

    def gone(path, row):
        path.unlink()
        return row

    def folder(path, row):
        path.unlink()
        path.mkdir()
        return row

    def pipe(path, row):
        path.unlink()
        os.mkfifo(path)
        return row

    def link(path, row):
        path.unlink()
        path.symlink_to("/etc/passwd")
        return row

    ways = [
        (gone, "no such file"), (cut, "cannot be read"), (written(b""), "zero size"), (written(b"no picture"), "not a picture"),
        (written(b"P4 30000 30000\n"), "bomb"), (folder, "not a regular file"), (pipe, "not a regular file"), (link, "outside"),
        (lambda p, r: {**r, "file": "../" * 9 + "etc/passwd"}, "outside"), (lambda p, r: {**r, "prompt": " "}, "no prompt"),
        (lambda p, r: {"file": r["file"]}, "no prompt"), (lambda p, r: {"prompt": "x"}, "no file"), (lambda p, r: None, "found NoneType"),
        (lambda p, r: {**r, "prompt": "a <eoss> b"}, "<eoss>"), (lambda p, r: {**r, "prompt": "\ud83d"}, "Unicode"),
    ]  # fmt: skip
    while True:
        yield from ways


def command(rows: Path, vq: Path, out: Path, processes: int, *flags: str) -> list[str]:
    module = [
        "-m",
        "experiments.pretokenize",
        rows,
        out,
        "--model",
        MODEL,
        "--vq",
        vq,
        "--size",
        SIZE,
        "--device",
        "cpu",
        *flags,
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    return [sys.executable, *map(str, [*launch, *module])]


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def check(out: Path, count: int, bad: list[Bad]) -> None:
    """Every row is there once: as an item, or quarantined for its reason."""
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(count))
    listed = {line["row"]: line["reason"] for line in lines if line["status"] == "quarantined"}
    assert sorted(listed) == [b.row for b in bad]
    for row, reason in bad:
        assert reason in listed[row], (row, reason, listed[row])
    items = data.FeatureSet(out)
    done = [line["row"] for line in lines if line["status"] == "done"]
    assert [items.feature(i).row for i in range(len(items))] == done


def killed(argv: list[str], after: float) -> bool:
    """Start the command and kill it and all that it started; False where it was done before."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try:
            process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            psutil.wait_procs(tree, timeout=30)
            return True
        said.seek(0)
        assert process.returncode == 0, said.read().decode()
        return False


def main(
    count: int, kills: int, folder: Path, form: str = "list", processes: tuple[int, ...] = (1, 2, 4), shard: int = 256
) -> None:
    rng = random.Random(0)
    rows, bad = draw(folder / "set", count) if form == "list" else draw_archive(folder / "set", count, form)
    checkpoint.save_vq(folder / "vq", vq.init(VQ, seed=0), VQ)
    run = lambda out, n: command(rows, folder / "vq", out, n, "--shard", str(shard))
    expected, took = None, 0.0
    for n in processes:
        begin = time.monotonic()
        assert not killed(run(folder / f"of_{n}", n), after=3600)
        took = time.monotonic() - begin
        check(folder / f"of_{n}", count, bad)
        expected = expected or contents(folder / f"of_{n}")
        assert contents(folder / f"of_{n}") == expected, f"{n} processes made another set"
        print(f"{n} processes: {count} rows, {len(bad)} quarantined, {took:.0f} s, the same bytes")
    done = 0
    while done < kills:
        out = folder / "killed"
        while killed(run(out, rng.choice(processes)), after=rng.uniform(3, 4 + took)):
            done += 1
            if done == kills:
                assert not killed(run(out, rng.choice(processes)), after=3600)
                break
        assert contents(out) == expected, f"after {done} kills it is another set"
        check(out, count, bad)
        print(f"{done} kills: the same bytes")
        shutil.rmtree(out)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(made), *sys.argv[3:])
