"""Tars and Parquet files: rows with their pictures, in order, from any place; nothing is unpacked, nothing is skipped in silence."""

import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import ParquetFile

from lumina_fn import images
from lumina_fn.errors import InputError
from lumina_fn.picture_files import Span
from lumina_fn.rows import opened, tars
from lumina_fn.rows.row import How, Keys, Row, Unread
from tests.support.archives import drawn, hub_columns, parquet, samples, tar
from tests.support.memory import most_memory


def read(path, **how):
    rows = opened.opened(path, How(**how))
    return [item.row for item in rows.items(range(rows.count), True)]


def content(picture):
    if isinstance(picture, Span):
        with picture.path.open("rb") as file:
            file.seek(picture.begin)
            return file.read(picture.size)
    return picture


def archives(folder):
    """The same seven rows, in two tars and in two Parquet files."""
    tar(folder / "tars/000.tar", samples(4))
    tar(folder / "tars/b/001.tar", samples(3, 4))
    parquet(folder / "parquet/0.parquet", hub_columns(4))
    parquet(folder / "parquet/b/1.parquet", hub_columns(3, 4))
    return {
        "tars": (folder / "tars", [f"{'000.tar' if i < 4 else 'b/001.tar'}#{i:05d}" for i in range(7)]),
        "parquet": (folder / "parquet", [f"0.parquet#{i}" if i < 4 else f"b/1.parquet#{i - 4}" for i in range(7)]),
    }


@pytest.mark.parametrize("form", ["tars", "parquet"])
def test_every_row_has_its_name_its_caption_and_its_picture_wherever_reading_begins(tmp_path, form):
    folder, names = archives(tmp_path)[form]
    rows = opened.opened(folder)
    assert rows.count == 7
    for begin in range(8):
        for end in range(begin, 8):
            found = list(rows.items(range(begin, end), True))
            assert [item.row for item in found] == [Row(names[i], f"picture {i}") for i in range(begin, end)]
            assert [content(item.picture) for item in found] == [drawn(i) for i in range(begin, end)]
            listed = rows.items(range(begin, end), False)
            assert [item.stored for item in listed] == [item.stored for item in found]
    loaded = images.load(rows.item(5).picture, 32)
    assert loaded.source == (40, 32)


def test_what_they_were_read_as(tmp_path):
    made = archives(tmp_path)
    said = [opened.opened(folder).said() for folder, _ in made.values()]
    assert said == [
        "read as WebDataset tars: 7 rows, captions from `.txt`, `.caption` or `.json`",
        "read as Parquet: 7 rows, captions from `text`",
    ]


PNG = drawn(0)


@pytest.mark.parametrize(
    ("members", "keys", "expected"),
    [
        ([("a.jpg", PNG), ("a.caption", b"x\n")], Keys(), Row("t.tar#a", "x")),
        ([("./d/a.b.png", PNG), ("./d/a.txt", b"x")], Keys(), Row("t.tar#d/a", "x")),
        ([("a.json", b'{"caption": "x"}'), ("a.PNG", PNG)], Keys(), Row("t.tar#a", "x")),
        ([("a.json", b'{"titel": "x", "caption": "y"}'), ("a.png", PNG)], Keys(None, "titel"), Row("t.tar#a", "x")),
        ([("a.json", b'{"caption": ["x", "y"]}'), ("a.png", PNG)], Keys(), Row("t.tar#a", "x")),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.alt", b"y")], Keys(None, "alt"), Row("t.tar#a", "y")),
        ([("a.in.png", PNG), ("a.out.png", PNG), ("a.txt", b"x")], Keys("out.png"), Row("t.tar#a", "x")),
        ([("a.in.png", PNG), ("a.out.png", PNG), ("a.txt", b"x")], Keys(), "2 pictures among .in.png, .out.png, .txt"),
        ([("a.txt", b"x")], Keys(), "0 pictures among .txt: expected one picture"),
        ([("a.png", PNG)], Keys(), "no caption among .png: expected .txt, .caption or .json next to the picture"),
        ([("a.png", PNG), ("a.json", b"{")], Keys(), "its .json: the line is not JSON"),
        ([("a.png", PNG), ("a.json", b'{"x": 1}')], Keys(), "no caption among .png, .json"),
        ([("a.png", PNG), ("a.txt", b"it\x92s")], Keys(), "byte 0x92"),
        ([("a.png", PNG), ("a.png", PNG), ("a.txt", b"x")], Keys(), "two files have one name: a.png, a.png, a.txt"),
        ([("../a.png", PNG)], Keys(), "its path leads outside the tar"),
        ([("/etc/a.png", PNG)], Keys(), "its path leads outside the tar"),
    ],
)
def test_a_sample_is_read_or_says_what_it_has(tmp_path, members, keys, expected):
    found, *others = read(tar(tmp_path / "t.tar", members), keys=keys)
    assert not others
    if isinstance(expected, Row):
        assert found == expected
    else:
        assert isinstance(found, Unread)
        assert expected in found.reason
        assert found.file == f"t.tar#{members[0][0].split('.png')[0].split('.txt')[0].split('.in')[0]}" + (
            ".png" if "leads" in expected else ""
        )


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (tarfile.SYMTYPE, "a link (to /etc/passwd)"),
        (tarfile.LNKTYPE, "a link (to /etc/passwd)"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_what_is_no_file_is_refused_by_its_name_and_the_others_are_read(tmp_path, kind, says):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = (kind, "/etc/passwd") if name == "b.png" else (tarfile.REGTYPE, "")
            about.size = 1 if about.isreg() else 0
            archive.addfile(about, io.BytesIO(b"x"))
    a, bad, rest = read(tmp_path / "t.tar")
    assert a == Row("t.tar#a", "x")
    assert bad.file == "t.tar#b.png"
    assert says in bad.reason
    assert rest.file == "t.tar#b"


def test_what_other_programs_keep_in_a_tar_is_no_sample(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        long = "d" * 150 + "/a"
        for name in ("._a.png", "d/", "__index__", f"{long}.png", f"{long}.txt"):
            about = tarfile.TarInfo(name)
            about.type = tarfile.DIRTYPE if name == "d/" else tarfile.REGTYPE
            archive.addfile(about, io.BytesIO())
    assert [row.file for row in read(tmp_path / "t.tar")] == [f"t.tar#{long}"]


def test_damage_costs_what_follows_it_and_is_a_row(tmp_path):
    whole = tar(tmp_path / "t.tar", samples(4)).read_bytes()
    with tarfile.open(tmp_path / "t.tar") as archive:
        third = archive.getmembers()[4].offset
    cases = {
        "a header": whole[:third] + b"\xff" * 512 + whole[third + 512 :],
        "zeros": whole[:third] + bytes(512) + whole[third + 512 :],
        "the end": whole[: third + 700],
        "two": whole + whole,
    }
    for case, data in cases.items():
        (tmp_path / "t.tar").write_bytes(data)
        *good, bad = read(tmp_path / "t.tar")
        assert [row.prompt for row in good if isinstance(row, Row)] == [
            f"picture {i}" for i in range(4 if case == "two" else 2)
        ], case
        assert ("not complete" if case == "the end" else "damaged") in bad.reason, case
        rows = opened.opened(tmp_path / "t.tar")
        assert rows.item(rows.count - 1).row == bad, case
    (tmp_path / "t.tar").write_bytes(b"no tar at all" * 100)
    assert "damaged" in read(tmp_path / "t.tar")[0].reason
    for empty in (b"", bytes(10240)):
        (tmp_path / "t.tar").write_bytes(empty)
        with pytest.raises(InputError, match="the tar is empty"):
            read(tmp_path / "t.tar")


def test_a_header_that_says_it_is_huge_is_not_read_into_memory(tmp_path):
    about = tarfile.TarInfo("a")
    about.type, about.size = tarfile.XHDTYPE, 1 << 30
    (tmp_path / "t.tar").write_bytes(about.tobuf())
    with (tmp_path / "t.tar").open("r+b") as file:
        file.truncate(2 << 30)
    with most_memory() as taken:
        assert "a header of 1073741824 bytes" in read(tmp_path / "t.tar")[0].reason
    assert taken[0] < 50 << 20


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["png", "txt", "json"]), min_size=1, max_size=3, unique=True), min_size=1, max_size=6
    )
)
def test_samples_are_what_the_standard_library_lists(tmp_path_factory, fields):
    members = [(f"{i}.{field}", b"{}") for i, of_sample in enumerate(fields) for field in of_sample]
    path = tar(tmp_path_factory.mktemp("tar") / "t.tar", members)
    assert [row.file for row in read(path)] == [f"t.tar#{i}" for i in range(len(fields))]
    with tarfile.open(path) as archive:
        assert [member.name for member in tars.listed(path)] == archive.getnames()


def test_columns_of_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    column = lambda name, values, **others: parquet(path, {name: values, "text": ["x"] * len(values), **others})
    assert read(column("jpg", [PNG])) == [Row("x.parquet#0", "x")]
    assert read(column("photo", [{"bytes": PNG, "path": None}])) == [Row("x.parquet#0", "x")]
    assert read(column("file_name", ["a.png"])) == [Row("a.png", "x")]
    assert read(column("image", [{"bytes": None, "path": "a.png"}])) == [Row("a.png", "x")]
    assert read(column("bild", [PNG], titel=["y"]), keys=Keys("bild", "titel")) == [Row("x.parquet#0", "y")]
    assert read(column("image", [PNG] * 2, caption=[["a", "b"], None])) == [
        Row("x.parquet#0", "a"),
        Unread("no prompt: expected some text, found None", "x.parquet#1"),
    ]
    assert [row.prompt for row in read(column("image", [PNG], caption=[["a", "b"]]), captions="all")] == ["a", "b"]
    for wrong, says in (
        ({"image": [1]}, "no file"),
        ({"image": [PNG], "text": [1]}, "no prompt"),
        ({"image": [], "text": []}, "the file has no rows"),
    ):
        with pytest.raises(InputError, match=says):
            read(parquet(path, wrong))


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    path = parquet(tmp_path / "x.parquet", hub_columns(9))
    with ParquetFile(path) as file:
        at = file.metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 10] = b"\xff" * 10
    path.write_bytes(data)
    rows = opened.opened(path)
    assert [item.row.prompt for item in rows.items(range(9), False)] == [f"picture {i}" for i in range(9)]
    found = [item.row for item in rows.items(range(9), True)]
    assert [i for i, row in enumerate(found) if isinstance(row, Row)] == [0, 1, 2, 6, 7, 8]
    assert all("row group 1 cannot be read" in found[i].reason and found[i].file == f"x.parquet#{i}" for i in (3, 4, 5))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__
    path = parquet(tmp_path / "x.parquet", hub_columns(1))

    def without(name, *args, **kwargs):
        if name == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"lumina-fn\[data\]"):
        opened.opened(path)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_hundred_times_the_rows_take_no_more_memory(tmp_path, form):
    """What is held of 2,000 pictures of 20 KB is far less than they are."""
    n, picture = 2000, PNG * 5
    columns = {"image": [picture] * n, "text": [f"picture {i}" for i in range(n)]}
    members = [m for i in range(n) for m in ((f"{i}.png", picture), (f"{i}.txt", b"x"))]
    path = tar(tmp_path / "x.tar", members) if form == "tar" else parquet(tmp_path / "x.parquet", columns, 100)
    opened.opened(path).item(n - 1)
    with most_memory() as taken:
        rows = opened.opened(path)
        assert sum(item.picture is not None for item in rows.items(range(n), True)) == n
    assert taken[0] < n * len(picture) / 2
    assert json.dumps(rows.item(7).stored)
