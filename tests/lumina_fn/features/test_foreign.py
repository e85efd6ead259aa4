"""Features that others extracted give back exactly what was extracted; what does not fit is quarantined with the reason."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments import migrate
from lumina_fn import data
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from tests.support.extracted_features import TOKENIZER, write_alpha, write_mindspeed
from tests.support.folders import TOKENIZER as MODEL


def converted(source: Path, out: Path) -> tuple[data.FeatureSet, list[dict]]:
    migrate.main([str(source), "--out", str(out), "--model", str(MODEL), "--size", "256"])
    return data.FeatureSet(out), [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


SIZES = st.lists(st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([4, 8])), min_size=1, max_size=4)


@hypothesis_settings(max_examples=10, deadline=None)
@given(SIZES, st.sampled_from([write_mindspeed, write_alpha]))
def test_a_set_gives_back_what_was_extracted(tmp_path_factory, sizes, write):
    tmp_path = tmp_path_factory.mktemp("features")
    made = write(tmp_path / "theirs", sizes)
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert list(found) == made
    assert quarantined == []
    assert found.origin == shards.Origin(256, 0, TOKENIZER.ids, TOKENIZER.fingerprint, "")
    manifest = [json.loads(line) for line in (tmp_path / "ours/manifest.jsonl").read_text().splitlines()]
    assert [line["row"] for line in manifest] == list(range(len(sizes)))
    assert {line["status"] for line in manifest} == {"done"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_current_protocol_are_read(tmp_path, protocol):
    made = write_alpha(tmp_path / "theirs", [(4, 8)], protocol)
    assert list(converted(tmp_path / "theirs", tmp_path / "ours")[0]) == made


def test_parts_of_a_record_are_read_in_the_order_of_their_ranks(tmp_path):
    made = write_alpha(tmp_path / "theirs", [(4, 4)] * 12)
    records = json.loads((tmp_path / "theirs/record.json").read_text())
    (tmp_path / "theirs/record.json").unlink()
    for i, record in enumerate(records):
        (tmp_path / f"theirs/{i}-of-12-record.jsonl").write_text(json.dumps(record) + "\n")
    assert list(converted(tmp_path / "theirs", tmp_path / "ours")[0]) == made


def test_duplicates_are_kept_once_and_overwritten_files_are_told(tmp_path, capsys):
    made = write_mindspeed(tmp_path / "theirs", [(4, 4), (8, 4)])
    index = tmp_path / "theirs/data.jsonl"
    first, second = index.read_text().splitlines()
    other = json.dumps({**json.loads(first), "len": 999})  # another picture with the first one's base name
    index.write_text("\n".join([other, first, second, first, second, '{"file": "fea']) + "\n")
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert list(found) == made
    assert [line["row"] for line in quarantined] == [0, 3, 4, 5]
    reasons = [line["reason"] for line in quarantined]
    assert "overwritten" in reasons[0]
    assert "same record as row 1" in reasons[1]
    assert "same record as row 2" in reasons[2]
    assert "not JSON" in reasons[3]
    assert "2 features, 2 quarantined, 2 duplicates" in capsys.readouterr().out
    manifest = [json.loads(line)["row"] for line in (tmp_path / "ours/manifest.jsonl").read_text().splitlines()]
    assert manifest == list(range(6))


def spoilt(ids, labels):
    """Items that are none, by what is wrong with them."""
    start = ids.index(TOKENIZER.ids.start)
    put = lambda values, i, value: [*values[:i], value, *values[i:][1:]]
    yield "tokens and", ids, labels[:-1]
    yield "with its caption dropped", ids[start:], ids[start:]
    yield "labels are not", ids, put(labels, 0, ids[0])
    yield "labels are not", ids, put(labels, start + 5, -100)
    yield "token 4", put(ids, start + 4, ids[0]), put(labels, start + 4, ids[0])
    yield "no image", put(ids, start + 1, ids[start + 1] + 1), put(labels, start + 1, ids[start + 1] + 1)
    yield "(bos)", put(ids, 0, ids[1]), labels
    yield "whole number", put(ids, 1, 2**40), labels
    yield "whole number", put(ids, 1, True), labels
    yield "whole number", put(ids, 1, "5"), labels
    yield "no lists", "abc", labels
    yield "no lists", [], []


def test_an_item_that_does_not_fit_is_quarantined_with_the_reason(tmp_path):
    made = write_alpha(tmp_path / "theirs", [(4, 4)] * 13)
    cases = list(spoilt(*made[0]))
    for i, (_, ids, labels) in enumerate(cases):
        path = tmp_path / f"theirs/files/{i}.pkl"
        path.write_bytes(pickle.dumps({"token": ids, "label": labels, "id": i}))
    records = [{k: v for k, v in r.items() if k != "len"} for r in json.loads((tmp_path / "theirs/record.json").read_text())]  # fmt: skip
    (tmp_path / "theirs/record.json").write_text(json.dumps(records))
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert list(found) == made[12:]
    for (word, *_), line in zip(cases, quarantined, strict=True):
        assert word in line["reason"] or "NEWTRUE" in line["reason"]


def test_no_file_outside_of_the_named_folder_is_read(tmp_path):
    write_alpha(tmp_path / "theirs", [(4, 4)] * 2)
    write_alpha(tmp_path / "secret", [(4, 4)] * 2)
    link = tmp_path / "theirs/files/link.pkl"
    link.symlink_to(tmp_path / "secret/files/0.pkl")
    inner = ["files/link.pkl", "../secret/files/1.pkl", str(tmp_path / "secret/files/1.pkl"), "files/../../secret/files/1.pkl", "\0", "files", "/dev/zero"]  # fmt: skip
    records = json.loads((tmp_path / "theirs/record.json").read_text())
    records[0]["file"] = str(tmp_path / "theirs/files/0.pkl")
    (tmp_path / "theirs/record.json").write_text(json.dumps([records[0], *({"file": f} for f in inner)]))
    found, quarantined = converted(tmp_path / "theirs", tmp_path / "ours")
    assert len(found) == 1
    assert [line["row"] for line in quarantined] == list(range(1, 8))
    (tmp_path / "theirs/record.json").unlink()
    (tmp_path / "theirs/record.json").symlink_to(tmp_path / "secret/record.json")
    with pytest.raises(InputError, match="outside"):
        converted(tmp_path / "theirs", tmp_path / "again")
