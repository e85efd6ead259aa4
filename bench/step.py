"""What remat and more ranks are worth in memory, and what compiling costs: real steps and loading, in fresh processes.

    python -m bench.step

Fails where the compiled step with remat peaks above 0.6 of the one without, above the state; where more ranks do not lower a
rank's peak; where loading takes more than a rank's part and one unit; or where the first step, with nothing compiled before,
takes more than 90 seconds for 32 layers or 1.3 times that of 4.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch._inductor import config as inductor_config

from experiments.launching import processes
from lumina_fn import checkpoint, model, sharding, train
from lumina_fn.config import ModelConfig
from lumina_fn.process import entry
from lumina_fn.process.flags import parse

DEEP = ModelConfig(vocab=8192, width=512, layers=12, heads=8, kv_heads=8, hidden=1408)
MB = 1e6


@dataclass(frozen=True)
class Settings:
    tokens: Annotated[int, "a batch's, where remat is measured"] = 1024
    ratio: Annotated[float, "of the peaks above the state, with remat and without, at the most"] = 0.6
    seconds: Annotated[float, "of the first step of 32 layers, at the most"] = 90
    growth: Annotated[float, "of the first step from 4 layers to 32, at the most"] = 1.3


def of_steps(rank: int, size: int, cfg: ModelConfig, tokens: int, remat: bool, sharded: bool) -> tuple[int, int]:
    """Bytes above the state at the peak of a compiled step after the first, and in all."""
    mesh = sharding.Mesh(dist.group.WORLD, rank, size) if sharded else None
    opt = train.AdamW()
    step = train.make_train_step(cfg, opt, mesh, compile="blocks", remat=remat, donate=True)
    state = train.init_state(model.init(cfg), opt, mesh)
    batch = train.Batch(*torch.randint(cfg.vocab, (2, 1, tokens), generator=torch.Generator().manual_seed(rank)))
    state, _ = step(state, batch)  # compiles
    processes.reset_peak()
    before = processes.resident()
    for _ in range(2):
        state, _ = step(state, batch)
    return processes.peak() - before, processes.peak()


def of_loading(rank: int, size: int, folder: Path) -> tuple[int, int]:
    """Bytes that loading this rank's part takes at its peak, and those of the part and the largest unit."""
    processes.reset_peak()
    before = processes.resident()
    params, cfg = checkpoint.load_parts(folder, sharding.Mesh(dist.group.WORLD, rank, size))
    whole = model.init(cfg, device="meta")
    count = lambda tree: sum(4 * leaf.numel() for leaf in pytree.tree_leaves(tree))
    return processes.peak() - before, count(params) + max(map(count, (whole.embed, *whole.blocks, whole.head)))


def of_first_step(rank: int, size: int, layers: int) -> float:
    """Seconds of a first step, compiling included, with an empty cache."""
    cfg, opt = replace(DEEP, width=256, hidden=704, heads=4, kv_heads=4, layers=layers), train.AdamW()
    torch.set_num_threads(2)
    state = train.init_state(model.init(cfg), opt)
    batch = train.Batch(*torch.randint(cfg.vocab, (2, 1, 128), generator=torch.Generator().manual_seed(0)))
    with tempfile.TemporaryDirectory() as cache, inductor_config.patch(force_disable_caches=True):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        begin = time.perf_counter()
        train.make_train_step(cfg, opt, compile="blocks", donate=True)(state, batch)
        return time.perf_counter() - begin


def main(argv: Sequence[str] | None) -> int:
    run, good = parse(Settings, __doc__, argv), True

    def report(name: str, text: str, fine: bool) -> None:
        nonlocal good
        good &= fine
        print(f"{name:28}  {text}{'' if fine else '  FAILED'}", flush=True)

    kept, recomputed = (processes.run(1, of_steps, DEEP, run.tokens, remat, False)[0][0] for remat in (False, True))
    ratio = recomputed / kept
    text = f"{kept / MB:.0f} MB above the state, with remat {recomputed / MB:.0f} MB: {ratio:.2f}"
    report("remat, compiled step", text, ratio <= run.ratio)

    heavy = replace(DEEP, vocab=32_768)  # its state is what fills memory, with a short batch
    peaks = {n: max(top for _, top in processes.run(n, of_steps, heavy, 64, True, True)) for n in (1, 2, 4)}
    text = ", ".join(f"{n} ranks {peak / MB:.0f} MB" for n, peak in peaks.items())
    report("a rank's peak, fsdp", text, peaks[1] > peaks[2] > peaks[4])

    with tempfile.TemporaryDirectory() as root:
        checkpoint.save_model(Path(root, "lm"), model.init(heavy), heavy)
        for n in (2, 4):
            took, bound = max(processes.run(n, of_loading, Path(root, "lm")), key=lambda pair: pair[0] - pair[1])
            text = f"{took / MB:.0f} MB of at most {bound / MB:.0f} (its part and one unit)"
            report(f"loading, {n} ranks", text, took <= bound)
    few, many = (processes.run(1, of_first_step, layers)[0] for layers in (4, 32))
    text = f"{few:.1f} s for 4 layers, {many:.1f} s for 32: {many / few:.2f}"
    report("first step, width 256", text, many <= run.seconds and many <= run.growth * few)
    print("ok" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    entry.run(main)
