"""Whether the loader keeps up, and what packing and clustering are worth: tokens per second, memory, bytes per token.

    python -m bench.loader

Fails where one core loads fewer than 2 million tokens a second of 768 px pictures, where opening a set of a million samples
takes more than a second or 200 MB, where a token takes more than 2.2 bytes, or where packing or clustering is no gain.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments.launching import processes
from lumina_fn import data, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.features import batches, shards
from lumina_fn.features.batches import Batching
from lumina_fn.features.mixing import Mixture
from lumina_fn.process import entry
from lumina_fn.process.flags import parse
from lumina_fn.vocab import Ids

IDS = Ids(start=1, end=2, newline=3, sep=4, size0=5, code0=1024, codes=16_384)
SMALL = ModelConfig(vocab=2048, width=128, layers=2, heads=2, kv_heads=2, hidden=352)
MB = 1e6


@dataclass(frozen=True)
class Settings:
    pictures: Annotated[int, "of 768 px, that are loaded"] = 512
    samples: Annotated[int, "of the set that is opened"] = 1_000_000
    rounds: Annotated[int, "steps of training with each way to make batches"] = 12
    tokens_per_second: Annotated[float, "loaded by one core, at the least"] = 2e6
    seconds: Annotated[float, "of opening, at the most"] = 1.0
    megabytes: Annotated[float, "that opening takes, at the most"] = 200
    bytes_per_token: Annotated[float, "of a set of 768 px, at the most"] = 2.2


def pictures(shapes: Sequence[tuple[int, int]], codes: int, text: int) -> Iterator[shards.Feature]:
    """Features of random codes with `text` ids before each picture."""
    rng = np.random.default_rng(0)
    for row, shape in enumerate(shapes):
        yield shards.Feature(row, rng.integers(100, 1000, text).tolist(), rng.integers(0, codes, shape, np.uint16))


def write(folder: Path, features: Iterator[shards.Feature]) -> Path:
    folder.mkdir()
    shards.write_features(folder, features, shards.Origin(768, 0, IDS, "tokenizer", "vq"))
    return folder


def of_loading(rank: int, size: int, folder: str) -> tuple[float, float]:
    """Tokens per second as batches [1 1 T], and as the lists of `FeatureSet[i]`."""
    features = data.FeatureSet(folder)
    settings = {"batch": 1, "micro_batch": 1, "max_positions": 10_240, "seed": 0, "caption_drop": 0.1}
    stream = batches.training_batches(
        Mixture((features,)), range(2 * len(features)), Batching(last="partial", **settings)
    )
    sum(share.tokens for share in itertools.islice(stream, len(features) // 2))  # reads the files once
    begin = time.perf_counter()
    fast = sum(share.tokens for share in stream) / (time.perf_counter() - begin)
    begin = time.perf_counter()
    slow = sum(data.batch([features[i]], max_positions=10_240).tokens.numel() for i in range(len(features) // 4))
    return fast, slow / (time.perf_counter() - begin)


def of_opening(rank: int, size: int, folder: str) -> tuple[float, int, float]:
    """Seconds and bytes of opening a set, with everybody's length, and seconds to its first batch, the epoch's order included."""
    processes.reset_peak()
    before, begin = processes.resident(), time.perf_counter()
    mixture = Mixture((data.FeatureSet(folder),))
    _ = mixture.lengths
    seconds, peak = time.perf_counter() - begin, processes.peak() - before
    settings = {
        "batch": 8,
        "micro_batch": 8,
        "max_positions": 10_240,
        "seed": 0,
        "caption_drop": 0.1,
        "last": "partial",
    }
    begin = time.perf_counter()
    next(batches.training_batches(mixture, range(10**6, 10**6 + 1), Batching(**settings)))
    return seconds, peak, time.perf_counter() - begin


def of_training(rank: int, size: int, folder: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each way to make batches: the part that is padding, and tokens per CPU second of steps, padding not counted."""
    mixture, opt = Mixture((data.FeatureSet(folder),)), train.AdamW()
    room = batches.bucket(int(mixture.lengths[0].max()))
    ways = {
        "plain": {},
        "clustered": {"order": "clustered"},
        "packed": {"pack": room, "micro_batch": 1},
    }  # rows of several items
    settings = {"batch": 16, "micro_batch": 4, "max_positions": room, "seed": 0, "caption_drop": 0.1, "last": "partial"}
    step = train.make_train_step(SMALL, opt, donate=True)
    state = train.init_state(model.init(SMALL), opt)
    streams = {
        name: batches.training_batches(mixture, range(rounds + 1), Batching(**settings | way))
        for name, way in ways.items()
    }
    seen = dict.fromkeys(ways, (0.0, 0, 0))
    for n in range(rounds + 1):
        for name, stream in streams.items():  # in turn: what else runs on this machine meets all of them
            begin = time.process_time()
            share = next(stream)
            state, metrics = step(state, share.batch)
            metrics["loss"].item()
            if n:  # the first warms up
                more = time.process_time() - begin, share.tokens, share.batch.tokens.numel()
                seen[name] = tuple(a + b for a, b in zip(seen[name], more, strict=True))
    return {name: (1 - real / whole, real / seconds) for name, (seconds, real, whole) in seen.items()}


def main(argv: Sequence[str] | None) -> int:
    run, good = parse(Settings, __doc__, argv), True

    def report(name: str, text: str, fine: bool) -> None:
        nonlocal good
        good &= fine
        print(f"{name:28}  {text}{'' if fine else '  FAILED'}", flush=True)

    with tempfile.TemporaryDirectory() as root:
        folder = write(Path(root, "large"), pictures([(96, 96)] * run.pictures, IDS.codes, 100))
        tokens, taken = int(sum(data.FeatureSet(folder).lengths())), sum(p.stat().st_size for p in folder.iterdir())
        report("a set of 768 px", f"{taken / tokens:.2f} bytes per token", taken / tokens <= run.bytes_per_token)
        fast, slow = processes.run(1, of_loading, str(folder))[0]
        text = f"{fast / 1e6:.1f} M tokens/s on one core (as lists: {slow / 1e6:.1f} M)"
        report("loading 768 px", text, fast >= run.tokens_per_second)

        rng = np.random.default_rng(1)
        mixed = write(Path(root, "mixed"), pictures((rng.integers(1, 9, (16 * 64, 2)) * 4).tolist(), 1024, 20))
        found = processes.run(1, of_training, str(mixed), run.rounds)[0]
        for name, (padding, speed) in found.items():
            gain = speed / found["plain"][1]
            text = f"{padding:.0%} padding, {speed:.0f} tokens per CPU second of a small model: {gain:.2f}x"
            report(f"mixed lengths, {name}", text, name == "plain" or gain > 1)

        many = write(Path(root, "many"), pictures([(4, 4)] * run.samples, 1024, 4))
        seconds, peak, first = processes.run(1, of_opening, str(many))[0]
        text = f"{seconds:.2f} s, {peak / MB:.0f} MB; the first batch after {first:.2f} s more"
        report(f"opening {run.samples:,} samples", text, seconds <= run.seconds and peak <= run.megabytes * MB)
    print("ok" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    entry.run(main)
