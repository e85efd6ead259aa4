"""Functions of scores that decide the next code: guidance, the image's grammar, top-k, temperature, and the draw itself."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lumina_fn.errors import InputError
from lumina_fn.vocab import CODES_PER_PATCH, Ids, allowed

Number = int | float
Schedule = Callable[[Number, int, int], Sequence[Number]]  # (guidance, h, w) -> the scale at each token after the sizes


def constant(guidance: Number, h: int, w: int) -> list[Number]:
    """The same scale at every token."""
    return [guidance] * (h * (w + 1) + 1)


def reference(guidance: Number, h: int, w: int) -> list[Number]:
    """The reference's scales: any guidance but 1 decays to 4 within the first rows, and below 4 counts as 4.

    Its guidance overwrites itself with max(4, g (1 - n / N)) after n tokens of the image; N is a quarter of the codes.
    """
    scales = []
    for n in range(2, h * (w + 1) + 3):
        guidance = guidance if guidance == 1.0 else max(4.0, guidance * (1 - n / (h * w / 4)))
        scales.append(guidance)
    return scales


def guide(cond: Float[Tensor, "*B V"], uncond: Float[Tensor, "*B V"], scale: Number) -> Float[Tensor, "*B V"]:
    """Classifier-free guidance: uncond + scale * (cond - uncond); scale 1 returns cond."""
    return cond if scale == 1.0 else scale * (cond - uncond) + uncond


def drop_unlikely(scores: Float[Tensor, "*B V"], cond: Float[Tensor, "*B V"], min_p: Number) -> Float[Tensor, "*B V"]:
    """Scores with -inf where the prompted model gives less than min_p of its likeliest id's probability; 0 drops none.

    Computed from scores before guidance, since guidance on a small model raises ids that are improbable under the prompt.
    """
    if min_p == 0.0:
        return scores
    return scores.masked_fill(cond < cond.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def open_image(tokens: Sequence[int], ids: Ids) -> list[int] | None:
    """The tokens after the last `start` where no `end` closes it; None in text."""
    tokens = list(tokens)
    if tokens.count(ids.start) != tokens.count(ids.end) + 1:
        return None
    return tokens[len(tokens) - tokens[::-1].index(ids.start) :]


def constrain(scores: Float[Tensor, "*B V"], tokens: Sequence[int], ids: Ids) -> Float[Tensor, "*B V"]:
    """Scores for the token after `tokens`, -inf where the grammar forbids it and 0 where it leaves one id.

    The reference's rule on the whole vocabulary: it reads h and w off the sequence, so text, `start` and the sizes stay free.
    """
    inside = open_image(tokens, ids)
    if inside is None or len(inside) < 2:
        return scores
    h, w = (CODES_PER_PATCH * (size - ids.size0) for size in inside[:2])
    may = allowed(len(inside), h, w, ids)
    kept = torch.full_like(scores, -math.inf)
    kept[..., may.start : may.stop] = 0.0 if len(may) == 1 else scores[..., may.start : may.stop]
    return kept


def keep_top_k(scores: Float[Tensor, "*B V"], k: int) -> Float[Tensor, "*B V"]:
    """Scores with -inf below the k-th largest; ties with it stay."""
    if k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[..., -1:], -math.inf)


def draw(scores: Float[Tensor, "B V"], temperature: Number, uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The id at which softmax(scores / temperature), summed in id order, passes `uniform` in [0, 1); temperature 0 is argmax.

    One number per row in float64 on the host: the same number gives the same id on every device and in every batch.
    Raises InputError where no score is finite.
    """
    scores = scores.cpu().double()
    top = scores.amax(-1, keepdim=True)
    if not top.isfinite().all():
        raise InputError(
            "the model's logits are not finite: its weights are damaged, or this dtype is too narrow for them"
        )
    if temperature == 0.0:
        return scores.argmax(-1)
    mass = ((scores - top) / temperature).exp_().cumsum(-1)
    total = mass[:, -1]
    # Rounding can carry uniform * total up to total, past the last id of positive probability.
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(mass, point[:, None], right=True)[:, 0]


def uniforms(seed: int, prompt: int, picture: int, count: int) -> Float[Tensor, " count"]:
    """The random numbers of one picture in [0, 1), one per token, independent of other pictures."""
    digest = hashlib.sha256(f"{seed} {prompt} {picture}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.rand(count, generator=generator, dtype=torch.float64)
