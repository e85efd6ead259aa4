"""Looking at datasets: what a report counts, that strangers' text stays text, that duplicates are found, and that verify notices."""

import hashlib
import json
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import dataset as command
from experiments import pretokenize
from experiments.datasets import duplicates, statistics
from experiments.datasets.duplicates import Fingerprint, fingerprint, near
from experiments.demo import shapes
from lumina_fn import checkpoint, data, prompt
from lumina_fn.features import shards
from lumina_fn.process import entry
from tests.support.project_copy import ROOT

MODEL, VQ = ROOT / "experiments/demo/assets/lm", ROOT / "experiments/demo/assets/vq"
EVIL = "<script>alert('&amp;')</script>\x1b[31m\u202e"


def noise(size, seed):
    """A picture whose hash no other seed's comes near."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def make_set(folder):
    """Eight rows that can be used and six that cannot: row 5 is row 0's file again, row 6 is row 1's picture again."""
    (folder / "images").mkdir(parents=True)
    sizes = [(64, 64), (128, 128), (150, 50), (40, 100), (64, 64)]
    pictures = [noise(size, seed) for seed, size in enumerate(sizes)]
    rows = []
    for i, picture in enumerate(pictures):
        picture.save(folder / f"images/{i}.png")
        rows.append({"file": f"images/{i}.png", "prompt": f"noise number {i}"})
    (folder / "images/5.png").write_bytes((folder / "images/0.png").read_bytes())
    pictures[1].resize((200, 200)).save(folder / "images/6.jpg", quality=85)
    Image.fromarray(shapes.draw(shapes.specs("circle")[0])).save(folder / "images/7.png")
    (folder / "images/8.png").write_bytes((folder / "images/2.png").read_bytes()[:200])
    rows += [{"file": "images/5.png", "prompt": "noise number 0"}, {"file": "images/6.jpg", "prompt": EVIL}]
    rows += [{"file": "images/7.png", "prompt": "a circle"}, {"file": "images/8.png", "prompt": "cut off"}]
    rows += [{"file": f"{EVIL}.png", "prompt": "x"}, {"file": "gone.png", "prompt": "x"}]
    rows += [{"file": "../../../etc/hosts", "prompt": "x"}, {"file": "images/0.png", "prompt": " \n"}, "no row"]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """DATA.json and the features made from it."""
    folder = tmp_path_factory.mktemp("made")
    path = make_set(folder / "set")
    argv = [path, folder / "features", "--model", MODEL, "--vq", VQ, "--size", 64, "--device", "cpu"]
    pretokenize.main([str(word) for word in argv])
    return path, folder / "features"


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["dataset", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            entry.run(command.main)
        return ended.value.code, *capsys.readouterr()

    return call


def report(call, tmp_path, *argv):
    code, _, err = call("report", *argv, "--json", tmp_path / "report.json")
    assert (code, err) == (0, "")
    return json.loads((tmp_path / "report.json").read_text())


def quarantine(features):
    return [json.loads(line) for line in (features / "quarantine.jsonl").read_text().splitlines()]


def test_rows_are_judged_as_pretokenize_judges_them(call, tmp_path, made):
    path, features = made
    rows = report(call, tmp_path, path, "--model", MODEL, "--size", 64)
    done = report(call, tmp_path, features, "--overwrite")
    assert rows["counts"] == done["counts"] == {"rows": 14, "done": 8, "quarantined": 6}
    assert rows["quarantine"] == done["quarantine"]
    assert rows["quarantine"]["rows"] == quarantine(features)
    assert rows["tokens"] == done["tokens"]
    assert rows["tokens"]["item"]["total"] == sum(data.FeatureSet(features).lengths())
    assert rows["sizes"]["crop"] == done["sizes"]["crop"]
    assert rows["pictures"]["exact"] == done["pictures"]["exact"] == [[0, 5]]
    assert rows["prompts"]["duplicates"] == [{"prompt": "noise number 0", "rows": [0, 5]}]
    assert rows["prompts"]["empty"] == 1
    assert rows["pictures"]["near"] == [[1, 6]]
    reasons = {"no such file": 2, "cannot be read": 1, "the path leads outside": 1, "no prompt": 1, "not a row": 1}
    assert rows["quarantine"]["reasons"] == reasons


def test_without_a_tokenizer_pictures_are_judged_all_the_same(call, tmp_path, made):
    path, features = made
    found = report(call, tmp_path, path, "--size", 64)
    assert found["tokens"] == {"item": None, "text": None}
    assert found["quarantine"]["rows"] == quarantine(features)
    assert found["pictures"]["near"] == [[1, 6]]


@pytest.mark.parametrize("flags", [("data",), ("vq",), ("data", "vq")], ids=" ".join)
def test_features_show_what_they_can(call, tmp_path, made, flags):
    """Near-duplicates are looked for in the sources where they are, else in what the VQ decodes."""
    path, features = made
    places = {"data": path, "vq": VQ}
    given = [word for flag in flags for word in (f"--{flag}", places[flag])]
    found = report(call, tmp_path, features, *given, "--out", tmp_path / "out", "--samples", 5)
    assert found["pictures"]["looked_at"] == 8
    assert [1, 6] in found["pictures"]["near"]
    assert len(found["samples"]) == 5
    assert found["prompts"]["known"] == (13 if "data" in flags else 0)
    page = (tmp_path / "out/report.html").read_text()
    shown = 5 + sum(len(group) for group in found["pictures"]["exact"] + found["pictures"]["near"])
    assert page.count("<img ") == len(flags) * shown


def test_a_changed_source_is_not_shown(call, tmp_path):
    path = make_set(tmp_path / "set")
    pretokenize.main([str(w) for w in (path, tmp_path / "f", "--model", MODEL, "--vq", VQ, "--size", 64)])
    noise((64, 64), 99).save(path.parent / "images/4.png")
    assert report(call, tmp_path, tmp_path / "f", "--data", path)["pictures"]["looked_at"] == 7


def test_the_page_loads_and_runs_nothing(call, tmp_path, made):
    path, _ = made
    code, out, _ = call("report", path, "--size", 64, "--out", tmp_path / "out", "--samples", 99)
    assert code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.txt",
        "report.json",
        "report.html",
        ".lumina.json",
    }
    assert out == (tmp_path / "out/report.txt").read_text()
    assert "\x1b" not in out
    page = (tmp_path / "out/report.html").read_text()
    assert "&lt;script&gt;alert(&#x27;&amp;amp;&#x27;)" in page
    assert not re.search(r"<script|<link|<iframe|://|url\(|\x1b|\u202e", page)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'(?:src|href)="([^"]*)', page))
    assert "default-src 'none'" in page


def test_hostile_rows_are_only_rows(call, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    noise((64, 64), 0).save(tmp_path / "fine.png")
    files = ["pipe.png", "\ud800.png", "a\0b", "/dev/zero", "x" * 5000, tmp_path.name, "."]
    rows = [{"file": file, "prompt": "x"} for file in files] + [None, 5, [], {}, {"file": {}, "prompt": []}]
    rows += [{"file": "fine.png", "prompt": "half \ud800 of a pair"}, {"file": "fine.png", "prompt": "long " * 10**4}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    for flags in ((), ("--model", MODEL)):
        found = report(
            call, tmp_path, tmp_path / "data.json", "--size", 64, "--out", tmp_path / "out", "--overwrite", *flags
        )
        assert found["counts"] == {"rows": 14, "done": 1 if flags else 2, "quarantined": 13 if flags else 12}
        assert len((tmp_path / "out/report.html").read_text()) < 100_000


def test_samples_follow_the_seed(call, tmp_path, made):
    path, _ = made
    drawn = [
        [s["row"] for s in report(call, tmp_path, path, "--size", 64, "--samples", 4, "--seed", seed, "--overwrite")["samples"]]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_hash_of_a_copy_is_near_and_of_another_picture_far():
    bits = lambda a, b: (a.hash ^ b.hash).bit_count()
    pictures = [noise((200, 160), seed) for seed in range(20)]
    prints = [fingerprint(p) for p in pictures]
    assert all(bits(fingerprint(p.resize((120, 96))), f) <= 3 for p, f in zip(pictures, prints, strict=True))
    assert min(bits(a, b) for i, a in enumerate(prints) for b in prints[:i]) > 8


def test_other_colours_are_no_duplicates():
    specs = [shapes.Spec("circle", colour, "white", "in the middle") for colour in ("red", "blue")]
    prints = [fingerprint(Image.fromarray(shapes.draw(spec))) for spec in specs]
    assert (prints[0].hash ^ prints[1].hash).bit_count() <= 3
    assert near(prints, 3) == []


@pytest.mark.parametrize("distance", [0, 1, 3, 7])
def test_banding_finds_what_comparing_all_pairs_finds(distance):
    rng = np.random.default_rng(distance)
    hashes = [int(h) for h in rng.integers(0, 2**63, 40)]
    for parent in range(120):  # families of hashes a few bits apart
        flips = rng.choice(64, rng.integers(0, 10), replace=False)
        hashes.append(hashes[parent] ^ sum(1 << int(bit) for bit in flips))
    colours = [bytes([40 * int(c)]) * 48 for c in rng.integers(0, 2, len(hashes))]
    prints = [Fingerprint(h, c) for h, c in zip(hashes, colours, strict=True)]
    joined = {i: {i} for i in range(len(prints))}
    for i, a in enumerate(prints):
        for j, b in enumerate(prints[:i]):
            if (a.hash ^ b.hash).bit_count() <= distance and a.colours == b.colours:
                both = joined[i] | joined[j]
                joined |= dict.fromkeys(both, both)
    expected = {tuple(sorted(group)) for group in joined.values() if len(group) > 1}
    assert {tuple(group) for group in near(prints, distance)} == expected
    assert expected


def test_nothing_is_the_same_as_nothing():
    assert duplicates.same([None, 1, None, 2, 1]) == [[1, 4]]
    assert near([], 3) == []


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("no such file under /a/b", "no such file"),
        ("the picture has 9x99999999 pixels, more than 89478485: a decompression bomb?", "decompression bomb"),
        ("a picture of mode I;16: what", "a picture of mode I"),
        ("a picture of 9x70000 is too long and thin to be cut to 32x128", "a picture of NxN is too long and thin to be cut to NxN"),
        ("no prompt: expected some text, found ''", "no prompt"),
    ],
)  # fmt: skip
def test_reasons_of_a_kind_have_one_name(reason, expected):
    assert statistics.reason_class(reason) == expected


def test_verify_finds_the_same(call, made):
    path, features = made
    code, out, err = call("verify", features, "--data", path, "--vq", VQ, "--model", MODEL)
    assert (code, err) == (0, "")
    assert out.startswith("8 of 8 rows are the same (100.0%)")


def test_verify_names_what_changed(call, tmp_path):
    """A source that changed, one that is gone, a caption that changed, and codes that another hand wrote."""
    path = make_set(tmp_path / "set")
    features = tmp_path / "features"
    pretokenize.main([str(w) for w in (path, features, "--model", MODEL, "--vq", VQ, "--size", 64)])
    noise((64, 64), 99).save(path.parent / "images/0.png")
    (path.parent / "images/2.png").unlink()
    rows = json.loads(path.read_text())
    rows[3]["prompt"] = "another"
    path.write_text(json.dumps(rows))
    shard = next(features.glob("features-0*.safetensors"))
    content = bytearray(shard.read_bytes())
    entry = json.loads((features / "manifest.jsonl").read_text().splitlines()[4])
    begin = data_begin(content, "codes") + 2 * entry["offset"]
    content[begin] ^= 1
    shard.write_bytes(content)
    code, out, _ = call("verify", features, "--data", path, "--vq", VQ)
    assert (code, out.splitlines()[2].startswith(f"{shard}: it is damaged (its checksum")) == (1, True)
    index = json.loads((features / "features.json").read_text())
    index["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (features / "features.json").write_text(json.dumps(index))
    code, out, _ = call("verify", features, "--data", path, "--vq", VQ, "--model", MODEL)
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("row 0 (images/0.png): the source changed")
    assert lines[1].startswith("row 2 (images/2.png): the source cannot be read now: no such file")
    assert lines[2] == "row 3 (images/3.png): the caption is not the one that was encoded"
    assert lines[3] == "row 4 (images/4.png): 1 of 64 codes differ"
    assert lines[4].startswith("4 of 8 rows are the same (50.0%)")
    assert call("verify", features, "--data", path, "--vq", VQ, "--allow", 0.02)[1].count("codes differ") == 0


def data_begin(content, name):
    """Where a tensor of a safetensors file starts."""
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


def test_another_vq_is_refused(call, tmp_path, made):
    path, features = made
    params, cfg = checkpoint.load_vq(VQ)
    other = params._replace(codebook=params.codebook + torch.finfo(torch.float32).eps)
    checkpoint.save_vq(tmp_path / "vq", other, cfg)
    for argv in (("verify", features, "--data", path), ("report", features)):
        code, _, err = call(*argv, "--vq", tmp_path / "vq")
        assert code == 2
        assert "fingerprint" in err


@pytest.fixture
def taken_over(tmp_path):
    """A set that tells neither its VQ nor its files, as experiments.migrate writes it; the second item's codes are no VQ's."""
    tokenizer = prompt.load_tokenizer(MODEL)
    codes = np.zeros((8, 8), np.uint16)
    features = [shards.Feature(0, [1, 2], codes), shards.Feature(1, [1, 2, 3], codes + 9999)]
    folder = tmp_path / "taken_over"
    folder.mkdir()
    ids = replace(tokenizer.ids, codes=16_384)
    shards.write_features(folder, features, shards.Origin(64, 0, ids, tokenizer.fingerprint, ""))
    lines = [{"row": i, "file": f"{i}.pt", "status": "done", "sha256": bytes(32).hex()} for i in range(2)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_what_a_set_does_not_tell_is_not_guessed(call, tmp_path, taken_over):
    found = report(call, tmp_path, taken_over, "--vq", VQ, "--out", tmp_path / "out")
    assert found["pictures"] == {"looked_at": 1, "distance": 3, "exact": [], "near": []}
    assert found["sizes"]["source"] is None
    assert (tmp_path / "out/report.html").read_text().count("<img ") == 1
    (tmp_path / "data.json").write_text(json.dumps([{"file": "a.png", "prompt": "a"}] * 2))
    code, out, _ = call("verify", taken_over, "--data", tmp_path / "data.json", "--vq", VQ)
    assert (code, out.splitlines()[0]) == (1, "row 0 (0.pt): the row names a.png now")


def test_an_empty_set(call, tmp_path, taken_over):
    shards.write_features(taken_over, [], data.FeatureSet(taken_over).origin)
    (taken_over / "manifest.jsonl").write_text("")
    assert report(call, tmp_path, taken_over, "--vq", VQ)["counts"] == {"rows": 0, "done": 0, "quarantined": 0}
    code, _, err = call("verify", taken_over, "--data", tmp_path / "data.json", "--vq", VQ)
    assert (code, "empty" in err) == (2, True)


MISTAKES = {
    "another command": ("look", "{features}"),
    "nothing there": ("report", "{tmp}/gone.json"),
    "no feature set": ("report", "{tmp}"),
    "vq of rows": ("report", "{data}", "--vq", VQ),
    "model of features": ("report", "{features}", "--model", MODEL),
    "a size": ("report", "{data}", "--size", 65),
    "a distance": ("report", "{data}", "--distance", 60),
    "out exists": ("report", "{data}", "--out", "{features}"),
    "out holds an input": ("report", "{data}", "--out", "{tmp}/..", "--overwrite"),
    "json exists": ("report", "{data}", "--json", "{data}"),
    "none to verify": ("verify", "{features}", "--data", "{data}", "--vq", VQ, "--n", 0),
    "an image root": ("verify", "{features}", "--data", "{data}", "--vq", VQ, "--image-root", "{tmp}/gone"),
    "no vq": ("verify", "{features}", "--data", "{data}", "--vq", MODEL),
}


@pytest.mark.parametrize("argv", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(call, tmp_path, made, argv):
    places = {"data": made[0], "features": made[1], "tmp": tmp_path}
    code, out, err = call(*(str(word).format(**places) for word in argv))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"row": 0}', '{"row": -1, "file": "a", "status": "done", "sha256": ""}', "\x00"]
)
def test_a_manifest_that_is_no_manifest(call, tmp_path, made, damage):
    features = tmp_path / "features"
    features.mkdir()
    for file in made[1].iterdir():
        (features / file.name).write_bytes(file.read_bytes())
    (features / "manifest.jsonl").write_text(damage)
    code, _, err = call("report", features)
    assert code == 2
    assert "manifest.jsonl" in err


def test_without_a_command_the_usage_is_shown(call):
    code, out, err = call()
    assert (code, out) == (2, "")
    assert "verify FEATURES" in err


def test_help_is_there(call):
    assert "verify FEATURES" in call("--help")[1]
