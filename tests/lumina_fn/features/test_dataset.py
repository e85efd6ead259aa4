"""Rows as other tools and machines write them: read by their meaning, or refused one by one with the reason."""

import codecs
import json

import pytest

from lumina_fn.errors import InputError
from lumina_fn.features import dataset
from lumina_fn.features.dataset import Keys, NotJson, Row


@pytest.mark.parametrize("file_key", dataset.FILE_KEYS)
@pytest.mark.parametrize("prompt_key", dataset.PROMPT_KEYS)
def test_keys_of_other_tools_are_known(file_key, prompt_key):
    assert dataset.row({"id": 1, file_key: "x.png", prompt_key: "a cat"}) == Row("x.png", "a cat")


def test_of_several_keys_the_guide_s_come_first_unless_one_is_named():
    value = {"text": "t", "caption": "c", "prompt": "p", "image": "i", "file": "f"}
    assert dataset.row(value) == Row("f", "p")
    assert dataset.row(value, Keys("image", "text")) == Row("i", "t")
    assert dataset.row({"bild": "f", "titel": "p"}, Keys("bild", "titel")) == Row("f", "p")


def test_a_row_without_them_says_which_keys_it_has():
    with pytest.raises(InputError, match=r"no file: expected a key file, image.*; the row has 'img', 'prompt'"):
        dataset.row({"img": "x", "prompt": "p"})
    with pytest.raises(InputError, match="no prompt: expected a key titel; the row has 'file'"):
        dataset.row({"file": "x"}, Keys(prompt="titel"))
    with pytest.raises(InputError, match="the row has none"):
        dataset.row({})


ROWS = [{"file": "1.png", "prompt": "das Männchen"}, {"file": "2.png", "prompt": "猫"}]


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with mark"])
def test_text_of_other_machines_is_read(tmp_path, encoding, lines):
    text = (
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        if lines
        else json.dumps(ROWS, ensure_ascii=False)
    )
    data = codecs.BOM_UTF16_BE + text.encode("utf-16-be") if "mark" in encoding else text.encode(encoding)
    (tmp_path / "data.json").write_bytes(data)
    assert dataset.read_rows(tmp_path / "data.json") == ROWS


@pytest.mark.parametrize("lines", [True, False])
def test_one_row_in_another_encoding_costs_that_row_alone(tmp_path, lines):
    quoted = [{"file": "1.png", "prompt": "it\u2019s"}, {"file": "2.png", "prompt": "it is"}]
    text = (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in quoted)
        if lines
        else json.dumps(quoted, ensure_ascii=False)
    )
    (tmp_path / "data.json").write_bytes(text.encode("cp1252"))
    bad, good = dataset.read_rows(tmp_path / "data.json")
    assert isinstance(bad, NotJson)
    assert "byte 0x92" in bad.reason
    assert "--encoding cp1252" in bad.reason
    assert good == quoted[1]
    assert dataset.read_rows(tmp_path / "data.json", "cp1252") == quoted


def test_half_a_surrogate_that_json_writes_is_a_name_and_no_damage(tmp_path):
    rows = [{"file": "\udc92.png", "prompt": "a cat"}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert dataset.read_rows(tmp_path / "data.json") == rows


def test_an_encoding_that_is_none_is_one_line(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    with pytest.raises(InputError, match="not klingon: unknown encoding"):
        dataset.read_rows(tmp_path / "data.json", "klingon")
    (tmp_path / "data.json").write_bytes(codecs.BOM_UTF16_LE + b"[\x00\x00\xd8")
    with pytest.raises(InputError, match="not utf-16-le"):
        dataset.read_rows(tmp_path / "data.json")
