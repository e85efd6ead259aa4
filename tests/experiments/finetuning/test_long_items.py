"""Items longer than the context: what is cut, left out or refused is said with its rows, and stays so when a run continues."""

import numpy as np
import pytest

from experiments.finetuning import resuming
from lumina_fn import checkpoint, data, prompt
from lumina_fn.features import batches, shards
from lumina_fn.features.batches import Batching
from lumina_fn.features.mixing import Mixture
from lumina_fn.vocab import IGNORE
from tests.support.resumed_runs import finetune, numbers
from tests.support.small_run import CODES, write_inputs

LIMIT = 160  # positions of the small model
# Items by text and codes: 50 tokens; 218; 163, of which the end alone is cut; text that leaves no room, and room for one token.
FITS, CUT, END, BARE, ONE = (5, 8, 4), (5, 16, 12), (2, 12, 12), (LIMIT, 4, 4), (LIMIT - 1, 4, 4)
SETS = {"mixed": (FITS, CUT, FITS, END, BARE, FITS, ONE, CUT), "fit": (FITS, FITS, FITS), "long": (CUT, CUT)}


@pytest.fixture(scope="module", name="made")
def made_sets(tmp_path_factory):
    """A folder with a model and these sets; a shape's items are the same in each set."""
    folder = tmp_path_factory.mktemp("long")
    write_inputs(folder)
    ids = checkpoint.read_config(folder / "lm").ids
    known = prompt.load_tokenizer(folder / "tokenizer")
    for name, shapes in SETS.items():
        rng = {shape: np.random.default_rng(shape) for shape in set(shapes)}
        made = [
            shards.Feature(10 + i, rng[s].integers(300, 400, s[0]).tolist(), rng[s].integers(0, CODES, s[1:]))
            for i, s in enumerate(shapes)
        ]
        (folder / name).mkdir()
        shards.write_features(folder / name, made, shards.Origin(64, 0, ids, known.fingerprint, "vq"))
    return folder


@pytest.fixture(name="run")
def calling(made, tmp_path):
    """The command on one of the sets: what it prints."""

    def run(name, *flags, out="run", code=0):
        of = ["--model", made / "lm", "--features", made / name, "--device", "cpu", "--dtype", "float64", "--compile", "off"]  # fmt: skip
        return finetune(of, tmp_path / out, "--caption-drop", 0, *flags, code=code)

    return run


def losses(out):
    return [(row["loss"], row["tokens"]) for row in numbers(out)]


def test_what_is_cut_and_what_is_left_out_is_said_with_its_rows(made, run, tmp_path):
    said = run("mixed", "--steps", 3)
    of = f"of {made / 'mixed'}"
    rows = f"row 11 {of} (218 tokens), row 13 {of} (163 tokens), row 16 {of} (184 tokens) and 1 more"
    assert f"note: 4 of 8 items ({rows}) with more tokens than the 160 that" in said
    assert "are cut to them, 3 of them lose codes" in said
    assert f"note: left out 1 of 8 items (row 14 {of} (185 tokens)) whose text alone takes the 160 tokens" in said
    items = [item for i, item in enumerate(data.FeatureSet(made / "mixed")) if i != 4]
    labels = sum(label != IGNORE for _, of in items for label in of[:LIMIT])
    assert sum(tokens for _, tokens in losses(tmp_path / "run")) == labels  # an epoch of seven items, in steps of three


def test_what_is_skipped_might_never_have_been_there(run, tmp_path):
    assert "--long skip leaves out 5 of 8 items (row 11" in run("mixed", "--steps", 4, "--long", "skip")
    assert "note" not in run("fit", "--steps", 4, out="fit")
    assert losses(tmp_path / "run") == losses(tmp_path / "fit")


def test_long_items_are_an_error_where_they_are_not_wanted(run, tmp_path):
    said = run("mixed", "--steps", 3, "--long", "error", code=2)
    assert "error: --long error: 5 of 8 items (row 11" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    run("fit", "--steps", 1, "--long", "error")


def test_nothing_may_be_left(run):
    assert "--long skip leaves out all 2" in run("long", "--steps", 1, "--long", "skip", code=2)


@pytest.mark.parametrize("pack", [50, 90, 160])
def test_rows_grow_with_what_is_cut(run, tmp_path, pack):
    """--pack may be shorter than items that are cut to the context anyway; losses are those of one item a row."""
    run("mixed", "--steps", 6, "--pack", pack, "--micro-batch", 2)
    run("mixed", "--steps", 6, out="plain")
    packed, plain = ([x for pair in losses(tmp_path / out) for x in pair] for out in ("run", "plain"))
    assert packed == pytest.approx(plain, abs=1e-12)


def test_rows_stay_short_in_steps_without_such_items(made):
    mixture = Mixture((data.FeatureSet(made / "mixed"),))
    how = Batching(1, 1, LIMIT, 0, 0.0, "partial", pack=60)
    widths = [share.batch.tokens.shape[-1] for share in batches.training_batches(mixture, range(8), how)]
    assert sorted(widths) == [60] * 3 + [LIMIT] * 5


def test_a_set_of_a_mixture_that_gives_nothing_is_named(made, run):
    said = run("fit=1", "--features", f"{made / 'long'}=1", "--long", "skip", "--steps", 1, code=2)
    assert f"{made / 'long'} has no item that fits the model" in said


def test_mixtures_visit_what_is_kept(made):
    sets = tuple(data.FeatureSet(made / name) for name in ("mixed", "fit"))
    kept = (np.array([0, 2, 5]), np.array([1]))
    mixture = Mixture(sets, None, kept)
    assert (len(mixture), mixture.steps_per_epoch(3, "partial")) == (4, 2)
    visits = mixture.visits(1, range(4), 0)
    assert {*zip(visits.sets.tolist(), visits.indices.tolist(), strict=True)} == {(0, 0), (0, 2), (0, 5), (1, 1)}
    whole = Mixture(sets, None, tuple(np.arange(len(features)) for features in sets))
    for a, b in zip(whole.visits(2, range(11), 5), Mixture(sets).visits(2, range(11), 5), strict=True):
        assert (a == b).all()


def test_a_continued_run_keeps_its_choice(made, run, tmp_path):
    run("mixed", "--steps", 7, out="straight")
    run("mixed", "--steps", 4, "--save-every", 4)
    assert "--long was cut (1 left out), is skip" in run("mixed", "--steps", 7, "--long", "skip", code=2)
    run("mixed", "--steps", 7)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")


def test_a_run_from_before_the_flag_continues_where_nothing_was_left_out(made, run, tmp_path, monkeypatch):
    """Earlier versions cut, and left out nothing: a run with such an item would go on with other items."""
    real = resuming.identity

    def earlier(*args):
        about = real(*args)
        del about["settings"]["long"]
        return about

    for name in ("mixed", "fit"):
        with monkeypatch.context() as patched:
            patched.setattr(resuming, "identity", earlier)
            run(name, "--steps", 2, out=name)
    assert "going on after step 2" in run("fit", "--steps", 3, out="fit")
    assert "--long was cut, is cut (1 left out)" in run("mixed", "--steps", 3, out="mixed", code=2)
