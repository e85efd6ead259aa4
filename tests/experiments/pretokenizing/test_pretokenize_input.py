"""What `pretokenize` reads: every form of JSON, bad rows, which are quarantined, and bad calls, which end at once."""

import json
import os
import shutil

import pytest
from PIL import Image

from lumina_fn import checkpoint, data, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.disk import lookup
from tests.support.pretokenizing import GOLDENS, TOKENIZER, calling, drawing, quarantine, row, small_vq_folder  # noqa: F401


@pytest.mark.parametrize(
    "text",
    [
        '[{"file": "x.png", "prompt": "a, ]"}, {"file": "x.png", "prompt": "b"}]',
        '[\n  {\n "file": "x.png",\n "prompt": "a, ]",\n },\n {"file": "x.png", "prompt": "b",},\n]\n',
        '{"file": "x.png", "prompt": "a, ]"}\n\n{"file": "x.png", "prompt": "b"}\n',
        '{"file": "x.png", "prompt": "a, ]",},\r\n{"file": "x.png", "prompt": "b"},',
        '\ufeff[{"file": "x.png", "prompt": "a, ]"}, {"file": "x.png", "prompt": "b"}]',
    ],
)
def test_json_jsonl_and_trailing_commas(tmp_path, call, picture, text):
    picture("x.png")
    assert call(None, text=text) == (0, [])
    assert quarantine(tmp_path / "out") == []
    texts = [data.FeatureSet(tmp_path / "out").feature(i).text for i in range(2)]
    for got, caption in zip(texts, ("a, ]", "b"), strict=True):
        assert got in [prompt.prompt_ids(TOKENIZER, caption, 64, 64, w) for w in (True, False)]


def bad_rows(root):
    """Value of a bad row -> what its reason must say."""
    (root / "set").mkdir(exist_ok=True)
    (root / "outside").mkdir()
    shutil.copy(GOLDENS / "tokens" / "e2e_0.png", root / "outside" / "x.png")
    (root / "set" / "link.png").symlink_to(root / "outside" / "x.png")
    (root / "set" / "loop.png").symlink_to(root / "set" / "loop.png")
    (root / "set" / "empty.png").write_bytes(b"")
    (root / "set" / "text.png").write_text("no picture")
    (root / "set" / "short.png").write_bytes((GOLDENS / "tokens" / "e2e_0.png").read_bytes()[:2000])
    (root / "set" / "bomb.pbm").write_bytes(b"P4 30000 30000\n")
    (root / "set" / "flat.pgm").write_bytes(b"P5 0 7 255\n")
    os.mkfifo(root / "set" / "pipe.png")
    Image.new("L", (1, 700_000)).save(root / "set" / "sliver.png")
    return [
        (row("nothing.png"), "no such file"),
        (row("link.png"), "outside"),
        (row("loop.png"), "no such file"),
        (row("../outside/x.png"), "outside"),
        (row(root / "outside" / "x.png"), "outside"),
        (row("/etc/passwd"), "outside"),
        (row("images/../../outside/x.png"), "outside"),
        (row("empty.png"), "zero size"),
        (row("flat.pgm"), "not a picture"),
        (row("text.png"), "not a picture"),
        (row("short.png"), "cannot be read"),
        (row("bomb.pbm"), "bomb"),
        (row("sliver.png"), "long and thin"),
        (row("pipe.png"), "not a regular file"),
        (row("."), "not a regular file"),
        (row("bad\0name.png"), "path"),
        (row("n" * 5000), "not a usable path"),
        (row("\ud800.png"), "not a usable path"),
        ({"file": "good.png"}, "no prompt"),
        (row("good.png", ""), "no prompt"),
        (row("good.png", " \n"), "no prompt"),
        (row("good.png", None), "no prompt"),
        (row("good.png", 7), "no prompt"),
        (row("good.png", "a <eoss> cat"), "<eoss>"),
        (row("good.png", "<reserved08706>"), "<reserved08706>"),
        (row("good.png", "x <|im_end|>"), "control token"),
        (row("good.png", "\ud83d"), "Unicode"),
        ({"prompt": "a cat"}, "no file"),
        ({"file": 3, "prompt": "a cat"}, "no file"),
        ("good.png", "found str"),
        (None, "found NoneType"),
        ([], "found list"),
    ]


def test_bad_rows_are_quarantined_and_the_run_goes_on(tmp_path, call, picture):
    picture("good.png")
    bad = bad_rows(tmp_path)
    rows = [row("good.png", "first"), *(value for value, _ in bad), row("good.png", "last")]
    assert call(rows) == (0, [])
    listed = quarantine(tmp_path / "out")
    assert [entry["row"] for entry in listed] == list(range(1, len(bad) + 1))
    for entry, (value, reason) in zip(listed, bad, strict=True):
        assert set(entry) == {"row", "file", "reason"}
        assert reason in entry["reason"]
        assert entry["file"] == (
            value["file"] if isinstance(value, dict) and isinstance(value.get("file"), str) else None
        )
    items = data.FeatureSet(tmp_path / "out")
    assert [items.feature(i).row for i in range(len(items))] == [0, len(rows) - 1]


def test_a_bad_line_of_jsonl_is_a_bad_row(tmp_path, call, picture):
    picture("x.png")
    good = json.dumps(row("x.png"))
    assert call(None, text=f'{good}\n{{"file": "x.p\n{good}\n')[0] == 0
    assert [(e["row"], "not JSON" in e["reason"]) for e in quarantine(tmp_path / "out")] == [(1, True)]


def test_roots(tmp_path, call, picture):
    inside = picture("images/x.png", seed=1)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(picture("y.png", seed=2), other / "y.png")
    (tmp_path / "set" / "y.png").unlink()
    (tmp_path / "set" / "linked").symlink_to(other)
    rows = [row("images/x.png"), row(inside), row("y.png"), row(other / "y.png"), row("linked/y.png")]
    assert call(rows, "--image-root", other) == (0, [])
    assert quarantine(tmp_path / "out") == []
    assert call(rows, out=tmp_path / "without")[0] == 0
    assert [entry["row"] for entry in quarantine(tmp_path / "without")] == [2, 3, 4]


def test_the_dataset_s_folder_comes_before_the_image_root(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").touch()
    assert lookup.find("x", [tmp_path / "a", tmp_path / "b"]) == tmp_path / "a" / "x"


def test_no_usable_row_exits_2_and_leaves_the_reasons(tmp_path, call):
    code, lines = call([row("no\x1b[31m.png"), row("[red]y.png")])
    assert code == 2
    assert len(lines) == 1
    assert "none of 2 rows" in lines[0]
    assert "no such file" in lines[0]
    assert "\x1b" not in lines[0]
    assert [entry["row"] for entry in quarantine(tmp_path / "out")] == [0, 1]
    assert len(data.FeatureSet(tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "empty"),
        ("", "empty"),
        ("[{]", "JSON"),
        ("3", "list"),
        ("[" * 100_000, "JSON"),
        ('[{"file": "a.png", "prompt": "x"},\n ......\n]', "line 2"),
        ('"\\ud800"', "list"),
    ],
)
def test_a_dataset_that_is_none_exits_2(tmp_path, call, text, says):
    code, lines = call(None, text=text)
    assert (code, len(lines)) == (2, 1)
    assert says in lines[0]
    assert "data.json" in lines[0]
    assert not (tmp_path / "out").exists()


def test_bad_calls_exit_2(tmp_path, call, picture, small_vq):
    picture("x.png")
    rows = [row("x.png")]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "something").touch()
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    bad = [
        ({"size": 100}, (), "multiple of 32"),
        ({"size": 0}, (), "multiple of 32"),
        ({"size": 32 * 65}, (), "size token"),
        ({"size": "big"}, (), "invalid int"),
        ({"model": tmp_path / "nowhere"}, (), "nowhere"),
        ({"model": small_vq}, (), "tokenizer.json"),
        ({"vq": tmp_path / "nowhere"}, (), "nowhere"),
        ({"vq": tmp_path / "broken.ckpt"}, (), "broken.ckpt"),
        ({"out": tmp_path / "there"}, (), "no feature set (it holds something)"),
        ({}, ("--batch", 0), "--batch"),
        ({}, ("--seed", -1), "--seed"),
        ({}, ("--shard", 0), "--shard"),
        ({}, ("--workers", 0), "--workers"),
        ({}, ("--image-root", tmp_path / "nowhere"), "--image-root"),
        ({}, ("--device", "toaster"), "toaster"),
        ({}, ("--color", "blue"), "--color"),
    ]
    for changes, flags, says in bad:
        code, lines = call(rows, *flags, **changes)
        assert (code, len(lines)) == (2, 1), (changes, flags, lines)
        assert says in lines[0]
        assert not (tmp_path / "out").exists()


def test_a_missing_dataset_exits_2(tmp_path, call):
    for make in (lambda path: None, os.mkfifo):
        (tmp_path / "set").mkdir(exist_ok=True)
        make(tmp_path / "set" / "data.json")
        code, lines = call(None)
        assert (code, len(lines)) == (2, 1)
        assert "file" in lines[0]


def test_a_vq_that_does_not_fit_the_model_exits_2(tmp_path, call, picture):
    picture("x.png")
    cfg = VQConfig(channels=8, multipliers=(1, 1, 1), res_blocks=1, attn_levels=(2,), codes=64, groups=4)
    checkpoint.save_vq(tmp_path / "vq", vq.init(cfg, seed=0), cfg)
    code, lines = call([row("x.png")], vq=tmp_path / "vq")
    assert (code, len(lines)) == (2, 1)
    assert "64 codes of 4 pixels" in lines[0]
