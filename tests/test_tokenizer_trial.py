"""A tokenizer.json that ends the process, or never comes back, is told in a line by a process that lives on."""

import json
from pathlib import Path

import pytest

from experiments.demo.tasks import LM
from lumina_fn import prompt, tokenizer_trial
from lumina_fn.errors import InputError

GOOD = json.loads((LM / "tokenizer.json").read_text())
HOSTILE = {  # each of these ends a process that loads or uses it
    "an allocation": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 6}},
    "a charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA/////////w=="}},
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_what_ends_its_process_is_told(tmp_path, attack):
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((LM / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**GOOD, **HOSTILE[attack]}))
    with pytest.raises(
        InputError, match=r"tokenizer\.json: not a usable tokenizer: loading it ends the process \(signal 6"
    ):
        prompt.load_tokenizer(tmp_path)


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
    monkeypatch.setattr(tokenizer_trial, "_problem", lambda data: "is tried")
    tokenizer_trial.check(data, Path("tokenizer.json"), known)
    with pytest.raises(InputError, match="is tried"):
        tokenizer_trial.check(data + b" ", Path("tokenizer.json"), known)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tokenizer_trial, "_problem", lambda data: None)
    tokenizer_trial.check(data, Path("tokenizer.json"), tmp_path / "file" / "known")  # nowhere to remember it
