"""Convert a model of the released size, Hugging Face -> native -> MindSpeed -> Hugging Face: time, anonymous memory, bit for bit.

    python -m experiments.bench_convert

Writes random bfloat16 weights (15.8 GB) to a temporary folder, converts them three times, and removes everything. It needs 34 GB of
disk and fails where a conversion's peak of anonymous memory exceeds the limit, or a bit differs.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Annotated

import torch

from experiments.settings import parse
from lumina_fn import checkpoint, errors, hf_config, model, names, sources, tensor_files
from lumina_fn.config import LUMINA_7B
from lumina_fn.errors import InputError
from lumina_fn.tensor_files import Stored


@dataclass(frozen=True)
class Settings:
    layers: Annotated[int, "layers of the model; 32 is the released one"] = 32
    limit: Annotated[float, "GB of anonymous memory that a conversion may take"] = 1.5
    folder: Annotated[Path, "where the temporary folder goes"] = Path(tempfile.gettempdir())


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
    """Seconds and peak GB of anonymous memory of a Python command; a failing one is an error."""
    begin, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, *command]) as child:
        while child.poll() is None:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.01)
    if child.returncode:
        raise InputError(f"{' '.join(command)} failed")
    return time.monotonic() - begin, peak * 1024 / 1e9


def same(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    a, b = sources.open_source(a), sources.open_source(b)
    equal = lambda p, q: (
        p.dtype == q.dtype and all(x == y for x, y in zip(tensor_files.chunks(p), tensor_files.chunks(q), strict=True))
    )
    return list(a.tensors) == list(b.tensors) and all(
        starmap(equal, zip(a.tensors.values(), b.tensors.values(), strict=True))
    )


def main(argv: Sequence[str] | None) -> int:
    settings = parse(Settings, __doc__, argv)
    good = True
    with tempfile.TemporaryDirectory(prefix="bench_convert-", dir=settings.folder) as root:
        source = Path(root, "0-hf")
        source.mkdir()
        write_random(source, settings.layers)
        for i, to in enumerate(("native", "mindspeed", "hf"), 1):
            target = Path(root, f"{i}-{to}")
            seconds, peak = watched("-m", "lumina_fn.convert", str(source), str(target), "--to", to)
            equal = same(source, target)
            good &= equal and peak <= settings.limit
            print(
                f"-> {to:9}  {seconds:6.1f} s  {peak:5.3f} GB anonymous  {'bitwise equal' if equal else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(source)
            source = target
    print("ok" if good else f"FAILED: a bit differs, or more than {settings.limit} GB")
    return 0 if good else 1


if __name__ == "__main__":
    errors.run(main)
