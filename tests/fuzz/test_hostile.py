"""Files of strangers: what fuzzing found, the kinds of pictures there are, and a sample of `make fuzz`."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.pretokenizing.rows import Recipe, prepare
from lumina_fn import checkpoint, data, images, model, prompt, sources
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.formats import hf_config, plain_pickle, safe_pickle, tensor_files, vq_config
from lumina_fn.rows import lists, opened, row
from lumina_fn.rows.row import How, Item, Row, Unread
from tests.fuzz import feature_formats, formats, law, mutate, pictures, playground, tokenizers_small
from tests.support import folders
from tests.support.project_copy import ROOT

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(mutate.NUMBERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
QUICK = settings(max_examples=200, deadline=None)


@pytest.mark.slow
def test_a_sample_of_every_format_keeps_the_law(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--cases", "200", "--saved", tmp_path], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + len(formats.FORMATS)


LAWLESS = {
    "reads": (lambda at: open(at.outside / "secret.png", "rb"), "reads"),  # noqa: PTH123, SIM115
    "reads a file of the system": (lambda at: Path("/etc/passwd").read_text(), "reads"),
    "writes inside": (lambda at: (at.folder / "new").write_text(""), "writes"),
    "removes": (lambda at: (at.outside / "secret.json").unlink(), "os.remove"),
    "runs a command": (lambda at: subprocess.run(["true"]), "subprocess.Popen"),
    "tells what it may not know": (lambda at: law.CANARY, "canary"),
    "raises": (lambda at: {}["x"], "KeyError"),
    "goes on for ever": (lambda at: next(x for x in iter(int, 1) if x), "s"),
    "takes memory": (lambda at: (b"x" * (law.MEMORY + (200 << 20))) and None, "bytes"),
    "takes all memory": (lambda at: bytearray(1 << 40), "MemoryError"),
}


def lawless() -> None:
    """In a process of its own: what readers do against the law is seen."""
    with tempfile.TemporaryDirectory() as folder:
        at = playground.ground(Path(folder) / "ground")
        law.arm()
        for name, (read, what) in LAWLESS.items():
            try:
                law.judge(lambda read=read: read(at), at.folder, at.outside, InputError)
            except law.Violation as violation:
                print(name if what in str(violation) else f"{name}: {violation}")
            (at.folder / "new").unlink(missing_ok=True)


@pytest.mark.slow
def test_what_breaks_the_law_is_seen():
    done = subprocess.run(
        [sys.executable, "-c", "from tests.fuzz.test_hostile import lawless; lawless()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == list(LAWLESS), done.stderr


@QUICK
@given(JSON)
def test_any_row_is_read_or_refused(value):
    with suppress(InputError):
        for how in (How(), How(captions="random"), How(captions="all")):
            assert all(isinstance(item.row, Row | Unread) for item in row.items(value, how.keys, how))


@QUICK
@given(st.dictionaries(st.sampled_from([*folders.SMALL, "ids", "vocabulary_map", "dropout", "head_dim", "x"]), JSON))
def test_any_config_is_read_or_refused(changes):
    with suppress(InputError):
        hf_config.parse({**folders.SMALL, **changes}, {}, "config.json")


@QUICK
@given(st.binary(max_size=200))
@pytest.mark.parametrize("loads", [safe_pickle.loads, plain_pickle.loads])
def test_any_bytes_are_a_pickle_or_a_value_error(loads, content):
    with suppress(ValueError):
        loads(content)


@QUICK
@given(JSON)
def test_any_header_is_read_or_refused(value):
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(value).encode()
        path = Path(folder) / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with suppress(InputError):
            assert tensor_files.safetensors_header(path) == {}


def test_a_string_that_does_not_end_is_not_searched_again_and_again(tmp_path):
    (tmp_path / "data.json").write_text('["' + '\\"' * 100_000)
    start = time.process_time()
    with pytest.raises(InputError, match="neither JSON nor JSONL"):
        lists.opened(tmp_path / "data.json")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("depth", [lists.DEPTH + 1, 900, 100_000])
def test_brackets_without_end_are_a_bad_row(tmp_path, depth):
    good = '{"file": "a.png", "prompt": "a"}'
    (tmp_path / "data.jsonl").write_text(f'{good}\n{{"file": {"[" * depth}{"]" * depth}}}\n')
    first, second = opened.opened(tmp_path / "data.jsonl").items(range(2), True)
    assert first.row == ("a.png", "a")
    assert isinstance(second.row, Unread)


def test_a_shape_of_a_million_axes_is_not_multiplied(tmp_path):
    header = {"x": {"dtype": "U8", "shape": [9] * 1_000_000, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    start = time.process_time()
    with pytest.raises(InputError, match="damaged safetensors header"):
        tensor_files.safetensors_header(tmp_path / "x.safetensors")
    assert time.process_time() - start < 2


def test_calls_of_a_long_name_do_not_fill_memory():
    program = b"c" + b"m" * (1 << 20) + b"\nf\nq\0" + b"h\0)R0" * 2000 + b"h\0)R."
    assert len(safe_pickle.loads(program).what) < 250
    listed = safe_pickle.loads(b"c" + b"m" * (1 << 20) + b"\nf\nq\0](" + b"h\0)R" * 5000 + b"e.")
    assert sum(len(inert.what) for inert in listed) < 5000 * 250


def test_numbers_beyond_float_are_no_sizes():
    for name in ("rms_norm_eps", "rope_theta"):
        with pytest.raises(InputError, match="expected a positive number"):
            hf_config.parse({**folders.SMALL, name: 10**400}, {}, "config.json")


def test_a_vocabulary_that_is_a_list_is_told(tmp_path):
    cfg = ModelConfig(vocab=40, width=8, layers=1, heads=2, kv_heads=1, hidden=8, max_positions=16, masked_ids=(3,))
    checkpoint.save_model(tmp_path / "lm", model.init(cfg), cfg)
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    config["model"]["vocab"] = [40]
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="vocab_size"):
        sources.open_source(tmp_path / "lm")


def test_a_vq_too_large_to_be_described_is_refused():
    sizes = {
        "channels": 1 << 24,
        "multipliers": (1 << 24,),
        "attn_levels": (),
        "res_blocks": 1,
        "latent": 4,
        "embed": 4,
        "codes": 8,
        "groups": 1,
    }
    assert vq_config.problems(sizes) == ["channels times multipliers must not exceed 16777216"]


@pytest.fixture
def small_tokenizer(tmp_path):
    """Writes a tokenizer's folder."""

    def write(spec: dict, names: dict, ids: dict) -> Path:
        for name, value in (("tokenizer.json", spec), ("tokenizer_config.json", names), ("config.json", {"ids": ids})):
            (tmp_path / name).write_text(json.dumps(value))
        return tmp_path

    return write


def test_a_text_that_a_tokenizer_cannot_encode_is_an_input_error(small_tokenizer):
    spec = tokenizers_small.specs()[3]
    del spec["model"]["vocab"]["[UNK]"]
    with pytest.raises(InputError, match="cannot be encoded"):
        prompt.load_tokenizer(small_tokenizer(spec, {"eos_token": "</s>"}, tokenizers_small.IDS))


def test_a_panic_of_the_library_is_an_input_error(small_tokenizer):
    spec = tokenizers_small.specs()[0]
    spec["model"] |= {"continuing_subword_prefix": "#" * 9}
    with pytest.raises(InputError, match="not a tokenizer"):
        prompt.load_tokenizer(small_tokenizer(spec, {"eos_token": "</s>"}, tokenizers_small.IDS))


def test_half_a_character_names_no_token(small_tokenizer):
    folder = small_tokenizer(tokenizers_small.specs()[0], {"eos_token": "\ud800"}, tokenizers_small.IDS)
    with pytest.raises(InputError, match="is not in tokenizer"):
        prompt.load_tokenizer(folder)


def test_ids_for_millions_of_codes_are_not_listed(small_tokenizer):
    ids = {**tokenizers_small.IDS, "codes": 1 << 24}
    with pytest.raises(InputError, match="whole numbers up to"):
        prompt.load_tokenizer(small_tokenizer(tokenizers_small.specs()[0], {"eos_token": "</s>"}, ids))


@pytest.mark.parametrize("what", ["index", "items", "shard", "named items", "named shard", "pipe"])
def test_a_feature_set_reads_nothing_outside_of_its_folder(tmp_path, what):
    at = playground.ground(tmp_path)
    folder = feature_formats.write_feature_sets(at)
    index = json.loads((folder / shards.INDEX).read_text())
    names = {"index": shards.INDEX, "items": index["items"], "shard": index["shards"][0]["file"]}
    data.FeatureSet(folder)
    if what == "pipe":
        (folder / shards.INDEX).unlink()
        os.mkfifo(folder / shards.INDEX)
    elif what in names:
        theirs = at.outside / names[what]
        (folder / names[what]).rename(theirs)
        (folder / names[what]).symlink_to(theirs)
    else:
        key = what.removeprefix("named ")
        (folder / names[key]).rename(at.outside / names[key])
        named = f"../outside/{names[key]}"
        index |= {"items": named} if key == "items" else {"shards": [{**index["shards"][0], "file": named}]}
        (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError):
        data.FeatureSet(folder)


@pytest.fixture
def read_picture(tmp_path, small_tokenizer):
    """What pretokenize makes of a file's bytes at 64 pixels, whatever its name says."""
    known = prompt.load_tokenizer(
        small_tokenizer(tokenizers_small.specs()[0], {"eos_token": "</s>"}, tokenizers_small.IDS)
    )

    def read(content: bytes, name: str = "x.png") -> object:
        (tmp_path / name).write_bytes(content)
        return prepare(0, Item(Row(name, "a picture"), None), Recipe([tmp_path], known, 64, 0))

    return read


@pytest.mark.parametrize("kind", pictures.seeds())
def test_every_kind_of_picture_is_read_whatever_its_name_or_refused(read_picture, kind):
    told = read_picture(pictures.seeds()[kind], "x.jpg")
    if kind in ("EPS", "SVG", "PNG bomb", "PNG wide", "TIFF F", "TIFF I"):
        assert isinstance(told, shards.Rejected)
    else:
        assert told.image.mode == "RGB"
        assert told.image.size in images.crop_sizes(64)


@pytest.mark.parametrize("kind", pictures.seeds())
def test_a_picture_that_ends_early_is_refused_or_has_its_pixels(read_picture, kind):
    content = pictures.seeds()[kind]
    for part in (0, 1, 8, len(content) // 3, len(content) // 2):
        told = read_picture(content[:part])
        assert isinstance(told, shards.Rejected) or told.image.size in images.crop_sizes(64)


def test_exif_turns_a_picture(read_picture):
    upright, turned = (read_picture(pictures.rotated(orientation)) for orientation in (1, 6))
    assert (upright.source, turned.source) == ((40, 33), (33, 40))
    assert turned.image.size == upright.image.size[::-1]


def pixel(told) -> tuple:
    return told.image.getpixel((32, 32))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture_counts(read_picture, form):
    assert pixel(read_picture(pictures.animated(form))) == (255, 0, 0)


def saved(image: Image.Image, form: str) -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_ink_becomes_light(read_picture, form):
    told = pixel(read_picture(saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), form)))
    assert np.abs(np.array(told) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_grey(read_picture, form):
    told = np.asarray(read_picture(pictures.sixteen_bit(form)).image)
    assert told.shape == (64, 64, 3)
    assert (told[..., 0] == told[..., 1]).all()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF"])
def test_what_is_transparent_is_white(read_picture, form):
    image = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    assert "nothing is visible" in read_picture(saved(image, form)).reason
    image.paste((9, 9, 9, 255), (0, 0, 16, 16))
    assert pixel(read_picture(saved(image, form))) == (255, 255, 255)


@pytest.mark.parametrize("road", ["../outside/secret.png", "linked/secret.png", "link.png", "{outside}/secret.png", "a/../../outside/secret.png", "\0", "a" * 5000, "\ud800.png"])  # fmt: skip
def test_no_row_leads_out_of_the_folder(tmp_path, small_tokenizer, road):
    at = playground.ground(tmp_path)
    known = prompt.load_tokenizer(
        small_tokenizer(tokenizers_small.specs()[0], {"eos_token": "</s>"}, tokenizers_small.IDS)
    )
    (at.folder / "a").mkdir()
    (at.folder / "linked").symlink_to(at.outside)
    (at.folder / "link.png").symlink_to(at.outside / "secret.png")
    item = Item(Row(road.format(outside=at.outside), "a secret"), None)
    told = prepare(0, item, Recipe([at.folder], known, 64, 0))
    assert isinstance(told, shards.Rejected)
    assert "outside" in told.reason or "path" in told.reason
