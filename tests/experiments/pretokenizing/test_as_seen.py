"""`pretokenize --pictures`: what is seen becomes features, and what was done to it is counted; as-stored is what it was before."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import dataset, pretokenize
from lumina_fn import as_seen, data
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from tests.support import colour_profiles
from tests.support.paths import ROOT

MODEL, VQ = ROOT / "experiments/demo/assets/lm", ROOT / "experiments/demo/assets/vq"
NOTES = [["turned"], ["scaled"], ["converted"], ["profile ignored"], ["flat"], ["small"], None]


@pytest.fixture
def rows(tmp_path):
    """One picture of each note, a plain one, and one in which nothing is visible."""
    folder = tmp_path / "data"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(noise)
    image.save(folder / "0.png", exif=exif)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "1.png")
    image.save(folder / "2.png", icc_profile=colour_profiles.rgb(colour_profiles.ADOBE, 2.2))
    image.save(folder / "3.png", icc_profile=b"no profile")
    Image.new("RGB", (64, 64), (9, 90, 200)).save(folder / "4.png")
    image.resize((15, 15)).save(folder / "5.png")
    image.save(folder / "6.png")
    image.putalpha(0)
    image.save(folder / "7.png")
    (folder / "data.json").write_text(json.dumps([{"file": f"{i}.png", "prompt": f"picture {i}"} for i in range(8)]))
    return folder / "data.json"


def run(rows, out, *flags):
    argv = [rows, out, "--model", MODEL, "--vq", VQ, "--size", 64, "--device", "cpu", *flags]
    pretokenize.main([str(word) for word in argv])
    return data.FeatureSet(out)


def test_what_was_done_is_in_the_manifest_the_summary_and_the_report(tmp_path, rows, capsys):
    features = run(rows, tmp_path / "out")
    said = capsys.readouterr().out
    assert "7 done, 1 quarantined" in said
    for note in as_seen.NOTES[:6]:
        assert f"1 {as_seen.SAID[note]}" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / shards.MANIFEST).read_text().splitlines()]
    assert [line.get("notes") for line in lines[:7]] == NOTES
    assert lines[7]["reason"] == "nothing is visible in it: all of it is transparent"
    assert features.origin.pictures == "as-seen"
    for source in (tmp_path / "out", rows):
        report = tmp_path / f"{source.name}-report.json"
        assert dataset.main(["report", str(source), "--size", "64", "--json", str(report)]) == 0
        found = json.loads(report.read_text())["notes"]
        assert {name: [r["row"] for r in of] for name, of in found.items()} == {
            names[0]: [row] for row, names in enumerate(NOTES) if names
        }
        assert as_seen.SAID["turned"] in capsys.readouterr().out
    verify = ["verify", str(tmp_path / "out"), "--data", str(rows), "--vq", str(VQ), "--device", "cpu"]
    assert dataset.main(verify) == 0


def test_a_portrait_stays_a_portrait_unless_it_is_read_as_stored(tmp_path, rows):
    seen, stored = run(rows, tmp_path / "seen"), run(rows, tmp_path / "stored", "--pictures", "as-stored")
    assert seen.feature(0).codes.shape == (16, 4)
    assert stored.feature(0).codes.shape == (4, 16)
    assert len(stored) == 8
    for row in (3, 4, 5, 6):  # nothing but a note
        assert (seen.feature(row).codes == stored.feature(row).codes).all()
    verify = ["verify", str(tmp_path / "stored"), "--data", str(rows), "--vq", str(VQ), "--device", "cpu"]
    assert dataset.main(verify) == 0


def test_the_two_do_not_mix(tmp_path, rows):
    run(rows, tmp_path / "out", "--pictures", "as-stored")
    # A set of an earlier version does not say how pictures were read: it is continued as stored.
    assert "pictures" not in json.loads((tmp_path / "out" / "origin.json").read_text())
    with pytest.raises(InputError, match="pictures was as-stored, is as-seen"):
        run(rows, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    run(rows, tmp_path / "out", "--pictures", "as-stored")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_keys_encodings_roots_and_names_of_other_machines(tmp_path, rows, capsys):
    """One list with all of them; what was found under another name is counted, and verify reads it in the same way."""
    folder = rows.parent
    (tmp_path / "more").mkdir()
    (folder / "6.png").rename(tmp_path / "more" / "MORE.png")
    listed = [
        {"bild": "6.PNG", "titel": "gone"},
        {"bild": ".\\3.PNG", "titel": "it\u2019s"},
        {"bild": "more.png", "titel": "x"},
    ]
    data_json = folder / "other.jsonl"
    data_json.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in listed).encode("cp1252"))
    how = ["--file-key", "bild", "--prompt-key", "titel", "--encoding", "cp1252"]
    how += ["--image-root", str(tmp_path / "more"), "--image-root", str(folder)]
    features = run(data_json, tmp_path / "out", *how)
    said = capsys.readouterr().out
    assert "2 done, 1 quarantined" in said
    assert f"2 {as_seen.SAID['renamed']}" in said
    assert [features.feature(i).row for i in range(2)] == [1, 2]
    verify = ["verify", str(tmp_path / "out"), "--data", str(data_json), "--vq", str(VQ), "--model", str(MODEL)]
    assert dataset.main([*verify, "--device", "cpu", *how]) == 0
    assert dataset.main(["report", str(data_json), "--size", "64", *how]) == 0
    assert "3 rows, 2 usable, 1 quarantined" in capsys.readouterr().out


def test_a_reason_that_most_rows_share_is_said_first(tmp_path, rows, capsys):
    listed = json.loads(rows.read_text())
    away = [{"file": f"elsewhere/{i}.png", "prompt": "x"} for i in range(9)]
    rows.write_text(json.dumps(listed + away))
    run(rows, tmp_path / "out")
    understood, first, *_ = capsys.readouterr().out.splitlines()
    assert understood == "read as JSON list: 17 rows, captions from `prompt`"
    assert first.startswith(f"9 of 17 rows were left out for one reason: no such file under {rows.parent}")
    rows.write_text(json.dumps(listed))
    run(rows, tmp_path / "out2")
    assert "for one reason" not in capsys.readouterr().out
