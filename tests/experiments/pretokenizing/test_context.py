"""A size whose pictures no item of the model can hold is refused before the first picture, with the largest that fits."""

import json
import re
import shutil

import pytest

from experiments.pretokenizing import context
from lumina_fn import checkpoint, data, images, prompt
from tests.support.pretokenizing import MODEL, TOKENIZER, calling, drawing, small_vq_folder  # noqa: F401


@pytest.fixture(name="model")
def model_folder(tmp_path):
    """A tokenizer's folder whose config.json says how many tokens the model takes, as a native folder or as Hugging Face's."""

    def model(positions, native=False):
        folder = tmp_path / f"lm{positions}{native}"
        shutil.copytree(MODEL, folder, dirs_exist_ok=True)
        config = {"model": {"max_positions": positions}} if native else {"max_position_embeddings": positions}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return model


@pytest.mark.parametrize("native", [False, True])
def test_a_size_that_is_cut_is_refused_with_one_that_fits(call, picture, model, tmp_path, native):
    shapes = images.crop_sizes(96)
    pictures = [picture(f"{i}.png", shape) for i, shape in enumerate(shapes)]
    rows = [{"file": path.name, "prompt": "a"} for path in pictures]
    tokens = lambda caption: max(
        len(prompt.prompt_ids(TOKENIZER, caption, w, h)) + 5 + h // 8 * (w // 8 + 1) for w, h in shapes
    )
    least, limit = tokens(""), tokens("a")
    code, said = call(rows, model=model(limit, native), size=160)
    assert (code, len(said)) == (2, 1)
    assert re.search(
        rf"--size 160: a picture of 160x160 .* takes {limit}: .* give --size 96, .* captions of up to {limit - least} tokens.* --long cut",
        said[0],
    )
    assert not (tmp_path / "out").exists()
    code, said = call(rows, model=model(least - 1, native), size=160)
    assert "give --size 64" in said[0]
    code, said = call(rows, model=model(limit, native), size=96, out=tmp_path / "fits")
    assert code == 0, said
    assert max(data.FeatureSet(tmp_path / "fits").lengths()) == limit
    code, said = call(rows, "--long", "cut", model=model(20, native), size=96, out=tmp_path / "cut")
    assert code == 0, said
    for path in (tmp_path / "fits").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_where_nothing_fits_no_size_is_named(call, picture, model):
    code, said = call([{"file": picture("a.png").name, "prompt": "a"}], model=model(30), size=64)
    assert code == 2
    assert "give another model, or --long cut" in said[0]


@pytest.mark.parametrize("config", ["{}", '{"max_position_embeddings": "many"}', '{"model": 7}', '{"model": {"max_positions": true}}'])  # fmt: skip
def test_a_config_that_says_nothing_checks_nothing(tmp_path, config):
    assert context.positions(tmp_path) is None
    (tmp_path / "config.json").write_text(config)
    assert context.positions(tmp_path) is None


def test_a_size_fits_where_its_longest_shape_does():
    """A tall picture has more ends of lines than a square of as many codes."""
    square, tall = (context._tokens(TOKENIZER, *shape) for shape in ((128, 128), (64, 256)))
    assert square < tall == context._most(TOKENIZER, 128)
    assert [context.largest(TOKENIZER, limit, 160) for limit in (square, tall - 1, tall)] == [96, 96, 128]


def test_the_search_for_a_size_is_short(model):
    assert context.largest(TOKENIZER, 10_240, images.MAX_TARGET) == max(
        size
        for size in range(32, 1024, 32)
        if size // 32 in TOKENIZER.sizes and context._most(TOKENIZER, size) <= 10_240
    )


def test_the_demo_s_model_takes_the_demo_s_pictures():
    from experiments.demo import shapes, tasks

    assert context.positions(tasks.LM) == checkpoint.read_config(tasks.LM).max_positions
    context.check(tasks.LM, prompt.load_tokenizer(tasks.LM), shapes.SIZE)
