"""Drawing codes one after another, against transformers' `generate` on the same weights.

A prompt of 64 ids, then 256 picture tokens. We compute the rows of the head that the grammar allows, the peer all of them: it has
no grammar. With guidance both run the model with and without the prompt; we as two rows of one batch, the peer one after the other.
Ours runs with a compiled block, which is made before anything is timed; what eager calls take stands beside it.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from bench import ceilings, peers
from bench.harness import Bench, Row, anew, speed_row, speeds
from bench.language import CFG
from lumina_fn import model, sample, vocab
from lumina_fn.costs import cost

PROMPT, TOP_K, GUIDANCE = 64, 2000, 4.0
# Where sep and the sizes are does not matter here: the released tokenizer says it.
IDS = vocab.Ids(
    vocab.LUMINA_START, vocab.LUMINA_END, vocab.LUMINA_NEWLINE, sep=10_001, size0=10_100, code0=vocab.LUMINA_CODE0,
    codes=vocab.LUMINA_CODES,
)  # fmt: skip
DRAWN = replace(CFG, ids=IDS)


def prompt() -> torch.Tensor:
    return torch.randint(100, 10_000, (PROMPT,), generator=torch.Generator().manual_seed(2))


def ours(guidance: float, side: int, compiled: bool) -> Bench:
    params, ids = model.init(DRAWN), prompt()

    def run() -> None:
        sample.generate(
            params, ids, DRAWN, height=8 * side, width=8 * side, guidance=guidance, top_k=TOP_K, compile=compiled
        )

    def check() -> list[float]:
        run()
        return model.forward(params, ids[None], DRAWN)[0, -1, :: DRAWN.vocab // 199].tolist()

    return Bench(check, run)


def theirs(guidance: float, side: int) -> Bench:
    module, ids = peers.chameleon(model.init(DRAWN), DRAWN).eval(), prompt()[None]
    more = {} if guidance == 1.0 else {"guidance_scale": guidance, "negative_prompt_ids": ids[:, :8]}

    @torch.no_grad()
    def run(tokens: int = side * side) -> None:
        out = module.generate(
            ids, do_sample=True, top_k=TOP_K, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0, eos_token_id=None,
            **more,
        )  # fmt: skip
        assert out.shape[1] == PROMPT + tokens

    def check() -> list[float]:
        run(4)
        with torch.no_grad():
            logits = module.lm_head(module.model(input_ids=ids, use_cache=False).last_hidden_state)
        return logits[0, -1, :: DRAWN.vocab // 199].tolist()

    return Bench(check, run)


def rows(quick: bool) -> Iterator[Row]:
    side, pairs = (8, 1) if quick else (16, 3)
    bandwidth = ceilings.best((ceilings.reading,), ceilings.BYTES)
    codes = DRAWN.ids.codes * DRAWN.width
    weights = 4 * (cost.parameters(DRAWN) - 2 * DRAWN.vocab * DRAWN.width + codes)  # bytes that a token must read
    for name, guidance, least in (("decode_plain", 1.0, 3.6), ("decode_guided", GUIDANCE, 3.8)):
        sides = {
            "ours": (ours, guidance, side, True),
            "eager": (ours, guidance, side, False),
            "theirs": (theirs, guidance, side),
        }
        found = anew(sides, pairs)
        wall, cpu = speeds(found["eager"], found["theirs"])
        rate = side * side / found["ours"].wall
        measured = {
            "tokens_per_s": rate, "their_tokens_per_s": side * side / found["theirs"].wall,
            "of_bandwidth": rate * weights / bandwidth, "bandwidth_gb_s": bandwidth / 1e9,
            "eager": {"tokens_per_s": side * side / found["eager"].wall, "wall_ratio": wall.median, "cpu_ratio": cpu.median},
        }  # fmt: skip
        yield speed_row(name, {"wall_ratio": f">= {least}"}, found["ours"], found["theirs"], measured=measured)
