"""Turn a folder of pictures and captions into features to train on.

    python -m experiments.pretokenize DATA.json OUT --model DIR --vq DIR --size 768

DATA.json lists {"file": "images/x.jpg", "prompt": "..."} rows (JSON or JSONL). Rows that cannot be used are listed with
the reason in OUT/quarantine.jsonl.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from jaxtyping import Float, Int
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from experiments import settings
from experiments.settings import POSITIONAL, EnvCheck
from lumina_fn import checkpoint, data, dataset, errors, files, images, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.errors import InputError
from lumina_fn.prompt import Tokenizer
from lumina_fn.vocab import PIXELS_PER_CODE

SIZE_TEXT_PROBABILITY = 0.9  # of a prompt that says the picture's size
WINDOW = 16  # batches read ahead, to find pictures of equal size


@dataclass(frozen=True)
class Settings:
    data: Annotated[Path, 'JSON list or JSONL of {"file", "prompt"}', POSITIONAL]
    out: Annotated[Path, "folder to write, must not exist", POSITIONAL]
    model: Annotated[Path, "the model's folder; only its tokenizer is read"]
    vq: Annotated[Path, "MoVQGAN: a native folder or a .ckpt"]
    size: Annotated[int, "pixels, a multiple of 32: pictures become about size x size, whatever their shape"] = 768
    image_root: Annotated[Path | None, "second folder that pictures may lie in (the first is DATA's own)"] = None
    seed: Annotated[int, "of the choice which prompts say the picture's size"] = 0
    batch: Annotated[int, "pictures encoded at once"] = 8
    device: Annotated[str, "cpu, npu, cuda, or auto: the first of npu, cuda and cpu that is there"] = "auto"
    env_check: EnvCheck = "error"
    overwrite: Annotated[bool, "replace an existing OUT"] = False


class Prepared(NamedTuple):
    row: int
    prompt: str
    with_size: bool
    image: Image.Image


class Rejected(NamedTuple):
    row: int
    file: str | None
    reason: str


def main(argv: Sequence[str] | None = None) -> None:
    run = settings.parse(Settings, __doc__, argv)
    tokenizer = prompt.load_tokenizer(run.model)
    _check(run, tokenizer)
    device = settings.checked_device(run)
    rows = dataset.read_rows(run.data)
    files.place(run.out, [run.data, run.model, run.vq, *([run.image_root] if run.image_root else [])])
    with files.new_folder(run.out, run.overwrite) as folder:
        vq_params, vq_cfg = checkpoint.load_vq(run.vq)
        if vq_cfg.downsampling != PIXELS_PER_CODE or vq_cfg.codes > tokenizer.ids.codes:
            raise InputError(
                f"{run.vq}: {vq_cfg.codes} codes of {vq_cfg.downsampling} pixels; "
                f"the model in {run.model} wants at most {tokenizer.ids.codes} of {PIXELS_PER_CODE} pixels"
            )
        origin = data.Origin(run.size, run.seed, tokenizer.ids, tokenizer.fingerprint, data.fingerprint(vq_params))
        encode = encoder(vq_params, vq_cfg, device)
        roots = [run.data.parent, *([run.image_root] if run.image_root else [])]
        results = features(rows, lambda i, row: prepare(i, row, roots, tokenizer, run), encode, tokenizer, run.batch)
        rejected: list[Rejected] = []
        done = data.write_features(folder, _kept(results, len(rows), rejected), origin)
        lines = [json.dumps(r._asdict()) + "\n" for r in rejected]
        (folder / "quarantine.jsonl").write_text("".join(lines))
    if not done:
        first = rejected[0]
        raise InputError(
            f"{run.data}: none of {len(rows)} rows could be used; row {first.row} ({first.file}): {first.reason}; "
            f"all reasons are in {run.out / 'quarantine.jsonl'}"
        )
    print(errors.printable(f"{done} done, {len(rejected)} quarantined: {run.out}"))


def encoder(
    params: vq.Params, cfg: VQConfig, device: torch.device
) -> Callable[[Float[Tensor, "B 3 H W"]], Int[np.ndarray, "B h w"]]:
    params = pytree.tree_map(lambda t: t.to(device), params)

    @torch.inference_mode()
    def encode(batch: Tensor) -> np.ndarray:
        return vq.encode(params, batch.to(device), cfg).cpu().numpy()

    return encode


def prepare(index: int, value: Any, roots: Sequence[Path], tokenizer: Tokenizer, run: Settings) -> Prepared:
    """Everything about a row that needs no model: a function of the row, its file and the settings. Raises InputError."""
    row = dataset.row(value)
    if problem := prompt.caption_problem(tokenizer, row.prompt):
        raise InputError(problem)
    image = images.fit(images.open_image(dataset.find(row.file, roots)), run.size)
    prompt.check_size(tokenizer, *image.size)
    content = hashlib.sha256(json.dumps([run.seed, row.file, row.prompt]).encode()).digest()
    with_size = int.from_bytes(content[:8]) < SIZE_TEXT_PROBABILITY * 2**64
    return Prepared(index, row.prompt, with_size, image)


def features(
    rows: Sequence[Any],
    prepare: Callable[[int, Any], Prepared],
    encode: Callable[[Tensor], np.ndarray],
    tokenizer: Tokenizer,
    batch: int,
) -> Iterator[data.Feature | Rejected]:
    """One result per row, in the rows' order; pictures of equal size are encoded together."""
    for start in range(0, len(rows), WINDOW * batch):
        window = range(start, min(start + WINDOW * batch, len(rows)))
        prepared = [_attempt(prepare, i, rows[i]) for i in window]
        codes = _codes([p for p in prepared if isinstance(p, Prepared)], encode, batch)
        for p in prepared:
            if isinstance(p, Prepared):
                text = data.text_ids(tokenizer, p.prompt, codes[p.row], p.with_size)
                yield data.Feature(p.row, text, codes[p.row])
            else:
                yield p


def _attempt(prepare: Callable[[int, Any], Prepared], index: int, value: Any) -> Prepared | Rejected:
    try:
        return prepare(index, value)
    except InputError as error:
        file = value.get("file") if isinstance(value, dict) else None
        return Rejected(index, file if isinstance(file, str) else None, str(error))


def _codes(prepared: list[Prepared], encode: Callable[[Tensor], np.ndarray], batch: int) -> dict[int, np.ndarray]:
    """The codes [h w] of every row."""
    by_size: dict[tuple[int, int], list[Prepared]] = {}
    for p in prepared:
        by_size.setdefault(p.image.size, []).append(p)
    codes = {}
    for same in by_size.values():
        for i in range(0, len(same), batch):
            part = same[i : i + batch]
            encoded = encode(torch.stack([images.to_tensor(p.image) for p in part]))
            codes |= {p.row: c for p, c in zip(part, encoded, strict=True)}
    return codes


def _kept(results: Iterator[data.Feature | Rejected], count: int, rejected: list[Rejected]) -> Iterator[data.Feature]:
    """The features; what is rejected goes to the list. Progress is shown on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for result in progress.track(results, total=count, description="pictures to tokens"):
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                yield result


def _check(run: Settings, tokenizer: Tokenizer) -> None:
    images.crop_sizes(run.size)
    prompt.check_size(tokenizer, run.size, run.size)
    if run.batch < 1:
        raise InputError(f"--batch {run.batch}: expected at least 1")
    if run.seed < 0:
        raise InputError(f"--seed {run.seed}: expected 0 or more")
    if run.image_root and not run.image_root.is_dir():
        raise InputError(f"--image-root {run.image_root}: no such folder")


if __name__ == "__main__":
    errors.run(main)
