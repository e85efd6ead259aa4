"""Pictures from a model: guidance, grammar, top-k, temperature, in this order, each a plain function of scores.

h and w are latent cells (8 pixels a side); an image is `start size(h) size(w) (w codes, newline) x h end`.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lumina_fn import decode
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.model import Head, Params, unembed
from lumina_fn.vocab import CODES_PER_PATCH, PIXELS_PER_CODE, Ids, allowed, image_length

PATCH = PIXELS_PER_CODE * CODES_PER_PATCH  # pixels

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


def generate(
    params: Params, prompt_ids: Sequence[int] | Tensor, cfg: ModelConfig, *, height: int, width: int, guidance: Number = 4.0,
    guidance_schedule: Schedule = constant, top_k: int = 4096, temperature: Number = 1.0, min_p: Number = 0.0, seed: int = 0,
    index: tuple[int, int] = (0, 0), compile: bool = False,
) -> Int[Tensor, "h w"]:  # fmt: skip
    """The codes of one picture of height x width pixels (multiples of 32), drawn after `[bos] enc(prompt + sep)`.

    The prompt may end in `start size(h) size(w)` of that size. Seed and index (of a prompt, of its picture) fix the random
    numbers. compile: takes some seconds once, and less time for every code (decode.extend). Raises InputError for sizes, ids or
    settings that cannot be sampled.
    """
    return generate_many(
        params, [prompt_ids], cfg, height=height, width=width, guidance=guidance, guidance_schedule=guidance_schedule,
        top_k=top_k, temperature=temperature, min_p=min_p, seed=seed, first=index, compile=compile,
    )[0, 0]  # fmt: skip


@torch.no_grad()
def generate_many(
    params: Params, prompts: Sequence[Sequence[int] | Tensor], cfg: ModelConfig, *, height: int, width: int, n: int = 1,
    batch: int = 1, guidance: Number = 4.0, guidance_schedule: Schedule = constant, top_k: int = 4096, temperature: Number = 1.0,
    min_p: Number = 0.0, seed: int = 0, first: tuple[int, int] = (0, 0), tick: Callable[[int], None] = lambda pictures: None,
    compile: bool = False,
) -> Int[Tensor, "P n h w"]:  # fmt: skip
    """n pictures of each prompt, `batch` at a time; after each code `tick` is called with the number of pictures that received one.

    Entry [p, i] is `generate` of prompt p with index first + (p, i): random numbers do not depend on the batch, and scores are
    equal up to the rounding of the batch size. Raises InputError as `generate` does.
    """
    special = _check(cfg, height, width, guidance, guidance_schedule, top_k, temperature, min_p)
    if min(n, batch, len(prompts)) < 1:
        raise InputError(f"{len(prompts)} prompts, n {n}, batch {batch}: expected at least 1 of each")
    h, w = (side // PIXELS_PER_CODE for side in (height, width))
    scales = guidance_schedule(guidance, h, w)
    jobs = [(p, i) for p in range(len(prompts)) for i in range(n)]
    ids = [torch.tensor(_prompt(prompt, cfg, special, h, w), device=params.embed.device) for prompt in prompts]

    def choose(cond: Tensor, uncond: Tensor, t: int, uniform: Tensor) -> Tensor:
        scores = drop_unlikely(guide(cond, uncond, scales[t]), cond, min_p)
        return draw(keep_top_k(scores, top_k), temperature, uniform)

    # One size of cache, so that one compiled block serves every batch, whatever its prompts' lengths.
    slots = max(map(len, ids)) + len(_opening(h, w, special)) + h * (w + 1)
    parts = []
    for part in (jobs[a : a + batch] for a in range(0, len(jobs), batch)):
        random = torch.stack([uniforms(seed, first[0] + p, first[1] + i, h * (w + 1)) for p, i in part])
        guided = any(scale != 1.0 for scale in scales)
        parts.append(
            _pictures(params, [ids[p] for p, _ in part], slots, random, cfg, h, w, guided, choose, tick, compile)
        )
    return torch.cat(parts).unflatten(0, (-1, n))


def _pictures(params, prompts, slots, random, cfg, h, w, guided, choose, tick, compile) -> Int[Tensor, "B h w"]:
    """The codes of one batch. Rows 0..B-1 see their prompts; with guidance rows B..2B-1 see the same images without a prompt."""
    ids, B, device = cfg.ids, len(prompts), params.embed.device
    opening = torch.tensor(_opening(h, w, ids), device=device)
    copies = 2 if guided else 1
    contexts = [torch.cat([prompt, opening]) for prompt in prompts] + [opening] * (B * (copies - 1))
    lengths = [len(context) for context in contexts]
    cache = decode.empty_cache(params, cfg, len(contexts), slots)
    x = decode.prefill(params, contexts, cache, cfg)

    image, fresh = [], []  # fresh: tokens that the cache has not seen, a code and the newline forced after it
    for t in range(h * (w + 1)):
        may = allowed(2 + t, h, w, ids)
        if may == range(ids.newline, ids.newline + 1):
            token = torch.full((B,), ids.newline, device=device)
        else:
            if fresh:
                tokens = torch.stack(fresh, 1).repeat(copies, 1)
                x = decode.extend(params, tokens, lengths, cache, cfg, compile=compile)
                lengths, fresh = [n + len(fresh) for n in lengths], []
            # Only the rows of the unembedding for codes: a tenth of the released vocabulary, with the same scores.
            head = Head(params.head.norm, params.head.unembed[may.start : may.stop])
            scores = unembed(head, x, replace(cfg, masked_ids=()))[:, 0]
            token = choose(scores[:B], scores[-B:], t, random[:, t]).to(device) + may.start
            tick(B)
        image.append(token)
        fresh.append(token)
    return torch.stack(image, 1).view(B, h, w + 1)[:, :, :w] - ids.code0


def _opening(h: int, w: int, ids: Ids) -> list[int]:
    return [ids.start, *(allowed(n, h, w, ids).start for n in range(2))]


def _prompt(prompt_ids: Sequence[int] | Tensor, cfg: ModelConfig, ids: Ids, h: int, w: int) -> list[int]:
    """The prompt's ids up to the image that is to be drawn."""
    prompt = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else list(prompt_ids)
    if odd := [i for i in prompt if not isinstance(i, int) or not 0 <= i < cfg.vocab]:
        raise InputError(
            f"prompt id {odd[0]}: expected whole numbers below {cfg.vocab}, the model's vocabulary; is this its tokenizer?"
        )
    if (inside := open_image(prompt, ids)) is not None:
        opening = _opening(h, w, ids)
        if inside != opening[1:]:
            raise InputError(
                f"the prompt ends in an image that begins {[ids.start, *inside[:2]]}, expected {opening} and no more"
            )
        prompt = prompt[: -len(opening)]
    if not prompt:
        raise InputError("the prompt is empty: expected at least its first token, bos")
    room = cfg.max_positions - image_length(h, w)
    if len(prompt) > room:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and an image of {image_length(h, w)} are longer than the model's context of "
            f"{cfg.max_positions}: shorten the prompt or draw a smaller picture"
        )
    return prompt


def _check(cfg, height, width, guidance, guidance_schedule, top_k, temperature, min_p) -> Ids:
    """The model's image ids. Raises InputError for sizes or settings that cannot be sampled."""
    if cfg.ids is None:
        raise InputError(
            "the model has no image ids (cfg.ids): load it from a folder whose tokenizer or config.json has them"
        )
    codes = range(cfg.ids.code0, cfg.ids.code0 + cfg.ids.codes)
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or side < PATCH or side % PATCH:
            raise InputError(f"{name} {side}: expected a positive multiple of {PATCH} pixels")
    used = [*_opening(height // PIXELS_PER_CODE, width // PIXELS_PER_CODE, cfg.ids), cfg.ids.newline, codes[-1]]
    if max(used) >= cfg.vocab:
        raise InputError(
            f"image id {max(used)} is not below {cfg.vocab}, the model's vocabulary: are these its tokenizer and config?"
        )
    if masked := set(cfg.masked_ids).intersection(codes):
        raise InputError(
            f"the model masks {len(masked)} of its {len(codes)} image ids: set mask_image_logits to false in its config.json"
        )
    settings = (
        ("guidance", guidance, "a finite number, at least 0", lambda x: 0 <= x < math.inf),
        ("top_k", top_k, "a whole number, at least 1", lambda x: isinstance(x, int) and x >= 1),
        ("temperature", temperature, "a finite number, at least 0 (0 is greedy)", lambda x: 0 <= x < math.inf),
        ("min_p", min_p, "a number in [0, 1)", lambda x: 0 <= x < 1),
        ("guidance_schedule", guidance_schedule, "a function: sample.constant, sample.reference or your own", callable),
    )
    for name, value, expected, holds in settings:
        if not holds(value):
            raise InputError(f"{name} {value}: expected {expected}")
    return cfg.ids
