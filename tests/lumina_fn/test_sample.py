"""Sampling: the reference's numbers, and what holds for every model."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lumina_fn import decode, model, sample, transform
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.formats import names
from lumina_fn.sample import Pace, Sampling
from lumina_fn.vocab import Ids, image_codes, image_length, image_tokens
from tests.support import paths

GOLDENS = paths.GOLDENS / "sampling"
GREEDY = ("greedy_cfg4_1x1", "greedy_cfg9_text_to_image_1x2", "greedy_nocfg_2x1")
IDS = Ids(start=2, end=3, newline=4, sep=5, size0=6, code0=20, codes=24)
CFG = ModelConfig(vocab=46, width=24, layers=2, heads=4, kv_heads=2, hidden=32, max_positions=128, ids=IDS)
PROMPTS = [[1, 10, 11, 5], [1, 12, 5], [1, 9, 9, 9, 8, 14, 5]]


def greedy(name):
    facts, tensors = json.loads((GOLDENS / f"{name}.json").read_text()), load_file(GOLDENS / f"{name}.safetensors")
    c, i = facts["config"], facts["ids"]
    ids = Ids(i["image_start"], i["image_end"], i["newline"], i["sep"], 10, i["image_first"], i["n_codes"])
    cfg = ModelConfig(
        vocab=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"], hidden=c["intermediate_size"], eps=c["rms_norm_eps"], ids=ids,
    )  # fmt: skip
    like = model.init(cfg, device="meta")
    theirs = {path: tensors["param." + names.to_source(path, names.TRANSFORMER)] for path in names.flatten(like)}
    return facts, tensors, names.unflatten(like, theirs), cfg


@pytest.fixture(scope="module")
def params():
    tree = model.init(CFG, dtype=torch.float64)
    return torch.utils._pytree.tree_map(lambda t: t * 20 if t.ndim == 2 else t, tree)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_run_draws_the_reference_s_codes(name):
    facts, tensors, params, cfg = greedy(name)
    height, width = (32 * n for n in facts["grids_hw"])
    codes = sample.generate(
        params, tensors["prompt"], cfg, height=height, width=width, guidance=facts["guidance_scale"],
        guidance_schedule=sample.reference, top_k=facts["image_top_k"], temperature=0,
    )  # fmt: skip
    whole = torch.cat([tensors["prompt"], tensors["new_tokens"]]).tolist()
    image = whole[whole.index(cfg.ids.start) : whole.index(cfg.ids.end) + 1]
    assert codes.tolist() == image_codes(image, cfg.ids)


@pytest.mark.parametrize("name", GREEDY)
def test_every_step_s_scores_are_the_reference_s(name):
    facts, tensors, params, cfg = greedy(name)
    tokens, h, w = tensors["prompt"].tolist(), *(4 * n for n in facts["grids_hw"])
    scales = sample.reference(facts["guidance_scale"], h, w)
    for step, chosen in enumerate(tensors["new_tokens"].tolist()):
        cond = model.forward(params, torch.tensor([tokens]), cfg)[0, -1]
        torch.testing.assert_close(cond, tensors["cond_logits"][step], atol=1e-5, rtol=1e-5)
        inside, scores = sample.open_image(tokens, cfg.ids), cond
        if inside is not None and len(inside) >= 2:
            uncond = model.forward(params, torch.tensor([[cfg.ids.start, *inside]]), cfg)[0, -1]
            scores = sample.guide(cond, uncond, scales[len(inside) - 2])
        if "after_cfg" in tensors:
            torch.testing.assert_close(scores, tensors["after_cfg"][step], atol=2e-4, rtol=0)
        k = facts["text_top_k"] if inside is None else facts["image_top_k"]
        scores = sample.keep_top_k(sample.constrain(scores, tokens, cfg.ids), k)
        torch.testing.assert_close(scores, tensors["final_scores"][step], atol=2e-4, rtol=0)
        assert scores.argmax() == chosen
        tokens.append(chosen)


def test_grammar_and_top_k_on_the_released_vocabulary():
    facts, tensors = (
        json.loads((GOLDENS / "processors_real_vocab.json").read_text()),
        load_file(GOLDENS / "processors_real_vocab.safetensors"),
    )
    ids = Ids(facts["image_start"], facts["image_end"], facts["newline"], 0, 151671, facts["image_ids"][0], 16384)
    for state in facts["states"]:
        i = torch.arange(facts["vocab"])
        scores = (((i * 2654435761 + state["hash_s"] * 40503 + 12345) % 2**32).double() / 2**32 * 16 - 8).float()
        tokens = tensors[f"{state['state']}.input_ids"].tolist()
        k = facts["text_top_k" if sample.open_image(tokens, ids) is None else "image_top_k"]
        legal = sample.constrain(scores, tokens, ids)
        assert legal.isfinite().sum() == state["n_finite_after_multimodal"]
        kept = sample.keep_top_k(legal, k)
        assert kept.isfinite().nonzero()[:, 0].tolist() == tensors[f"{state['state']}.kept_ids"].tolist()
        assert kept.argmax() == state["argmax"]
        finite = kept.isfinite()
        assert (kept[finite] == (0.0 if state["forced"] else scores[finite])).all()


def test_the_reference_s_schedule():
    for run in json.loads((GOLDENS / "cfg_schedule.json").read_text())["runs"]:
        h, w = (4 * n for n in run["grids_hw"])
        expected = run["guidance_scale_after_call"]
        scales = sample.reference(run["cfg"], h, w)
        assert scales[: len(expected)] == pytest.approx(expected, abs=1e-12)
        assert len(scales) == len(sample.constant(run["cfg"], h, w)) == h * (w + 1) + 1
        for scale, out in zip(scales[: len(expected)], run["output_for_cond1_uncond0"], strict=True):
            assert sample.guide(torch.ones(1), torch.zeros(1), scale).item() == pytest.approx(out, rel=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("top_k", "temperature", "min_p"), [(4096, 1.0, 0.0), (9, 1.3, 0.05), (4096, 0.0, 0.0)])
def test_cached_batched_and_sliced_is_the_plain_rule(params, guidance, top_k, temperature, min_p):
    """Every code is what the scores of a full forward over the whole vocabulary give, in one order, at its position."""
    h, w = 4, 8
    rule = {"guidance": guidance, "top_k": top_k, "temperature": temperature, "min_p": min_p}
    pictures = sample.generate_many(params, PROMPTS, CFG, Sampling(32, 64, seed=3, **rule), n=2, pace=Pace(4))
    assert pictures.shape == (3, 2, h, w)
    for p, prompt in enumerate(PROMPTS):
        for i in range(2):
            image, random = image_tokens(pictures[p, i].tolist(), IDS), sample.uniforms(3, p, i, h * (w + 1))
            conds = model.forward(params, torch.tensor([prompt + image]), CFG)[:, len(prompt) :]
            unconds = model.forward(params, torch.tensor([image]), CFG)
            for t in range(h * (w + 1)):
                cond, uncond = conds[:, 2 + t], unconds[:, 2 + t]
                legal = sample.constrain(cond, image[: 3 + t], IDS)
                scores = sample.constrain(sample.guide(cond, uncond, guidance), image[: 3 + t], IDS)
                scores = sample.keep_top_k(sample.drop_unlikely(scores, legal, min_p), top_k)
                assert sample.draw(scores, temperature, random[t : t + 1]).tolist() == [image[3 + t]]


def test_a_picture_is_the_same_in_every_batch_and_another_for_another_seed(params):
    size = {"height": 64, "width": 32}
    codes = sample.generate_many(params, PROMPTS, CFG, Sampling(**size), n=2)
    for batch in (2, 3, 6, 100):
        assert (sample.generate_many(params, PROMPTS, CFG, Sampling(**size), n=2, pace=Pace(batch)) == codes).all()
    assert (sample.generate_many(params, PROMPTS, CFG, Sampling(**size), n=1, pace=Pace(2)) == codes[:, :1]).all()
    for processes in (2, 9):  # each draws its share of the batches, the last of nine nothing
        draw = lambda r, n: sample.generate_many(
            params, PROMPTS, CFG, Sampling(**size), n=2, pace=Pace(2, rank=r, size=n)
        )
        assert (sum(draw(rank, processes) for rank in range(processes)) == codes).all()
    assert (sample.generate(params, torch.tensor(PROMPTS[2]), CFG, **size, index=(2, 1)) == codes[2, 1]).all()
    assert (sample.generate(params, PROMPTS[0], CFG, **size) == codes[0, 0]).all()
    assert (sample.generate(params, PROMPTS[0], CFG, **size, seed=1) != codes[0, 0]).any()
    assert (codes[0, 0] != codes[0, 1]).any()


def test_one_compiled_block_draws_the_same_pictures_for_prompts_of_all_lengths(params, monkeypatch):
    draw = lambda compile: sample.generate_many(
        params, PROMPTS, CFG, Sampling(32, 64, guidance=3.0, seed=4), pace=Pace(compile=compile)
    )
    compiled, inductor = [], transform.inductor
    monkeypatch.setattr(transform, "inductor", lambda *graph: compiled.append(graph) or inductor(*graph))
    decode._compiled.cache_clear()
    assert torch.equal(draw(True), draw(False))
    assert len(compiled) == 1


def test_guidance_1_is_no_guidance_and_0_is_no_prompt(params):
    size = {"height": 32, "width": 32}
    one = lambda prompt, guidance, schedule: sample.generate(
        params, prompt, CFG, **size, guidance=guidance, guidance_schedule=schedule
    )
    almost = lambda guidance, h, w: [1 + 1e-12] * (h * (w + 1) + 1)  # takes the guided path
    assert (one(PROMPTS[0], 1, sample.constant) == one(PROMPTS[0], 1, almost)).all()
    assert (one(PROMPTS[0], 0, sample.constant) == one(PROMPTS[1], 0, sample.constant)).all()
    assert (one(PROMPTS[0], 1, sample.constant) != one(PROMPTS[1], 1, sample.constant)).any()


def test_a_prompt_may_open_its_image(params):
    opened = [*PROMPTS[0], IDS.start, IDS.size0 + 1, IDS.size0 + 2]
    size = {"height": 32, "width": 64}
    assert (sample.generate(params, opened, CFG, **size) == sample.generate(params, PROMPTS[0], CFG, **size)).all()
    with pytest.raises(InputError, match="ends in an image"):
        sample.generate(params, opened, CFG, height=64, width=32)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_the_grammar_leaves_only_well_formed_images(rows, columns, seed):
    h, w, generator = 4 * rows, 4 * columns, torch.Generator().manual_seed(seed)
    tokens = [1, IDS.start, IDS.size0 + rows, IDS.size0 + columns]
    while tokens[-1] != IDS.end and len(tokens) < 1000:
        scores = torch.randn(1, CFG.vocab, generator=generator) * 100
        tokens += sample.draw(
            sample.constrain(scores, tokens, IDS), 1.0, torch.rand(1, generator=generator, dtype=torch.float64)
        ).tolist()
    assert len(tokens) == 1 + image_length(h, w)
    assert len(image_codes(tokens[1:], IDS)) == h


def test_top_k_keeps_ties_and_every_row_its_own():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 5.0, 5.0, 5.0, -1.0]])
    inf = math.inf
    assert sample.keep_top_k(scores, 2).tolist() == [[3, -inf, 2, 2, -inf], [-inf, 5, 5, 5, -inf]]
    assert sample.keep_top_k(scores, 5) is scores
    assert sample.keep_top_k(scores, 1).isfinite().sum(-1).tolist() == [1, 3]


def test_min_p_judges_the_prompted_scores():
    cond = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    scores = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    assert sample.drop_unlikely(scores, cond, 0.31).tolist() == [[0, 1, -math.inf, -math.inf]]
    assert sample.drop_unlikely(scores, cond, 0.0) is scores


def test_draws_follow_the_softmax():
    scores = torch.tensor([[1.0, 0.0, -math.inf, 2.0]])
    for temperature in (0.5, 1.0, 2.0):
        uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        drawn = sample.draw(scores.expand(4000, -1), temperature, uniform)
        share = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(share, (scores[0] / temperature).softmax(-1), atol=5e-4, rtol=0)


def test_no_draw_falls_on_an_impossible_id():
    scores = torch.tensor([[-math.inf, 0.0, 0.1, -math.inf], [-math.inf, 3.0, -math.inf, -math.inf]])
    last = torch.tensor([1 - 2**-53] * 2, dtype=torch.float64)
    assert sample.draw(scores, 1.0, last).tolist() == [2, 1]
    assert sample.draw(scores, 1.0, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 1]
    assert sample.draw(scores, 1e-300, last).tolist() == [2, 1]
    assert sample.draw(scores, 0, last).tolist() == [2, 1]


def test_pictures_have_their_own_random_numbers():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1), (0, 1, 11), (-1, 0, 0)]
    numbers = [tuple(sample.uniforms(*key, 3).tolist()) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert sample.uniforms(5, 6, 7, 8)[:3].tolist() == sample.uniforms(5, 6, 7, 3).tolist()


def test_ticks_count_the_codes(params):
    heard = []
    sample.generate_many(params, PROMPTS, CFG, Sampling(32, 32), pace=Pace(2, tick=heard.append))
    assert sum(heard) == 3 * 16
    assert set(heard) == {2, 1}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"height": 40}, "height 40"),
        ({"width": 0}, "width 0"),
        ({"height": -32}, "height -32"),
        ({"width": 1024}, "longer than the model's context of 128"),
        ({"prompt_ids": [1] * 107}, "longer than the model's context of 128"),
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [1, 46]}, "prompt id 46"),
        ({"prompt_ids": [1, -1]}, "prompt id -1"),
        ({"prompt_ids": [1, IDS.start, 7]}, "ends in an image"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"guidance": math.inf}, "guidance inf"),
        ({"guidance": -1.0}, "guidance -1"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": -5}, "top_k -5"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"min_p": 1.0}, "min_p 1.0"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"cfg": ModelConfig(vocab=46)}, "no image ids"),
        ({"cfg": ModelConfig(vocab=43, ids=IDS)}, "image id 43"),
        ({"cfg": ModelConfig(vocab=46, ids=IDS, masked_ids=(1, 20, 21))}, "mask_image_logits"),
    ],
    ids=str,
)
def test_what_cannot_be_sampled_is_said(params, changed, said):
    call = {"prompt_ids": PROMPTS[0], "cfg": CFG, "height": 32, "width": 32} | changed
    with pytest.raises(InputError, match=said) as error:
        sample.generate(params, **call)
    assert "\n" not in str(error.value)


def test_the_longest_prompt_that_fits_is_drawn(params):
    room = CFG.max_positions - image_length(4, 4)
    assert sample.generate(params, [1] * room, CFG, height=32, width=32).shape == (4, 4)


def test_a_broken_model_is_an_error(params):
    broken = params._replace(embed=params.embed * math.nan)
    with pytest.raises(InputError, match="not finite"):
        sample.generate(broken, PROMPTS[0], CFG, height=32, width=32)
