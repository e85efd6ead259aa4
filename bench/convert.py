"""A model of the released size converted, Hugging Face -> native -> MindSpeed -> Hugging Face: time beside cp, memory, bit for bit.

Random bfloat16 weights (15.8 GB) are written to a temporary folder; each stage's source is removed once it is compared. It needs
up to 48 GB of disk.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import starmap
from pathlib import Path

import torch

from bench.harness import GB, Ratios, Row, ratio, row
from lumina_fn import checkpoint, model, sources
from lumina_fn.config import LUMINA_7B
from lumina_fn.costs import cost
from lumina_fn.formats import hf_config, names, tensor_files
from lumina_fn.formats.tensor_files import Stored


def write_random(folder: Path, layers: int) -> None:
    """A Hugging Face folder of random bits. Every tensor is another window of one random file."""
    cfg = replace(LUMINA_7B, layers=layers)
    shapes = {
        names.to_source(p, names.TRANSFORMER): t.shape for p, t in names.flatten(model.init(cfg, device="meta")).items()
    }
    step = 4096
    size = 2 * max(shape.numel() for shape in shapes.values()) + step * len(shapes)
    noise = folder / "noise"
    generator = torch.Generator().manual_seed(0)
    with noise.open("wb") as file:
        for begin in range(0, size, 1 << 26):
            file.write(
                torch.randint(256, (min(1 << 26, size - begin),), dtype=torch.uint8, generator=generator).numpy()
            )
    tensors = {
        name: Stored(noise, step * i, 2 * shape.numel(), tuple(shape), torch.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    tensor_files.write_shards(folder, tensors)
    checkpoint.write_json(folder / "config.json", hf_config.write(cfg, None))
    noise.unlink()


def watched(*command: str) -> tuple[float, float]:
    """Seconds and peak GB of anonymous memory of a command; a failing one is an error."""
    begin, peak = time.monotonic(), 0
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.01)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return time.monotonic() - begin, peak * 1024 / GB


def same(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    a, b = sources.open_source(a), sources.open_source(b)
    equal = lambda p, q: (
        p.dtype == q.dtype and all(x == y for x, y in zip(tensor_files.chunks(p), tensor_files.chunks(q), strict=True))
    )
    return list(a.tensors) == list(b.tensors) and all(
        starmap(equal, zip(a.tensors.values(), b.tensors.values(), strict=True))
    )


def rows(quick: bool) -> Iterator[Row]:
    layers = 2 if quick else LUMINA_7B.layers
    took, copied, peaks, equal = [], [], [], True
    with tempfile.TemporaryDirectory(prefix="bench_convert-") as root:
        source = Path(root, "0-hf")
        source.mkdir()
        write_random(source, layers)
        for i, to in enumerate(("native", "mindspeed", "hf"), 1):
            copied.append(watched("cp", "-r", str(source), f"{root}/copy")[0])
            shutil.rmtree(f"{root}/copy")
            target = Path(root, f"{i}-{to}")
            seconds, peak = watched(sys.executable, "-m", "lumina_fn.convert", str(source), str(target), "--to", to)
            took.append(seconds)
            peaks.append(peak)
            equal &= same(source, target)
            shutil.rmtree(source)
            source = target
    speed = ratio(copied, took)
    yield row(
        "convert_7b", "time of a conversion that forces its files onto the disk, cp / ours; cp does not force them",
        # A small folder stays in the page cache, where cp takes no time: nothing is asked of the quick ratio.
        {"anonymous_peak_gb": "<= 1.5", "bitwise_equal": ">= 1"} | ({} if quick else {"wall_ratio": ">= 0.6"}),
        Ratios(wall=speed.median),
        measured={
            "wall_spread": speed[1:], "parameters_b": cost.parameters(replace(LUMINA_7B, layers=layers)) / 1e9,
            "seconds_to": dict(zip(("native", "mindspeed", "hf"), took, strict=True)), "cp_s": copied,
            "anonymous_peak_gb": max(peaks), "bitwise_equal": int(equal),
        },
    )  # fmt: skip
