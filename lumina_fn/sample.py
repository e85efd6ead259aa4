"""Pictures from a model: codes drawn one after another by lumina_fn.scores, each a row of a cached decoder.

h and w are latent cells (8 pixels a side); an image is `start size(h) size(w) (w codes, newline) x h end`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from lumina_fn import decode, vq
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.errors import InputError
from lumina_fn.model import Head, Params, unembed
from lumina_fn.scores import (  # noqa: F401  (callers name these as parts of sampling)
    Number,
    Schedule,
    constant,
    constrain,
    draw,
    drop_unlikely,
    guide,
    keep_top_k,
    open_image,
    reference,
    uniforms,
)
from lumina_fn.vocab import CODES_PER_PATCH, PIXELS_PER_CODE, Ids, allowed, image_length

PATCH = PIXELS_PER_CODE * CODES_PER_PATCH  # pixels


class Sampling(NamedTuple):
    """How pictures are drawn. Sizes in pixels, multiples of 32; temperature 0 takes the likeliest code, min_p 0 leaves none out."""

    height: int
    width: int
    guidance: Number = 4.0
    guidance_schedule: Schedule = constant
    top_k: int = 4096
    temperature: Number = 1.0
    min_p: Number = 0.0
    seed: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.height // PIXELS_PER_CODE, self.width // PIXELS_PER_CODE

    def scales(self) -> Sequence[Number]:
        """The guidance at each token after the sizes."""
        return self.guidance_schedule(self.guidance, *self.grid)

    def choose(
        self, cond: Float[Tensor, "B V"], uncond: Float[Tensor, "B V"], scale: Number, uniform: Tensor
    ) -> Tensor:
        """The index of the next code of each row, among those that these are the scores of."""
        scores = drop_unlikely(guide(cond, uncond, scale), cond, self.min_p)
        return draw(keep_top_k(scores, self.top_k), self.temperature, uniform)


# The public contract's signature: the settings are named one by one, so that a call reads as what it draws.
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
    how = Sampling(height, width, guidance, guidance_schedule, top_k, temperature, min_p, seed)
    return draw_pictures(params, [Picture(prompt_ids, *index)], cfg, how, Pace(compile=compile))[0]


class Picture(NamedTuple):
    """What one picture is drawn from; its two numbers and the seed fix its random numbers."""

    prompt_ids: Sequence[int] | Tensor
    prompt: int  # its prompt's number
    picture: int  # its number among the pictures of this prompt


class Pace(NamedTuple):
    """What changes the time that drawing takes, and no picture but by rounding."""

    batch: int = 1  # pictures at a time
    compile: bool = False  # a block first, some seconds (decode.extend)
    tick: Callable[[int], None] = lambda pictures: (
        None
    )  # called after each code with the number of pictures that received one
    rank: int = 0  # of `size` processes that share the batches: this one draws the batches rank, rank + size, ...
    size: int = 1


ONE = Pace()  # picture at a time


def generate_many(
    params: Params, prompts: Sequence[Sequence[int] | Tensor], cfg: ModelConfig, how: Sampling, *, n: int = 1, pace: Pace = ONE
) -> Int[Tensor, "P n h w"]:  # fmt: skip
    """n pictures of each prompt. Entry [p, i] is `generate` of prompt p with index (p, i). Raises InputError as `generate` does."""
    pictures = [Picture(ids, p, i) for p, ids in enumerate(prompts) for i in range(n)]
    if not pictures:
        raise InputError(f"{len(prompts)} prompts, n {n}: expected at least 1 of each")
    return draw_pictures(params, pictures, cfg, how, pace).unflatten(0, (-1, n))


@torch.no_grad()
def draw_pictures(
    params: Params, pictures: Sequence[Picture], cfg: ModelConfig, how: Sampling, pace: Pace = ONE
) -> Int[Tensor, "N h w"]:
    """The codes of each picture. Random numbers do not depend on the batch; scores are equal up to the rounding of the batch size.

    Pictures of other processes (pace.rank) are 0, so that the sum over all processes is what one process would draw, to the bit. Raises InputError as `generate` does.
    """
    special = _check(cfg, how)
    if pace.batch < 1:
        raise InputError(f"batch {pace.batch}: expected at least 1")
    h, w = how.grid
    steps = h * (w + 1)
    on_device: dict[int, Tensor] = {}  # by prompt: pictures share it
    for one in pictures:
        if one.prompt not in on_device:
            on_device[one.prompt] = torch.tensor(
                _prompt(one.prompt_ids, cfg, special, h, w), device=params.embed.device
            )
    # One size of cache, so that one compiled block serves every batch, whatever its prompts' lengths.
    slots = max(map(len, on_device.values())) + len(_opening(h, w, special)) + steps
    codes = torch.zeros(len(pictures), h, w, dtype=torch.int64, device=params.embed.device)
    for start in range(pace.rank * pace.batch, len(pictures), pace.size * pace.batch):
        part = pictures[start : start + pace.batch]
        random = torch.stack([uniforms(how.seed, one.prompt, one.picture, steps) for one in part])
        batch = _Batch([on_device[one.prompt] for one in part], random, slots, special)
        codes[start : start + pace.batch] = _drawn(params, batch, cfg, how, pace)
    return codes


@torch.no_grad()
def picture(codes: Int[Tensor, "h w"], vq_params: vq.Params, vq_cfg: VQConfig) -> Image.Image:
    """One picture of 8h x 8w pixels, RGB, from its codes."""
    image = vq.decode(vq_params, codes[None].to(vq_params.codebook.device), vq_cfg)
    return Image.fromarray(vq.pixels(image)[0].cpu().numpy())


class _Batch(NamedTuple):
    prompts: list[Tensor]
    random: Float[Tensor, "B steps"]
    slots: int  # of the cache
    ids: Ids


def _drawn(params: Params, batch: _Batch, cfg: ModelConfig, how: Sampling, pace: Pace) -> Int[Tensor, "B h w"]:
    """The codes of one batch. Rows 0..B-1 see their prompts; with guidance rows B..2B-1 see the same images without a prompt."""
    ids, B, device = batch.ids, len(batch.prompts), params.embed.device
    (h, w), scales = how.grid, how.scales()
    opening = torch.tensor(_opening(h, w, ids), device=device)
    copies = 2 if any(scale != 1.0 for scale in scales) else 1
    contexts = [torch.cat([prompt, opening]) for prompt in batch.prompts] + [opening] * (B * (copies - 1))
    lengths = [len(context) for context in contexts]
    cache = decode.empty_cache(params, cfg, len(contexts), batch.slots)
    x = decode.prefill(params, contexts, cache, cfg)

    image, fresh = [], []  # fresh: tokens that the cache has not seen, a code and the newline forced after it
    for t in range(h * (w + 1)):
        may = allowed(2 + t, h, w, ids)
        if may == range(ids.newline, ids.newline + 1):
            token = torch.full((B,), ids.newline, device=device)
        else:
            if fresh:
                tokens = torch.stack(fresh, 1).repeat(copies, 1)
                x = decode.extend(params, tokens, lengths, cache, cfg, compile=pace.compile)
                lengths, fresh = [n + len(fresh) for n in lengths], []
            # Only the rows of the unembedding for codes: a tenth of the released vocabulary, with the same scores.
            head = Head(params.head.norm, params.head.unembed[may.start : may.stop])
            scores = unembed(head, x, replace(cfg, masked_ids=()))[:, 0]
            token = how.choose(scores[:B], scores[-B:], scales[t], batch.random[:, t]).to(device) + may.start
            pace.tick(B)
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


def _check(cfg: ModelConfig, how: Sampling) -> Ids:
    """The model's image ids. Raises InputError for sizes or settings that cannot be sampled."""
    if cfg.ids is None:
        raise InputError(
            "the model has no image ids (cfg.ids): load it from a folder whose tokenizer or config.json has them"
        )
    codes = range(cfg.ids.code0, cfg.ids.code0 + cfg.ids.codes)
    for name, side in (("height", how.height), ("width", how.width)):
        if not isinstance(side, int) or side < PATCH or side % PATCH:
            raise InputError(f"{name} {side}: expected a positive multiple of {PATCH} pixels")
    used = [*_opening(*how.grid, cfg.ids), cfg.ids.newline, codes[-1]]
    if max(used) >= cfg.vocab:
        raise InputError(
            f"image id {max(used)} is not below {cfg.vocab}, the model's vocabulary: are these its tokenizer and config?"
        )
    if masked := set(cfg.masked_ids).intersection(codes):
        raise InputError(
            f"the model masks {len(masked)} of its {len(codes)} image ids: set mask_image_logits to false in its config.json"
        )
    settings = (
        ("guidance", how.guidance, "a finite number, at least 0", lambda x: 0 <= x < math.inf),
        ("top_k", how.top_k, "a whole number, at least 1", lambda x: isinstance(x, int) and x >= 1),
        ("temperature", how.temperature, "a finite number, at least 0 (0 is greedy)", lambda x: 0 <= x < math.inf),
        ("min_p", how.min_p, "a number in [0, 1)", lambda x: 0 <= x < 1),
        (
            "guidance_schedule",
            how.guidance_schedule,
            "a function: sample.constant, sample.reference or your own",
            callable,
        ),
    )
    for name, value, expected, holds in settings:
        if not holds(value):
            raise InputError(f"{name} {value}: expected {expected}")
    return cfg.ids
