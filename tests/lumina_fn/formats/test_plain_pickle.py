"""A pickle of plain values gives them back; any other is refused by what it asks for, and nothing of it is run."""

import io
import os
import pickle
import zipfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lumina_fn.errors import InputError
from lumina_fn.features import foreign
from lumina_fn.formats import plain_pickle


class Runs:
    def __reduce__(self):
        return os.system, ("touch hit",)


SELF: list = []
SELF.append(SELF)
HOSTILE = [
    ("system", pickle.dumps({"token": Runs(), "label": []})),
    ("system", pickle.dumps({"token": Runs(), "label": []}, 2)),
    ("system", b"cos\nsystem\n(S'touch hit'\ntR."),
    ("no lists", pickle.dumps(SELF)),
    ("whole number", pickle.dumps({"token": SELF, "label": SELF})),
    ("deep", b"(" * 100_000 + b"."),
    ("BINPERSID", b"\x80\x02X\x01\x00\x00\x00aQ."),
    ("EXT1", b"\x80\x02\x82\x01."),
    ("more than", b"\x80\x04" + bytes(plain_pickle.MAX_BYTES)),
    ("malformed", b"\x80\x04]r\xff\xff"),
    ("malformed", b"\x80\x04X\xff\xff\xff\xff."),
    ("malformed", b"\x80\x04]q\x01a."),
    ("malformed", b""),
    ("malformed", b"."),
    ("BYTEARRAY8", b"\x80\x05\x96" + b"\xff" * 8 + b"."),
]


def torch_file(content: bytes, **how) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **how) as archive:
        archive.writestr("archive/data.pkl", content)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
@pytest.mark.parametrize(("word", "content"), HOSTILE, ids=[f"{i}-{w}" for i, (w, _) in enumerate(HOSTILE)])
def test_a_hostile_pickle_is_refused_by_what_it_asks_for(tmp_path, monkeypatch, word, content, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(torch_file(content) if suffix == ".pt" else content)
    with pytest.raises(InputError, match=word):
        foreign.item(path, foreign.Record("x", None, None))
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    "content",
    [b"PK", b"not a zip", torch_file(b"." * 100, compression=zipfile.ZIP_DEFLATED), torch_file(pickle.dumps({}))[:-30]],
)
def test_a_file_that_is_no_torch_file_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        foreign.item(tmp_path / "x.pt", foreign.Record("x", None, None))


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_a_value_or_a_value_error(data):
    whole = bytearray(pickle.dumps({"token": [1, 300, 70000, 2**40, "é"], "label": [-100, {"a": []}]}, data.draw(st.integers(2, 5))))  # fmt: skip
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        plain_pickle.loads(bytes(whole))


@given(st.recursive(st.integers(-(2**70), 2**70) | st.text(), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(), s, max_size=4), max_leaves=12), st.integers(2, 5))  # fmt: skip
def test_plain_values_come_back(value, protocol):
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value
