"""Pretrain the embedded default's language model, 3 M parameters, on the old shapes. It never sees the new one.

    OMP_NUM_THREADS=2 python -m experiments.demo.pretrain --vq experiments/demo/assets/vq --out runs/pretrain

Resumes from OUT/state.safetensors and ends with the model folder OUT/model.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from experiments.demo import progress, shapes, splits, tokenizer
from experiments.demo.grader import grade
from experiments.demo.train_vq import to_unit
from lumina_fn import checkpoint, data, model, optim, prompt, sample, train, vq
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.process import entry
from lumina_fn.process.flags import parse
from lumina_fn.vocab import Ids


@dataclass(frozen=True)
class Settings:
    vq: Annotated[Path, "the picture tokenizer's folder"] = Path("experiments/demo/assets/vq")
    out: Annotated[Path, "folder of the run"] = Path("runs/pretrain")
    steps: int = 1600
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.05
    caption_drop: float = 0.1
    no_size: Annotated[float, "share of prompts that leave out the picture's size"] = 0.1
    seed: int = 0
    log_every: int = 50
    save_every: int = 250


def config(ids: Ids) -> ModelConfig:
    vocab = ids.code0 + ids.codes
    return ModelConfig(vocab=vocab, width=192, layers=6, heads=6, kv_heads=6, hidden=512, max_positions=1024, ids=ids)


@torch.no_grad()
def codes_of(specs: Sequence[shapes.Spec], params: vq.Params, cfg: VQConfig) -> Tensor:
    pictures = to_unit([shapes.draw(s) for s in specs])
    return torch.cat([vq.encode(params, part, cfg) for part in pictures.split(32)])


def batches(items: list[list[data.Item]], ids: Ids, s: Settings) -> Iterator[train.Batch]:
    """Batch n of the run at call n: every picture once an epoch; `items` holds each with and without its size."""
    width = max(len(tokens) for pair in items for tokens, _ in pair)
    per_epoch = len(items) // s.batch
    for n in range(s.steps):
        order = np.random.default_rng((s.seed, 0, n // per_epoch)).permutation(len(items))
        rng = np.random.default_rng((s.seed, 1, n))
        rows = []
        for i in order[n % per_epoch * s.batch :][: s.batch]:
            item = items[i][int(rng.random() < s.no_size)]
            rows.append(data.drop_caption(*item, ids.end) if rng.random() < s.caption_drop else item)
        yield data.batch(rows, max_positions=width, multiple=width)


def accuracy(
    params: model.Params, cfg: ModelConfig, tokens: prompt.Tokenizer, vq_params, vq_cfg, specs, **settings
) -> float:
    """Share of prompts whose picture shows exactly the spec."""
    prompts = [prompt.prompt_ids(tokens, shapes.caption(s), shapes.SIZE, shapes.SIZE) for s in specs]
    how = sample.Sampling(shapes.SIZE, shapes.SIZE, **settings)
    codes = sample.generate_many(params, prompts, cfg, how, pace=sample.Pace(len(specs)))
    with torch.no_grad():
        pictures = vq.pixels(vq.decode(vq_params, codes[:, 0], vq_cfg)).numpy()
    return sum(grade(p, s) for p, s in zip(pictures, specs, strict=True)) / len(specs)


def main(argv: Sequence[str] | None = None) -> None:
    s = parse(Settings, __doc__, argv)
    s.out.mkdir(parents=True, exist_ok=True)
    vq_params, vq_cfg = checkpoint.load_vq(s.vq)
    text, ids = tokenizer.build(vq_cfg.codes)
    cfg = config(ids)
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder), text)
        (Path(folder) / "config.json").write_text(json.dumps({"ids": asdict(ids)}))
        tokens = prompt.load_tokenizer(folder)
        specs = splits.pretraining()
        codes = codes_of(specs, vq_params, vq_cfg)
        both = [[data.training_item(tokens, shapes.caption(spec), c, with_size=w) for w in (True, False)] for spec, c in zip(specs, codes, strict=True)]  # fmt: skip
        opt = train.AdamW(optim.cosine(s.lr, s.warmup, s.steps), 0.9, 0.95, 1e-8, s.decay, 1.0)
        step = train.make_train_step(cfg, opt, compile="blocks", donate=True)
        fresh = train.init_state(model.init(cfg, seed=s.seed), opt)
        state, seconds = progress.restore(s.out / "state.safetensors", fresh)
        begun, done = time.time() - seconds, int(state.step)
        for n, batch in enumerate(batches(both, ids, s)):
            if n < done:
                continue
            state, metrics = step(state, batch)
            if n % s.log_every == 0:
                print(
                    f"{n} {time.time() - begun:.0f} s loss {metrics['loss']:.4f} grad_norm {metrics['grad_norm']:.3f}",
                    flush=True,
                )
            if (n + 1) % s.save_every == 0 or n + 1 == s.steps:
                progress.store(s.out / "state.safetensors", state, time.time() - begun)
                settings = {"guidance": 1.0, "temperature": 0.5, "min_p": 0.05}
                share = accuracy(state.params, cfg, tokens, vq_params, vq_cfg, splits.settings(), **settings)
                print(f"{n + 1} {time.time() - begun:.0f} s exact on the settings' prompts {share:.3f}", flush=True)
        narrow = pytree.tree_map(lambda p: p.to(torch.bfloat16), state.params)
        checkpoint.renew_model(s.out / "model", narrow, cfg, source=folder)
    print(json.dumps({"settings": {k: str(v) for k, v in asdict(s).items()}, "seconds": round(time.time() - begun)}))


if __name__ == "__main__":
    entry.run(main)
