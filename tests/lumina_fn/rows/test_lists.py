"""Lists of rows as other tools and machines write them: read by their meaning, or refused one by one with the reason."""

import codecs
import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_fn.errors import InputError
from lumina_fn.rows import lists, opened, row, text
from lumina_fn.rows.row import How, Item, Keys, Row, Unread
from tests.support.memory import most_memory


def meaning(value, keys=Keys(), **how):  # noqa: B008
    return [item.row for item in row.items(value, keys, How(**how))]


def read(path, **how):
    rows = opened.opened(path, How(**how))
    return [item.row for item in rows.items(range(rows.count), True)]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("file_key", row.FILE_KEYS)
@pytest.mark.parametrize("prompt_key", row.PROMPT_KEYS)
def test_keys_of_other_tools_are_known(file_key, prompt_key):
    assert meaning({"id": 1, file_key: "x.png", prompt_key: "a cat"}) == [Row("x.png", "a cat")]


def test_of_several_keys_the_guide_s_come_first_unless_one_is_named():
    value = {"text": "t", "caption": "c", "prompt": "p", "image": "i", "file": "f"}
    assert meaning(value) == [Row("f", "p")]
    assert meaning(value, Keys("image", "text")) == [Row("i", "t")]
    assert meaning({"bild": "f", "titel": "p"}, Keys("bild", "titel")) == [Row("f", "p")]


@pytest.mark.parametrize(
    ("value", "keys", "reason"),
    [
        ({"img": "x", "prompt": "p"}, Keys(), "no file: expected a key file, image"),
        ({"img": "x", "prompt": "p"}, Keys(), "the row has 'img', 'prompt'"),
        ({"file": "x"}, Keys(prompt="titel"), "no prompt: expected a key titel; the row has 'file'"),
        ({}, Keys(), "the row has none"),
        ({"file": ["a", "b"], "prompt": "p"}, Keys(), "2 files: expected one picture a row"),
        ({"file": "x", "prompt": ["a", " "]}, Keys(), "no prompt: expected some text, found ' '"),
        ({"file": "x", "prompt": []}, Keys(), "no prompt: expected some text"),
        ("x", Keys(), "found str"),
    ],
)
def test_a_row_without_them_says_what_is_missing_and_what_it_has(value, keys, reason):
    (found,) = meaning(value, keys)
    assert reason in found.reason
    assert found.file == (value["file"] if isinstance(value, dict) and isinstance(value.get("file"), str) else None)


def talk(human, gpt="<|image|>", image="a.png"):
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], "image": image}


@pytest.mark.parametrize("begins", ["Generate an image of 768x1152 according to the following prompt:", "Generate an image of {h}x{w} according to the following prompt:\n", "Generate an image according to the following prompt:\n", ""])  # fmt: skip
@pytest.mark.parametrize("image", ["a.png", ["a.png"]])
def test_the_conversations_of_alpha_vllm_are_captions(begins, image):
    assert meaning(talk(f"{begins}a cat: according to the following prompt", image=image)) == [
        Row("a.png", "a cat: according to the following prompt")
    ]


def test_conversations_of_other_tasks_are_refused_by_name():
    assert "another task" in meaning(talk("Make it blue <|image|>"))[0].reason
    assert "two turns" in meaning(talk("what is this?", "a cat"))[0].reason
    for turns in (None, [], [1, 2], [{"value": 1}, {"value": 2}], [{}, {}]):
        assert "two turns" in meaning({"conversations": turns, "image": "a.png"})[0].reason


MANY = {"file": "x.png", "prompt": ["one", "two", "three"]}


def test_of_several_captions_one_is_chosen_by_the_row_and_the_seed_or_all_are_rows():
    assert meaning(MANY) == [Row("x.png", "one")]
    assert meaning(MANY, captions="all") == [Row("x.png", text) for text in MANY["prompt"]]
    drawn = [meaning({**MANY, "file": f"{i}.png"}, captions="random", seed=1)[0].prompt for i in range(300)]
    assert drawn == [meaning({**MANY, "file": f"{i}.png"}, captions="random", seed=1)[0].prompt for i in range(300)]
    assert drawn != [meaning({**MANY, "file": f"{i}.png"}, captions="random", seed=2)[0].prompt for i in range(300)]
    assert all(drawn.count(text) > 70 for text in MANY["prompt"])


def test_what_a_row_is_stored_as_changes_with_its_caption_and_stays_for_old_rows():
    assert row.items({"file": "x", "prompt": "p"}, Keys(), How())[0].stored == {"file": "x", "prompt": "p"}
    stored = [item.stored for how in ("first", "all") for item in row.items(MANY, Keys(), How(captions=how))]
    assert stored == [[MANY, "one"], [MANY, "one"], [MANY, "two"], [MANY, "three"]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(0, 36), st.integers(0, 36))
def test_any_part_of_all_captions_is_that_part_of_the_whole(tmp_path_factory, counts, begin, size):
    path = tmp_path_factory.mktemp("rows") / "data.json"
    path.write_text(json.dumps([{"file": f"{i}", "prompt": [f"{k}" for k in range(n)]} for i, n in enumerate(counts)]))
    rows = opened.opened(path, How(captions="all"))
    whole = list(rows.items(range(rows.count), True))
    assert rows.count == len(whole) == sum(counts)
    part = range(min(begin, rows.count), min(begin + size, rows.count))
    assert list(rows.items(part, True)) == whole[part.start : part.stop]


ROWS = [{"file": "1.png", "prompt": "das Männchen"}, {"file": "2.png", "prompt": "猫"}]
SEEN = [Row(**value) for value in ROWS]


def as_csv(rows, delimiter=","):
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def forms(rows):
    return {
        "data.json": json.dumps(rows, ensure_ascii=False),
        "data.jsonl": "\r\n".join(json.dumps(value, ensure_ascii=False) for value in rows),
        "data.csv": as_csv(rows),
    }


@pytest.mark.parametrize("name", forms(ROWS))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with mark"])
def test_text_of_other_machines_is_read(tmp_path, encoding, name):
    content = forms(ROWS)[name]
    data = codecs.BOM_UTF16_BE + content.encode("utf-16-be") if "mark" in encoding else content.encode(encoding)
    assert read(written(tmp_path / name, data)) == SEEN


@pytest.mark.parametrize("name", forms(ROWS))
def test_one_row_in_another_encoding_costs_that_row_alone(tmp_path, name):
    quoted = [{"file": "1.png", "prompt": "it\u2019s"}, {"file": "2.png", "prompt": "it is"}]
    path = written(tmp_path / name, forms(quoted)[name].encode("cp1252"))
    bad, good = read(path)
    assert isinstance(bad, Unread)
    assert "byte 0x92" in bad.reason
    assert "--encoding cp1252" in bad.reason
    assert good == Row(**quoted[1])
    assert read(path, encoding="cp1252") == [Row(**value) for value in quoted]


def test_half_a_surrogate_that_json_writes_is_a_name_and_no_damage(tmp_path):
    path = written(tmp_path / "data.json", json.dumps([{"file": "\udc92.png", "prompt": "a cat"}]))
    assert read(path) == [Row("\udc92.png", "a cat")]


def test_an_encoding_that_is_none_is_one_line(tmp_path):
    path = written(tmp_path / "data.json", json.dumps(ROWS))
    with pytest.raises(InputError, match="not klingon: unknown encoding"):
        read(path, encoding="klingon")
    written(path, codecs.BOM_UTF16_LE + b"[\x00\x00\xd8")
    with pytest.raises(InputError, match="not utf-16-le"):
        read(path)


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30).filter(
    str.strip
)
VALUES = st.fixed_dictionaries(
    {"file": TEXTS, "prompt": TEXTS}, optional={"x": st.recursive(st.none() | TEXTS, st.lists)}
)


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8), st.integers(1, 40), st.sampled_from([None, 1, "\t"]))
def test_a_list_in_pieces_is_the_list_whole(tmp_path_factory, monkeypatch_session, values, chunk, indent):
    """Rows are found by their brackets, in windows that end anywhere; `json` reads the whole."""
    folder = tmp_path_factory.mktemp("rows")
    monkeypatch_session.setattr(lists, "CHUNK", chunk)
    monkeypatch_session.setattr(text, "CHUNK", chunk)
    content = json.dumps(values, ensure_ascii=False, indent=indent)
    trailing = f"{content[:-1]} , ] \n"
    lines = "\n \n".join(json.dumps(value) for value in values)
    for name, data in (("a.json", content), ("b.json", trailing), ("c.jsonl", lines)):
        stored = lists.opened(written(folder / name, data))
        assert [value for value, _ in stored.values(range(stored.count), False)] == values
        assert next(stored.values(range(stored.count - 1, stored.count), False))[0] == values[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.integers(1, 40), st.sampled_from(",;\t"))
def test_a_table_in_pieces_is_the_table_whole(tmp_path_factory, monkeypatch_session, values, chunk, delimiter):
    monkeypatch_session.setattr(text, "CHUNK", chunk)
    path = tmp_path_factory.mktemp("rows") / "t.csv"
    rows = [{"file": file, "text": caption} for file, caption in values]
    assert read(written(path, as_csv(rows, delimiter).encode())) == [Row(*value) for value in values]


@pytest.fixture(scope="module", name="monkeypatch_session")
def patching():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"file": "a"} {"file": "b"}]', "line 1: Expecting ',' delimiter"),
        ('[\n{"file": "a"},\n{"file" "b"}\n]', "near line 3: Expecting ':' delimiter"),
        ('[{"file": "a"}', "line 1"),
        ('[{"file": "a"}] [', "extra data"),
        ('[{"file": "a"},, {"file": "b"}]', "line 1"),
        ("[,]", "neither JSON nor JSONL"),
        ("[[[", "neither JSON nor JSONL"),
        ("[}", "neither JSON nor JSONL"),
        ("[]", "the dataset is empty"),
        ("", "the file is empty"),
        ("  \n ", "the file is empty"),
        ("7", "found int"),
        ("hello", "neither JSON nor JSONL"),
    ],
)
def test_what_is_no_list_is_refused_with_its_place(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        read(written(tmp_path / "data.json", content))


def test_one_row_over_many_lines_is_one_row(tmp_path):
    assert read(written(tmp_path / "data.json", json.dumps(ROWS[0], indent=2))) == SEEN[:1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("file,text\n", "is empty"),
        ("file,file\na,b\n", "two columns have one name"),
        ('file,text\na,"b', None),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, says):
    path = written(tmp_path / "t.csv", content)
    if says is None:
        assert read(path) == [Row("a", "b")]
    else:
        with pytest.raises(InputError, match=says):
            read(path)


def test_a_table_s_bad_row_costs_itself_alone(tmp_path):
    path = written(
        tmp_path / "t.csv",
        'image,caption\n1.png,a 5" screen\n2.png\n3.png,"two\nlines, one ""caption"""\n\n4.png,a,b\n',
    )
    first, second, third, fourth = read(path)
    assert first == Row("1.png", 'a 5" screen')
    assert second.reason.startswith("1 values in a row; the table has 2 columns")
    assert third == Row("3.png", 'two\nlines, one "caption"')
    assert fourth.reason.startswith("3 values")


def test_a_quote_that_is_never_closed_is_one_line_and_not_the_rest_of_the_table(tmp_path):
    path = written(tmp_path / "t.csv", 'file,text\na.png,"open\n' + "b.png,fine\n" * 20_000)
    with pytest.raises(InputError, match="is a quote not closed"):
        read(path)


@pytest.mark.parametrize("name", forms(ROWS))
def test_a_row_takes_a_few_bytes_of_memory(tmp_path, name):
    """At most 100 bytes a row while a list is read; a row of this one is 8,000 bytes of text."""
    n = 3000
    path = written(tmp_path / name, forms([{"file": f"{i:0100d}.png", "prompt": "x" * 8000} for i in range(n)])[name])
    with most_memory() as taken:
        rows = opened.opened(path)
        assert sum(len(item.row.prompt) for item in rows.items(range(n), False)) == 8000 * n
    assert rows.count == n
    assert taken[0] < 100 * n + 6 * text.CHUNK


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_caption_of_megabytes_is_a_row_with_its_file(tmp_path, name):
    rows = [ROWS[0], {"file": "long.png", "prompt": "a very long story " * 1_000_000}, ROWS[1]]
    path = written(tmp_path / name, forms(rows)[name])
    files = [found.file for found in read(path)]
    assert files == ["1.png", "long.png", "2.png"]


def test_an_item_knows_no_more_than_its_row(tmp_path):
    rows = opened.opened(written(tmp_path / "data.json", json.dumps(ROWS)))
    assert rows.item(1) == Item(SEEN[1], ROWS[1])
    assert rows.said() == "read as JSON list: 2 rows, captions from `prompt`"
