"""A folder of pictures with captions beside them, and Hugging Face's metadata files."""

import json

import pytest

from lumina_fn.disk import marks
from lumina_fn.errors import InputError
from lumina_fn.rows import folders, opened
from lumina_fn.rows.row import How, Row, Unread


def lay(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(path, **how):
    rows = opened.opened(path, How(**how))
    return [item.row for item in rows.items(range(rows.count), True)]


def test_captions_stand_beside_pictures_at_any_depth(tmp_path):
    lay(
        tmp_path,
        {
            "b.jpg": b"",
            "b.txt": " a cat\n",
            "a/x.PNG": b"",
            "a/x.caption": "two\nlines",
            "a/y.webp": b"",
            "a/y.txt": "first",
            "a/y.caption": "second",
        },
    )
    rows = opened.opened(tmp_path)
    assert read(tmp_path) == [Row("b.jpg", "a cat"), Row("a/x.PNG", "two\nlines"), Row("a/y.webp", "first")]
    assert rows.said() == "read as a folder of pictures and captions: 3 rows, captions from `.txt` and `.caption`"
    assert rows.roots == (tmp_path,)


def test_captions_of_windows_and_of_tools_that_name_the_picture_whole(tmp_path):
    lay(tmp_path, {name: content for stem in "ab" for name, content in ((f"{stem}.JPG", b""), (f"{stem}.c.png", b""))})
    lay(
        tmp_path,
        {"a.TXT": "one", "a.c.png.txt": "two", "b.JPG.caption": "three", "b.c.txt": "four", "b.c.caption": "five"},
    )
    assert read(tmp_path) == [Row("a.JPG", "one"), Row("a.c.png", "two"), Row("b.JPG", "three"), Row("b.c.png", "four")]
    assert "1 captions" not in opened.opened(tmp_path).said()


def test_what_has_no_caption_or_a_bad_one_is_refused_by_name(tmp_path):
    lay(
        tmp_path,
        {
            "a.jpg": b"",
            "b.jpg": b"",
            "b.txt": b"it\x92s",
            "c.jpg": b"",
            "c.txt": "  ",
            "d.jpg": b"",
            "d.txt": "fine",
            "e.txt": "alone",
        },
    )
    (tmp_path / "f").symlink_to("/etc")
    (tmp_path / "g.jpg").write_bytes(b"")
    (tmp_path / "g.txt").symlink_to("/etc/passwd")
    a, b, c, d, f, g = read(tmp_path)
    assert a == Unread("no caption: expected a.txt or a.caption beside it", "a.jpg")
    assert "byte 0x92" in b.reason
    assert c.reason == "no prompt: expected some text, found ''"
    assert d == Row("d.jpg", "fine")
    assert "a link to a folder is not followed" in f.reason
    assert "leads outside" in g.reason
    assert [row.file for row in (a, b, c, f, g)] == ["a.jpg", "b.jpg", "c.jpg", "f", "g.jpg"]
    assert read(tmp_path, encoding="cp1252")[1] == Row("b.jpg", "it\u2019s")
    assert "1 captions have no picture beside them, the first is e.txt" in opened.opened(tmp_path).said()


def test_copies_of_macos_and_what_lumina_wrote_are_no_rows(tmp_path):
    lay(tmp_path, {"x.jpg": b"", "x.txt": "a cat", "x.caption": ""})
    for name in ("._x.jpg", "__MACOSX/y.jpg", ".git/y.jpg", "features/z.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "features" / marks.NAME).write_text(marks.text("features", []))
    assert read(tmp_path) == [Row("x.jpg", "a cat")]


def test_names_are_bytes_in_order(tmp_path):
    for i in range(50):
        lay(tmp_path, {f"猫{i:04d}.jpg": b""})
    lay(tmp_path, {"a.txt": "x"})
    assert [row.file for row in read(tmp_path)] == sorted(path.name for path in tmp_path.glob("*.jpg"))


LINES = [{"file_name": "0.png", "text": "a cat"}, {"file_name": "1.png", "text": "a dog", "more": [1]}]


@pytest.mark.parametrize("name", folders.METADATA)
def test_the_metadata_of_imagefolder_names_files_beside_itself(tmp_path, name):
    content = "\n".join(map(json.dumps, LINES)) if name.endswith("l") else "file_name,text\n0.png,a cat\n1.png,a dog\n"
    for below in ("", "train/b", "train/a"):
        (tmp_path / below).mkdir(parents=True, exist_ok=True)
        (tmp_path / below / name).write_text(content)
        (tmp_path / below / "0.png").write_bytes(b"")
    rows = opened.opened(tmp_path)
    files = [f"{below}{i}.png" for below in ("", "train/a/", "train/b/") for i in range(2)]
    assert [item.row for item in rows.items(range(6), True)] == [
        Row(file, t) for file, t in zip(files, ["a cat", "a dog"] * 3, strict=True)
    ]
    assert [item.row.file for item in rows.items(range(3, 5), True)] == files[3:5]
    assert rows.said() == "read as Hugging Face imagefolder: 6 rows, captions from `text`"


def test_two_metadata_files_of_one_folder_are_not_read_as_twice_the_rows(tmp_path):
    lay(tmp_path, {f"train/{name}": "x" for name in folders.METADATA})
    with pytest.raises(InputError, match=r"train holds metadata.csv and metadata.jsonl: expected one of them"):
        opened.opened(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "expected pictures with .txt files beside them"),
        (["notes.txt"], "expected pictures with .txt files beside them"),
        (["a.jpg", "list.json"], "is .*/list.json the list of its pictures"),
        (["a.jpg", "a.txt", "x.tar"], "holds .tar and pictures: name those of one form"),
        (["x.parquet", "x.tar"], "holds .tar and .parquet"),
    ],
)
def test_a_folder_that_can_be_read_in_no_way_or_two_says_so(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=says):
        opened.opened(tmp_path)


def test_a_picture_beside_parquet_files_is_no_dataset(tmp_path, monkeypatch):
    lay(tmp_path, {"readme.png": b"", "x.parquet": b""})
    with pytest.raises(InputError, match="not Parquet"):
        opened.opened(tmp_path)


def test_patterns_are_written_out_as_a_shell_does(tmp_path):
    for i in range(12):
        lay(tmp_path, {f"{'ab'[i % 2]}/{i:03d}.tar": b""})
    name = lambda paths: [str(path.relative_to(tmp_path)) for path in paths]
    assert name(opened.files(tmp_path / "s/{008..011}.tar")) == [f"s/{i:03d}.tar" for i in range(8, 12)]
    assert name(opened.files(tmp_path / "s/{2..0}.{tar,csv}")) == [
        f"s/{i}.{e}" for i in (2, 1, 0) for e in ("tar", "csv")
    ]
    assert name(opened.files(tmp_path / "[ab]/*.tar")) == sorted(
        str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*.tar")
    )
    assert opened.files(tmp_path / "plain") == [tmp_path / "plain"]
    (tmp_path / "{1..2}.json").write_text("[]")
    assert name(opened.files(tmp_path / "{1..2}.json")) == ["{1..2}.json"]
    with pytest.raises(InputError, match="no file fits this pattern"):
        opened.files(tmp_path / "none/*.tar")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.json", "b.json"], "2 files; expected one list"),
        (["a.tar", "b.csv"], "several forms: .csv, .tar"),
        (["a.tar.gz"], "compressed"),
    ],
)
def test_files_that_are_no_dataset_together_are_refused(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=says):
        opened.opened(tmp_path / ("{" + ",".join(names) + "}") if len(names) > 1 else tmp_path / names[0])
