"""Pictures per second of a whole pretokenization, beside those of encoding alone, on tensors that are ready.

    python -m bench.pretokenize

Pictures are drawn (JPEG, of a few sizes), then the two take turns on the same pictures, with the same batches: the whole run
reads files, hashes, cuts, stacks, encodes and writes shards. Fails where it is slower than `share` of encoding alone.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image

from experiments.demo import tasks
from experiments.pretokenizing import shard_claims
from experiments.pretokenizing.encoding import Work, encode_shards
from experiments.pretokenizing.rows import Recipe, prepare
from experiments.pretokenizing.run import encoder
from experiments.pretokenizing.shard_claims import Shard
from lumina_fn import images, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.features import shards
from lumina_fn.process import entry, flags

MODEL = tasks.LM
CFG = VQConfig(channels=32)


@dataclass(frozen=True)
class Settings:
    pictures: Annotated[int, "that are encoded in a round"] = 64
    size: Annotated[int, "pixels of the target's side"] = 256
    batch: Annotated[int, "pictures encoded at once"] = 8
    rounds: Annotated[int, "that are counted, after one that is not"] = 3
    share: Annotated[float, "of the pictures per second of encoding alone, at the least"] = 0.85


def main(argv: list[str] | None = None) -> int:
    run = flags.parse(Settings, __doc__, argv)
    tokenizer = prompt.load_tokenizer(MODEL)
    encode = encoder(vq.init(CFG, seed=0), CFG, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = _draw(folder, run.pictures)
        ready = lambda i: prepare(i, rows[i], Recipe([folder], tokenizer, run.size, 0))

        def whole(out: Path) -> float:
            (out / shard_claims.CLAIMS).mkdir(parents=True)
            write = lambda shard, features, rejected: shards.write(out / shard.name, features, rejected, tokenizer.ids)
            planned = [Shard(0, "features.safetensors", range(len(rows)))]
            claimed = shard_claims.claimed(out, planned, 0, 1)
            tally = encode_shards(
                claimed, Work(ready, encode, write), batch=run.batch, workers=2, progress=lambda n: None
            )  # fmt: skip
            return tally.wall

        tensors = torch.stack([images.to_tensor(ready(i).image) for i in range(len(rows))]).split(run.batch)

        def alone() -> float:
            begin = time.perf_counter()
            for part in tensors:
                encode(part)
            return time.perf_counter() - begin

        ratios = []
        for i in range(run.rounds + 1):
            took = (alone(), whole(folder / f"out{i}")) if i % 2 else (whole(folder / f"out{i}"), alone())[::-1]
            ratio = took[0] / took[1]
            print(f"alone {len(rows) / took[0]:.2f} pictures/s, whole run {len(rows) / took[1]:.2f}: {ratio:.3f}")
            ratios += [ratio] if i else []
    median = statistics.median(ratios)
    print(json.dumps({"pictures": len(rows), "size": run.size, "ratio": round(median, 3), "share": run.share}))
    return int(median < run.share)


def _draw(folder: Path, count: int) -> list[dict[str, str]]:
    """Smooth pictures with some noise, a little larger than they are needed; all are cut to one size."""
    numbers = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
            (640, 640), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + numbers.normal(0, 8, (640, 640, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return [{"file": f"{i}.jpg", "prompt": f"picture {i}"} for i in range(count)]


if __name__ == "__main__":
    entry.run(main)
