"""The embedded default: its pictures, their grader, its splits and its shipped assets."""

import json
import random
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from experiments import finetune, pretokenize, sample
from experiments.demo import grader, muon, pretrain, progress, report, shapes, splits, tasks, tokenizer, train_vq
from lumina_fn import checkpoint, data, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.process.flags import parse
from lumina_fn.vocab import IGNORE

EVERY = list(chain.from_iterable(shapes.specs(shape) for shape in shapes.SHAPES))
SOME = random.Random(1).sample(EVERY, 120)


def test_captions():
    assert (
        shapes.caption(shapes.Spec("star", "orange", "black", "at the top left"))
        == "an orange star at the top left on a black background"
    )
    assert (
        shapes.caption(shapes.Spec("cross", "red", "mint", "in the middle"))
        == "a red cross in the middle on a mint background"
    )
    assert len({shapes.caption(s) for s in EVERY}) == len(EVERY) == 360 * 6


def test_translations_are_whole_cells():
    for shape in shapes.SHAPES:
        corner = shapes.draw(shapes.Spec(shape, "red", "white", "at the top left"))
        assert np.array_equal(
            corner, np.roll(shapes.draw(shapes.Spec(shape, "red", "white", "at the bottom")), (-32, -16), (0, 1))
        )


@pytest.mark.slow
def test_grader_reads_every_clean_picture():
    assert [grader.read(shapes.draw(s)) for s in EVERY] == EVERY


def test_grader_reads_blurred_and_noisy_pictures():
    """About what the tokenizer does to a picture: 28 dB of noise and a slight blur."""
    noise = np.random.default_rng(0)
    for spec in SOME:
        picture = shapes.draw(spec).astype(float)
        blurred = 0.7 * picture + 0.15 * (np.roll(picture, 1, 0) + np.roll(picture, 1, 1))
        assert grader.grade((blurred + noise.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8), spec)


def altered(spec, rng):
    """The spec with one of its four parts changed."""
    field, values = rng.choice([("shape", shapes.SHAPES), ("colour", shapes.COLOURS), ("background", shapes.BACKGROUNDS), ("position", shapes.POSITIONS)])  # fmt: skip
    return spec._replace(**{field: rng.choice([v for v in values if v != getattr(spec, field)])})


def test_grader_refuses_other_pictures():
    rng = random.Random(2)
    assert not any(grader.grade(shapes.draw(altered(s, rng)), s) for s in SOME)


def spoiled(spec, rng):
    """A picture with one 8 x 8 cell of the object's square replaced by a cell of another picture that differs in 24 pixels or more."""
    picture = shapes.draw(spec)
    while True:
        other = shapes.draw(rng.choice(EVERY))
        x, y = (c - 16 + 8 * rng.randrange(4) for c in shapes.POSITIONS[spec.position])
        u, v = (8 * rng.randrange(8) for _ in range(2))
        cell = other[v : v + 8, u : u + 8]
        if (np.abs(picture[y : y + 8, x : x + 8].astype(int) - cell).max(-1) > 80).sum() >= 24:
            picture[y : y + 8, x : x + 8] = cell
            return picture


def test_grader_accepts_at_most_one_spoiled_picture_in_a_hundred():
    rng = random.Random(3)
    accepted = sum(grader.grade(spoiled(s, rng), s) for s in EVERY[::4])
    assert accepted <= len(EVERY[::4]) / 100


def test_grader_refuses_noise_flat_pictures_and_two_objects():
    rng = np.random.default_rng(0)
    assert grader.read(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) is None
    assert grader.read(np.full((64, 64, 3), 245, np.uint8)) is None
    two = np.minimum(
        *(shapes.draw(shapes.Spec("circle", "red", "white", p)) for p in ("at the top left", "at the bottom right"))
    )
    assert grader.read(two) is None


def test_splits_do_not_overlap():
    parts = [splits.old_reported(), splits.settings(), splits.pretraining(), splits.new_reported(), splits.shuffled(shapes.NEW)[: splits.NEW_TRAINING]]  # fmt: skip
    assert [len(p) for p in parts] == [200, 60, 1540, 200, 160]
    assert sorted(chain.from_iterable(parts)) == sorted(EVERY)
    tuned = set(splits.fine_tuning())
    assert not tuned & {*splits.old_reported(), *splits.settings(), *splits.new_reported()}


def test_pretraining_has_neither_word_nor_picture_of_the_new_shape():
    seen = splits.pretraining()
    assert not any(shapes.NEW in shapes.caption(s) for s in seen)
    assert shapes.NEW not in {grader.read(shapes.draw(s)).shape for s in random.Random(0).sample(seen, 200)}
    new = {shapes.draw(s).tobytes() for s in shapes.specs(shapes.NEW)}
    assert not new & {shapes.draw(s).tobytes() for s in seen}


def test_tokenizer_spells_a_word_it_never_saw():
    text, ids = tokenizer.build(7)
    words = lambda caption: text.encode(caption, add_special_tokens=False).ids
    known, new = (shapes.caption(shapes.Spec(shape, "red", "white", "at the top")) for shape in ("heart", shapes.NEW))
    assert len(words(known)) == 10  # one a word
    assert len(words(new)) > 10
    assert text.decode(words(new)) == new
    assert not any(shapes.NEW in word for word in text.get_vocab())
    assert ids.code0 == text.get_vocab_size()


def test_shipped_vq_redraws_pictures_that_the_grader_reads():
    params, cfg = checkpoint.load_vq(tasks.VQ)
    chosen = SOME[:24]
    codes = pretrain.codes_of(chosen, params, cfg)
    drawn = vq.pixels(vq.decode(params, codes, cfg)).numpy()
    assert [grader.read(p) for p in drawn] == chosen


TINY = VQConfig(channels=8, multipliers=(1, 1, 1, 1), res_blocks=1, attn_levels=(3,), codes=6, groups=2)
RUN = train_vq.Settings(steps=6, batch=2, codes=6, quantize_from=2, seed=5)


def test_training_the_vq_resumes_exactly(tmp_path):
    def walk(state, steps):
        for _ in range(steps):
            state, _ = train_vq.step(state, SOME, RUN, TINY)
        return state

    whole = walk(train_vq.start(RUN, TINY), 6)
    progress.store(tmp_path / "state", walk(train_vq.start(RUN, TINY), 4), 1.5)
    halfway, seconds = progress.restore(tmp_path / "state", train_vq.start(RUN, TINY))
    assert seconds == 1.5
    pairs = zip(tree_leaves(walk(halfway, 2)), tree_leaves(whole), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_compact_merges_near_codes_and_drops_unused_ones():
    book = torch.tensor([[0.0, 0], [0.05, 0], [1, 0], [2, 0]])
    params = vq.init(replace(TINY, embed=2, codes=4))._replace(codebook=book)
    kept = train_vq.compact(params, torch.tensor([[[0, 1, 1, 3]]]), 0.1).codebook
    assert kept.tolist() == [[pytest.approx(0.05), 0], [2, 0]]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_muon_steps_are_nearly_orthogonal(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    turned = muon.orthogonal(g)
    assert torch.linalg.svdvals(turned).sub(1).abs().max() < 0.4
    assert (u.T @ turned @ v.T).diagonal().min() > 0.6


@pytest.fixture
def toy_items(tmp_path):
    text, ids = tokenizer.build(4)
    tokenizer.save(tmp_path, text)
    (tmp_path / "config.json").write_text(json.dumps({"ids": ids.__dict__}))
    tokens = prompt.load_tokenizer(tmp_path)
    item = lambda n, w: data.training_item(
        tokens, "a red heart" + " on a mint background" * n, [[n] * 8] * 8, with_size=w
    )
    return [[item(n, w) for w in (True, False)] for n in range(4)], ids


def test_pretraining_visits_every_picture_once_an_epoch(toy_items):
    items, ids = toy_items
    run = pretrain.Settings(steps=4, batch=2)
    found = list(pretrain.batches(items, ids, run))
    seen = [
        sorted(int(row[row >= ids.code0][0]) - ids.code0 for b in found[i : i + 2] for row in b.tokens) for i in (0, 2)
    ]
    assert seen == [[0, 1, 2, 3]] * 2
    again = list(pretrain.batches(items, ids, run))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))
    for b in found:
        learned = b.labels != IGNORE
        assert torch.equal(b.tokens[learned], b.labels[learned])


def test_prepare_writes_the_folder_a_user_would_bring(tmp_path):
    rows = json.loads(tasks.prepare(tmp_path / "data", SOME[:3]).read_text())
    assert [r["prompt"] for r in rows] == [shapes.caption(s) for s in SOME[:3]]
    pictures = [np.asarray(Image.open(tmp_path / "data" / r["file"])) for r in rows]
    assert [grader.read(p) for p in pictures] == SOME[:3]


def test_wilson():
    assert report.wilson(160, 200) == pytest.approx(0.7391, abs=1e-4)
    assert report.wilson(0, 50) == pytest.approx(0, abs=1e-12)


def test_report_draws(tmp_path):
    picture = Image.fromarray(shapes.draw(SOME[0]))
    shown = [report.Shown(shapes.caption(SOME[0]), picture, False, picture, True)] * 5
    report.sheet(tmp_path / "sheet.png", "title", [picture] * 40, shown, ["one", "two"])
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert all((page == colour).all(-1).any() for colour in (report.GREEN, report.RED))
    (tmp_path / "metrics").write_text('{"step": 1, "ce": 2.0}\n{"step": 2, "ce": 1.0}\n')
    report.loss_curve(tmp_path / "loss.png", tmp_path / "metrics")
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.width > 100


def test_the_commands_take_the_demos_arguments(tmp_path):
    run = parse(finetune.Settings, "", tasks.finetune_flags(tmp_path))
    assert (run.model, run.features, run.out) == (tmp_path / "lm", (tmp_path / "features",), tmp_path / "finetune")
    assert parse(pretokenize.Settings, "", tasks.pretokenize_arguments(tmp_path / "data.json", tmp_path)).size == 64
    drawn = parse(sample.Settings, "", tasks.sample_arguments(run.model, tmp_path / "prompts", tmp_path / "out"))
    assert (drawn.width, drawn.height, drawn.seed) == (64, 64, 0)


def test_shipped_assets_are_small_and_belong_together():
    files = [p for p in tasks.ASSETS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    params, cfg = checkpoint.load_model(tasks.LM, dtype=torch.bfloat16)
    _, vq_cfg = checkpoint.load_vq(tasks.VQ)
    text, ids = tokenizer.build(vq_cfg.codes)
    assert cfg == pretrain.config(ids)
    assert json.loads((tasks.LM / "tokenizer.json").read_text()) == json.loads(text.to_str())
    assert sum(leaf.numel() for leaf in tree_leaves(params)) < 3.5e6


def test_shipped_model_draws_what_it_knows():
    params, cfg = checkpoint.load_model(tasks.LM)
    vq_params, vq_cfg = checkpoint.load_vq(tasks.VQ)
    tokens = prompt.load_tokenizer(tasks.LM)
    chosen = splits.settings()[::6]
    share = pretrain.accuracy(params, cfg, tokens, vq_params, vq_cfg, chosen, guidance=1.0, temperature=0.5, min_p=0.05)
    assert share >= 0.8
