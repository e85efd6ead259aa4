"""A tokenizer.json that ends the process, or never comes back, is told in a line by a process that lives on."""

import base64
import json
from pathlib import Path

import pytest

from experiments.demo.tasks import LM
from lumina_fn import prompt
from lumina_fn.errors import InputError
from lumina_fn.process import tokenizer_trial

GOOD = json.loads((LM / "tokenizer.json").read_text())


def replaced(pattern: dict, content: str, times: int = 1) -> dict:
    part = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [part] * times}}


def pre(**fields) -> dict:
    return {"pre_tokenizer": fields}


PREFIXED = {
    **GOOD["model"],
    "continuing_subword_prefix": "\u4e00" * 2,
    "merges": [["a", "b"]],
    "vocab": {"a": 0, "b": 1},
}
HOSTILE = {  # each of these ends a process that loads or uses it, fills its memory, takes years, or prints fifty lines
    "an allocation": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA/////////w=="}}, "ends the process .signal 6"),
    "texts that grow": (replaced({"String": "a"}, "a" * 1000, 6), "more than 32 times longer"),
    "texts that grow by one letter": (replaced({"String": "\u9e21"}, "\u9e21" * 10, 2), "more than 32 times longer"),
    "texts that double and double": (replaced({"String": "a"}, "aa", 40), "more than 32 times longer"),
    "texts that grow out of nothing": (replaced({"Regex": "(?=q)"}, "q", 9), "more than 32 times longer"),
    "a table that makes them grow": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\0\0\0\0" + b"x" * 99).decode()}}, "more than 32 times longer"),
    "a regular expression that goes back": (pre(type="Split", pattern={"Regex": "(a+)+$b"}, behavior="Isolated", invert=False), "panic"),
    "an empty match": (replaced({"Regex": ""}, "x"), "panic"),
    "pieces of no length": (pre(type="FixedLength", length=0), "panic"),
    "a table of four bytes": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "panic"),
    "a prefix that is longer than its word": ({"model": PREFIXED}, "panic"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_what_ends_its_process_is_told(tmp_path, capfd, attack):
    fields, said = HOSTILE[attack]
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((LM / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**GOOD, **fields}))
    with pytest.raises(InputError, match=rf"tokenizer\.json: not a tokenizer: loading it .*{said}") as error:
        prompt.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_what_never_comes_back_is_told(monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.2)
    monkeypatch.setattr(tokenizer_trial, "TRIAL", "while True: pass")
    with pytest.raises(InputError, match=r"takes more than 0\.2 seconds"):
        tokenizer_trial.check(b"{}", Path("tokenizer.json"), None)


def test_a_tokenizer_as_large_as_real_ones_passes():
    """150,000 entries, 100,000 merges."""
    letters = [chr(0x4E00 + i) for i in range(400)]
    merges = [[a, b] for a in letters for b in letters[:250]]
    vocab = {
        token: i
        for i, token in enumerate([*letters, *(a + b for a, b in merges), *(f"word{i}" for i in range(50_000))])
    }
    spec = {**GOOD, "model": {**GOOD["model"], "vocab": vocab, "merges": merges}, "added_tokens": []}
    tokenizer_trial.check(json.dumps(spec).encode(), Path("tokenizer.json"), None)


def test_what_passed_is_not_tried_again(tmp_path, monkeypatch):
    known, data = tmp_path / "known", json.dumps(GOOD).encode()
    tokenizer_trial.check(data, Path("tokenizer.json"), known)
    assert len(list(known.iterdir())) == 1
    monkeypatch.setattr(tokenizer_trial, "_tried", lambda data: ("is tried", False))
    tokenizer_trial.check(data, Path("tokenizer.json"), known)
    with pytest.raises(InputError, match="is tried"):
        tokenizer_trial.check(data + b" ", Path("tokenizer.json"), known)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tokenizer_trial, "_tried", lambda data: (None, True))
    tokenizer_trial.check(data, Path("tokenizer.json"), tmp_path / "file" / "known")  # nowhere to remember it


def test_what_did_not_come_to_its_end_is_not_remembered(tmp_path, monkeypatch):
    """An error of the library's own, or a Python that cannot be started: it is tried again next time."""
    known = tmp_path / "known"
    tokenizer_trial.check(b'{"version": "1.0"}', Path("tokenizer.json"), known)
    monkeypatch.setattr(tokenizer_trial.sys, "executable", str(tmp_path / "none"))
    tokenizer_trial.check(json.dumps(GOOD).encode(), Path("tokenizer.json"), known)
    assert not known.exists()


def test_normalizers_in_use_make_no_text_much_longer():
    """Llama's, and those of T5 and BERT."""
    llama = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}  # fmt: skip
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    charsmap = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(b"\4\0\0\0trie" + b"abc\0de\0").decode(),
    }
    bert = {"type": "BertNormalizer", "lowercase": True}
    for normalizer in (None, llama, spaces, bert, {"type": "Sequence", "normalizers": [charsmap, spaces]}):
        assert tokenizer_trial._growth(normalizer) <= 6
