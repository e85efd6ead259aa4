"""One dataset in every form that people have it in: the same codes, checked and reported in the same way."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import dataset, pretokenize
from experiments.pretokenizing import folder
from lumina_fn import data
from lumina_fn.errors import InputError
from tests.support import archives
from tests.support.paths import ROOT
from tests.support.pretokenizing import MODEL, small_vq_folder  # noqa: F401

N = 5
CAPTIONS = [f"picture {i}" for i in range(N)]


def as_json(at, name="data.json"):
    rows = [{"file": f"{i:05d}.png", "prompt": caption} for i, caption in enumerate(CAPTIONS)]
    (at / name).write_text(json.dumps(rows) if name.endswith("n") else "\n".join(map(json.dumps, rows)))
    pictures(at)
    return at / name


def pictures(at):
    for i in range(N):
        (at / f"{i:05d}.png").write_bytes(archives.drawn(i))


def as_csv(at, name="data.csv"):
    with (at / name).open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{i:05d}.png", c) for i, c in enumerate(CAPTIONS))])
    pictures(at)
    return at / name


def as_captions(at):
    pictures(at)
    for i, caption in enumerate(CAPTIONS):
        (at / f"{i:05d}.txt").write_text(caption)
    return at


FORMS = {
    "JSON": as_json,
    "JSONL": lambda at: as_json(at, "data.jsonl"),
    "CSV": as_csv,
    "imagefolder": lambda at: as_csv(at, "metadata.csv").parent,
    "captions": as_captions,
    "tars": lambda at: (
        (archives.tar(at / "0.tar", archives.samples(3)), archives.tar(at / "1.tar", archives.samples(2, 3))) and at
    ),
    "Parquet": lambda at: archives.parquet(at / "0.parquet", archives.hub_columns(N)) and at / "*.parquet",
}


@pytest.fixture(name="pretokenized")
def running(tmp_path, small_vq):
    def run(source, *flags, out="out"):
        words = [source, tmp_path / out, "--model", MODEL, "--vq", small_vq, "--size", 32, "--device", "cpu", *flags]
        pretokenize.main([str(word) for word in words])
        return data.FeatureSet(tmp_path / out)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_codes_and_is_verified_and_reported(tmp_path, pretokenized, small_vq, capsys, form):
    (tmp_path / "set").mkdir()
    source = FORMS[form](tmp_path / "set")
    made = pretokenized(source)
    (tmp_path / "list").mkdir(exist_ok=True)
    plain = pretokenized(as_json(tmp_path / "list"), out="plain")
    assert len(made) == N
    assert all(np.array_equal(made.feature(i).codes, plain.feature(i).codes) for i in range(N))
    assert [made.feature(i).sha256 for i in range(N)] == [plain.feature(i).sha256 for i in range(N)]
    capsys.readouterr()
    words = [tmp_path / "out", "--data", source, "--vq", small_vq, "--device", "cpu"]
    assert dataset.main([str(word) for word in ("verify", *words, "--model", MODEL)]) == 0
    assert "5 of 5 rows are the same" in capsys.readouterr().out
    assert dataset.main([str(word) for word in ("report", source, "--size", 32, "--model", MODEL)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("read as ")
    assert "5 rows, 5 usable" in said
    assert dataset.main([str(word) for word in ("report", *words, "--out", tmp_path / "report")]) == 0
    assert (tmp_path / "report/report.html").read_text().count("data:image/") >= N


def test_of_several_captions_all_are_rows_and_are_verified(tmp_path, pretokenized, small_vq, capsys):
    pictures(tmp_path)
    rows = [{"image": f"{i:05d}.png", "caption": [f"{k} of {i}" for k in range(1 + i % 3)]} for i in range(N)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(pretokenized(tmp_path / "data.jsonl", "--captions", "all")) == 1 + 2 + 3 + 1 + 2
    words = [
        tmp_path / "out",
        "--data",
        tmp_path / "data.jsonl",
        "--vq",
        small_vq,
        "--model",
        MODEL,
        "--captions",
        "all",
    ]
    assert dataset.main([str(word) for word in ("verify", *words, "--device", "cpu")]) == 0
    first = pretokenized(tmp_path / "data.jsonl", out="first")
    drawn = [
        pretokenized(tmp_path / "data.jsonl", "--captions", "random", "--seed", seed, out=f"seed{seed}")
        for seed in (0, 1, 2)
    ]
    texts = [[made.feature(i).text for i in range(N)] for made in (first, *drawn)]
    assert all(len(text) == N for text in texts)
    assert len({json.dumps(text) for text in texts}) > 1


def test_a_complete_set_is_recognised_by_its_list_alone(tmp_path, pretokenized, monkeypatch, capsys):
    source = as_json(tmp_path)
    rows = json.loads(source.read_text())
    source.write_text(json.dumps([*rows, {"file": "none.png", "prompt": "x"}]))
    pretokenized(source)
    whole = capsys.readouterr().out.splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "plan", lambda *args: pytest.fail("the rows were read again"))
        pretokenized(source)
        assert capsys.readouterr().out.splitlines() == [whole[1].partition("; ")[0], *whole[2:]]
        for changed in ("--seed", "1"), ("--shard", "7"), ("--file-key", "file"), ("--captions", "all"):
            with pytest.raises(BaseException, match="were read again"):
                pretokenized(source, *changed)
    source.write_text(json.dumps(rows))
    assert len(pretokenized(source)) == N
    assert "5 done, 0 quarantined" in capsys.readouterr().out


def test_a_list_that_changes_while_it_is_encoded_is_not_taken_for_the_one_that_was(tmp_path, pretokenized, monkeypatch):
    source, begin = as_json(tmp_path), folder.begin
    rows = source.read_text()

    def changing(*args, **flags):
        source.write_text(rows + " ")
        return begin(*args, **flags)

    monkeypatch.setattr(folder, "begin", changing)
    pretokenized(source)
    assert "made_from" not in json.loads((tmp_path / "out/features.json").read_text())


def test_no_row_that_can_be_used_is_said_again_of_a_complete_set(tmp_path, pretokenized):
    (tmp_path / "data.json").write_text(json.dumps([{"file": "none.png", "prompt": "x"}]))
    for _ in range(2):
        with pytest.raises(InputError, match="none of 1 rows could be used; row 0"):
            pretokenized(tmp_path / "data.json")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to mount a folder for reading alone")
def test_a_dataset_on_a_mount_that_cannot_be_written_works(tmp_path, small_vq):
    (tmp_path / "set").mkdir()
    source = as_captions(tmp_path / "set")
    mounted = f"mount --bind {source} {source} && mount -o remount,ro,bind {source}"
    words = [source, tmp_path / "out", "--model", MODEL, "--vq", small_vq, "--size", 32, "--device", "cpu"]
    command = " ".join(map(str, [sys.executable, "-m", "experiments.pretokenize", *words]))
    tried = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mounted} && ! touch {source}/x 2>&1"], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"this machine mounts nothing: {tried.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mounted} && {command}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 done, 0 quarantined" in done.stdout
