"""The command `lumina`: it lists the commands, is each of them, and answers at once where nothing is computed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS
from tests.support.paths import ROOT

LUMINA = Path(sys.executable).with_name("lumina")
SECONDS = 0.15  # of a processor: others may be using it too
named = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def call(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"})  # fmt: skip


def seconds(*words: str) -> float:
    """The least processor time of five calls."""
    found = []
    for _ in range(5):
        before = os.times()
        assert call(*words).returncode == 0
        after = os.times()
        found.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(found)


def test_alone_it_lists_the_commands_at_once():
    done = call(LUMINA)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  ([\w-]+) ", done.stdout, re.MULTILINE) == [command.name for command in COMMANDS]
    assert seconds(LUMINA) <= SECONDS


@named
def test_help_answers_at_once(command):
    assert seconds(LUMINA, command.name, "--help") <= SECONDS


@named
def test_a_command_is_its_module(command):
    ours, theirs = call(LUMINA, command.name, "--help"), call(sys.executable, "-m", command.module, "--help")
    assert (ours.returncode, theirs.returncode) == (0, 0)
    start = lambda text: re.sub(r"\s+", " ", text)
    assert start(ours.stdout) == start(theirs.stdout).replace(f"python -m {command.module}", f"lumina {command.name}")
    assert ours.stdout.startswith(f"usage: lumina {command.name} ")


@named
def test_every_command_has_the_version(command):
    done = call(LUMINA, command.name, "--version")
    assert (done.returncode, done.stdout) == (0, call(LUMINA, "--version").stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("finetun", "no command 'finetun', did you mean finetune?"),
        ("finetune --modle X", "unknown flag --modle, did you mean --model?; see lumina finetune --help"),
        ("finetune --modle=X --steps 3", "unknown flag --modle, did you mean --model?"),
        ("sample --model a surprise", "unexpected 'surprise'; see lumina sample --help"),
        ("sample --model a", "expected --vq PATH, --out PATH; see lumina sample --help"),
        ("pretokenize x --vq v", "expected out, --model PATH; see"),
        ("plan --devices 1 --layers", "argument --layers: expected one argument"),
        ("convert a b --to zip", "argument --to: invalid choice: 'zip'"),
        ("export m o --what step --target cpu --batch 0", "--batch 0: expected at least 1"),
    ],
)
def test_a_mistake_is_one_line(words, said):
    done = call(LUMINA, *words.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


@pytest.mark.parametrize("name", ["plan", "migrate", "convert", "pretokenize", "dataset", "sample", "export"])
def test_without_flags_the_usage_is_shown(name):
    done = call(LUMINA, name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: lumina {name} ")


def test_words_and_flags_come_in_any_order():
    from experiments.pretokenize import Settings
    from lumina_fn.process import flags

    runs = [
        flags.parse(Settings, None, words.split())
        for words in ("a b --model m --vq v", "a --model m b --vq v", "--model m --vq v a b")
    ]
    assert runs[0] == runs[1] == runs[2]
    assert (runs[0].data, runs[0].out) == (Path("a"), Path("b"))


def test_the_flags_of_a_fine_tune_are_grouped():
    said = call(LUMINA, "finetune", "--help").stdout
    titles = re.findall(r"^(\w[\w ]*):\n  for example --", said, re.MULTILINE)
    assert titles == ["data", "optimization", "devices", "checkpoints", "logging"]


def test_a_bare_fine_tune_says_first_what_it_does(tmp_path):
    """It is stopped once it has said so."""
    process = subprocess.Popen([LUMINA, "finetune"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        said = process.stderr.readline() + process.stderr.readline()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert "embedded default" in said
    assert "runs/demo" in said
