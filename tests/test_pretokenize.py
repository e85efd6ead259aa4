"""Pictures and captions in, features out: against the reference's tokens, and with every kind of bad row and bad call."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import pretokenize, run_folder
from lumina_fn import checkpoint, data, dataset, errors, prompt, vq
from lumina_fn.config import VQConfig
from lumina_fn.vocab import IGNORE, SEP_TEXT
from tests import exactly_once
from tests.exactly_once import contents

GOLDENS = Path(__file__).parent / "goldens"
MODEL = GOLDENS / "tokens" / "toy_tokenizer_bpe"
TOKENIZER = prompt.load_tokenizer(MODEL)
SMALL_VQ = VQConfig(channels=8, multipliers=(1, 1, 1, 1), res_blocks=1, codes=64, groups=4)


@pytest.fixture(scope="session")
def small_vq(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "vq"
    checkpoint.save_vq(folder, vq.init(SMALL_VQ, seed=0), SMALL_VQ)
    return folder


@pytest.fixture
def call(tmp_path, small_vq, monkeypatch, capsys):
    """Run the command in this process: exit code and the lines on stderr."""

    def call(rows, *flags, text=None, out=tmp_path / "out", model=MODEL, vq=small_vq, size=64):
        path = tmp_path / "set" / "data.json"
        path.parent.mkdir(exist_ok=True)
        if rows is not None or text is not None:
            path.write_text(json.dumps(rows) if text is None else text)
        argv = [path, out, "--model", model, "--vq", vq, "--size", size, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["pretokenize", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            errors.run(pretokenize.main)
        return ended.value.code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def picture(tmp_path):
    def picture(name, size=(64, 64), seed=0, mode="RGB"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return picture


def quarantine(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def row(file, prompt="a cat"):
    return {"file": str(file), "prompt": prompt}


def test_the_reference_s_tokens(tmp_path, call):
    about = json.loads((GOLDENS / "tokens" / "e2e_m1_real_like_ch32.json").read_text())
    tensors = load_file(GOLDENS / "tokens" / "e2e_m1_real_like_ch32.safetensors")
    weights = load_file(GOLDENS / "movqgan" / "m1_real_like_ch32.safetensors")
    weights = {key.removeprefix("param."): t for key, t in weights.items() if key.startswith("param.")}
    torch.save({"state_dict": weights}, tmp_path / "movqgan.ckpt")
    rows = [row(case["file"], case["question"]) for case in about["cases"]]
    flags = ("--image-root", GOLDENS / "tokens")
    assert call(rows, *flags, vq=tmp_path / "movqgan.ckpt", size=128) == (0, [])
    items = data.FeatureSet(tmp_path / "out")
    for i, case in enumerate(about["cases"]):
        width, height = case["cropped_wh"]
        codes = tensors[f"{i}.codes"].reshape(height // 8, width // 8)
        clear = (tensors[f"{i}.argmin_margin"] > 1e-4).reshape(codes.shape).numpy()
        assert (items.feature(i).codes == codes.numpy())[clear].all()
        # The golden's question stands bare, without the sentence that says what to do.
        text = [TOKENIZER.bos, *TOKENIZER.encode(case["question"] + SEP_TEXT)]
        ids, labels = data.training_item(TOKENIZER, case["question"], codes, with_size=True)
        start = ids.index(TOKENIZER.ids.start)
        assert text + ids[start:] == tensors[f"{i}.input_ids"].tolist()
        assert [IGNORE] * len(text) + labels[start:] == tensors[f"{i}.labels"].tolist()


def test_items_keep_the_order_of_the_rows_and_equal_names_their_folders(tmp_path, call, picture, small_vq):
    sizes = [(64, 64), (128, 32), (64, 64), (32, 128), (64, 64), (128, 32)]
    names = ["a/1.png", "b/1.png", "c/1.png", "d/1.png", "a/2.png", "b/2.png"]
    paths = [picture(n, s, seed=i) for i, (n, s) in enumerate(zip(names, sizes, strict=True))]
    assert call([row(n, f"cat {n}") for n in names], "--batch", 2) == (0, [])
    items = data.FeatureSet(tmp_path / "out")
    params, cfg = checkpoint.load_vq(small_vq)
    for i, (name, size, path) in enumerate(zip(names, sizes, paths, strict=True)):
        image = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        codes = vq.encode(params, image, cfg)[0]
        feature = items.feature(i)
        assert feature.row == i
        assert (feature.codes == codes.numpy()).mean() > 0.95  # the reference's pixel values differ in the last bit
        variants = [data.training_item(TOKENIZER, f"cat {name}", feature.codes, with_size=w) for w in (True, False)]
        assert items[i] in variants
        assert feature.codes.shape == (size[1] // 8, size[0] // 8)
    assert len({tuple(items[i][0]) for i in range(6)}) == 6
    assert quarantine(tmp_path / "out") == []
    assert items.origin.tokenizer == TOKENIZER.fingerprint
    assert items.origin.vq == data.fingerprint(params)


def test_prompt_variants_depend_on_the_row_and_the_seed_alone(tmp_path, call, picture):
    picture("x.png", (32, 32))
    rows = [row("x.png", f"cat {i}") for i in range(120)]

    def with_size(name, rows, seed):
        assert call(rows, "--seed", seed, "--batch", 64, out=tmp_path / name, size=32)[0] == 0
        return [len(text) for text in (data.FeatureSet(tmp_path / name).feature(i).text for i in range(len(rows)))]

    first = with_size("one", rows, 0)
    assert with_size("reversed", rows[::-1], 0)[::-1] == first
    assert with_size("part", rows[50:60], 0) == first[50:60]
    assert with_size("seed", rows, 1) != first
    texts = [data.FeatureSet(tmp_path / "one").feature(i).text for i in range(120)]
    sized = sum(t == prompt.prompt_ids(TOKENIZER, f"cat {i}", 32, 32) for i, t in enumerate(texts))
    plain = sum(t == prompt.prompt_ids(TOKENIZER, f"cat {i}", 32, 32, False) for i, t in enumerate(texts))
    assert sized + plain == 120
    assert 0.8 < sized / 120 < 0.98


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
    assert dataset.find("x", [tmp_path / "a", tmp_path / "b"]) == tmp_path / "a" / "x"


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


def test_overwrite_never_removes_the_dataset(tmp_path, call, picture):
    picture("x.png")
    code, (line,) = call([row("x.png")], "--overwrite", out=tmp_path / "set")
    assert code == 2
    assert "which this run reads" in line
    assert (tmp_path / "set" / "data.json").exists()


def test_overwrite_replaces(tmp_path, call, picture):
    picture("x.png")
    assert call([row("x.png")] * 2)[0] == 0
    assert call([row("x.png")], "--overwrite")[0] == 0
    assert len(data.FeatureSet(tmp_path / "out")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out", "set"]


def test_the_manifest_says_of_every_row_what_became_of_it(tmp_path, call, picture):
    path = picture("a.png", (70, 64))
    picture("b.png", seed=1)
    assert call([row("a.png"), row("none.png"), row("b.png")], "--shard", 2) == (0, [])
    first, second, third = (json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert first == {
        "row": 0, "file": "a.png", "status": "done", "shard": first["shard"], "offset": 0, "length": 64,
        "crop": {"size": [64, 64], "cover": [70, 64], "corner": [3, 0]}, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert (second["row"], second["status"], second["file"]) == (1, "quarantined", "none.png")
    assert "no such file" in second["reason"]
    assert (third["row"], third["status"], third["offset"], third["crop"]) == (2, "done", 0, None)
    assert third["shard"] != first["shard"]


def test_added_rows_extend_the_set_and_it_is_what_a_new_run_makes(tmp_path, call, picture):
    rows = [row(picture(f"{i}.png", seed=i).name, f"cat {i}") for i in range(7)]
    shard_of = lambda out: {p.name: p.stat().st_mtime_ns for p in out.glob("features-*")}
    assert call(rows[:4], "--shard", 3) == (0, [])
    before = shard_of(tmp_path / "out")
    assert call(rows, "--shard", 3) == (0, [])
    after = shard_of(tmp_path / "out")
    kept = before.keys() & after.keys()
    assert len(kept) == 1  # the full one
    assert all(before[name] == after[name] for name in kept)
    assert call(rows, "--shard", 3, out=tmp_path / "new") == (0, [])
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    assert call(rows, "--shard", 3) == (0, [])
    assert shard_of(tmp_path / "out") == after  # nothing is done again


def test_other_settings_do_not_mix(tmp_path, call, picture):
    rows = [row(picture("x.png").name)]
    assert call(rows) == (0, [])
    before = contents(tmp_path / "out")
    for flags, changes, says in ((("--seed", 1), {}, "seed was 0, is 1"), ((), {"size": 32}, "size was 64, is 32")):
        code, (line,) = call(rows, *flags, **changes)
        assert (code, says in line) == (2, True)
    assert contents(tmp_path / "out") == before


def test_quarantined_rows_are_tried_again_when_asked(tmp_path, call, picture):
    rows = [row("late.png"), row(picture("x.png").name)]
    assert call(rows) == (0, [])
    picture("late.png")
    assert call(rows) == (0, [])
    assert [r["row"] for r in quarantine(tmp_path / "out")] == [0]
    assert call(rows, "--retry") == (0, [])
    assert quarantine(tmp_path / "out") == []
    assert len(data.FeatureSet(tmp_path / "out")) == 2


def test_two_runs_do_not_write_one_set(tmp_path, call, picture):
    rows = [row(picture("x.png").name)]
    with run_folder.locked(tmp_path / "out"):
        code, (line,) = call(rows)
    assert code == 2
    assert f"written by process {os.getpid()}" in line


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_harmed_shard_is_named(tmp_path, call, picture, harm):
    assert call([row(picture("x.png").name)]) == (0, [])
    (path,) = (tmp_path / "out").glob("features-*")
    path.write_bytes(path.read_bytes()[:-3]) if harm == "truncate" else path.unlink()
    with pytest.raises(errors.InputError, match=path.name):
        data.FeatureSet(tmp_path / "out")


@pytest.mark.slow
def test_any_number_of_processes_killed_or_not_makes_the_same_set(tmp_path, monkeypatch):
    exactly_once.main(240, 3, tmp_path, processes=(1, 3), shard=16)


@pytest.mark.slow
def test_as_a_command(tmp_path, picture, small_vq):
    picture("x.png")
    path = tmp_path / "set" / "data.json"
    path.write_text(json.dumps([row("x.png"), row("[bold]none.png")]))
    command = [
        sys.executable,
        "-m",
        "experiments.pretokenize",
        path,
        tmp_path / "out",
        "--model",
        MODEL,
        "--vq",
        small_vq,
        "--size",
        "64",
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 done, 1 quarantined" in result.stdout
