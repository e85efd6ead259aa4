"""Pictures and captions in, features out: against the reference's tokens, and in whatever number of runs."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.finetuning import run_folder
from lumina_fn import checkpoint, data, errors, prompt, vq
from lumina_fn.vocab import IGNORE, SEP_TEXT
from tests import exactly_once
from tests.exactly_once import contents
from tests.support.pretokenizing import GOLDENS, MODEL, TOKENIZER, calling, drawing, quarantine, row, small_vq_folder  # noqa: F401


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
@pytest.mark.parametrize(("form", "rows", "kills"), [("list", 64, 1), ("tar", 96, 2), ("parquet", 96, 2)])
def test_any_number_of_processes_killed_or_not_makes_the_same_set(tmp_path, form, rows, kills):
    exactly_once.main(rows, kills, tmp_path, form, processes=(1, 3), shard=16)


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
