"""A guide's scripts are read as Bash would run them, or refused by the line; nothing in them is run."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments import migrate
from experiments.migration import shell
from lumina_fn.errors import InputError
from tests.support.mindspeed_guide import BASE, TRAIN, write_guide


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("if true; then MBS=4; fi", "`if` is not read"),
        ("cd elsewhere", "`cd`"),
        ("eval $X", "`eval`"),
        ("source ./other.sh", "other.sh"),
        ("ARGS=(--lr 1)", "array"),
        ("MBS=`nproc`; export HCCL_EXEC_TIMEOUT=$MBS", "nproc"),
        ("MBS=$1", r"\$1"),
        ("MBS=$(nvidia-smi | wc -l)", "nvidia-smi"),
        ("MBS=$UNSET", "UNSET"),
        ("MBS=~/n", "home"),
        ("export HCCL_CONNECT_TIMEOUT=9", "120 to 7200"),
        ("export SOMETHING=1", "SOMETHING"),
        ("python other.py", "not torchrun"),
        ("[ -f x ] && MBS=4", "&&"),
        ("cat <<EOF", "not read"),
        ("A='open", "no end"),
    ],
)
def test_a_line_that_only_a_shell_could_follow_is_named(tmp_path, line, word):
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    script.write_text(script.read_text().replace('LAUNCH="', f'{line}\nLAUNCH="', 1))
    with pytest.raises(InputError, match=word):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("line", ["rm -rf $PWD", "echo $(touch hit)", "X=`touch hit`", "touch hit > hit", "date > hit"])
def test_nothing_of_a_script_is_run(tmp_path, line, monkeypatch):
    guide = write_guide(tmp_path / "guide")
    monkeypatch.chdir(guide)
    script = guide / BASE / "pretrain.sh"
    script.write_text(script.read_text().replace("mkdir", f"{line}\nmkdir", 1))
    with suppress(InputError):  # some of these lines are read, some are refused
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert script.exists()
    assert not list(tmp_path.rglob("hit"))


WORDS = st.lists(st.sampled_from(["a", "$A", '"$A b"', "'$A'", "${B}", "${C:-d e}", '"${C:-d e}"', "$((N*3-1))", "x$A$B", "\\$A", "#n", '"q\\"r"']), min_size=1, max_size=5)  # fmt: skip


@hypothesis_settings(max_examples=25, deadline=None)
@given(WORDS, st.sampled_from(["1 2", "", " s ", "-x"]), st.integers(0, 9))
def test_words_expand_as_bash_expands_them(words, a, n):
    """Bash, which is not used anywhere else, is the oracle."""
    text = f'A=\'{a}\'\nB="$A-"\nN={n}\nV="{{$N}}"\n'
    line = "torchrun " + " ".join(words)
    with_bash = subprocess.run(["bash", "-c", f'{text}torchrun() {{ printf "<%s>" "$@"; }}\n{line}'], capture_output=True, text=True)  # fmt: skip
    script = shell.Script(Path("x"))
    for statement in shell.statements(text + line):
        shell._follow(script, statement)
    expected = with_bash.stdout if with_bash.stdout != "<>" or script.command else ""
    assert "".join(f"<{word}>" for word in script.command) == expected


MARKS = [
    "$",
    "${",
    "$((",
    "`",
    '"',
    "'",
    "\\",
    "\n",
    "|",
    "&&",
    "<<",
    ">",
    "#",
    "~",
    "export ",
    "A=",
    "$A",
    ")",
    ";",
    "\0",
]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TRAIN)), st.sampled_from(MARKS)), min_size=1, max_size=6))
def test_a_spoilt_script_is_read_or_refused(tmp_path_factory, marks):
    text = TRAIN.format(devices=8, extra="")
    for at, mark in marks:
        text = text[:at] + mark + text[at:]
    path = tmp_path_factory.mktemp("script") / "pretrain.sh"
    path.write_text(text)
    with suppress(InputError):
        shell.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "''" * 200_000,
        "# a\n" * 200_000,
        '"$A"' * 100_000,
        "A=$A" * 100_000,
        "${A:-" * 100_000,
        "$((" * 100_000,
        "\n" + "".join(f"V{i}=1\n" for i in range(60_000)) + "source x\n" * 30_000,
    ],
)
def test_a_long_script_takes_no_longer_than_its_length(tmp_path, text):
    (tmp_path / "a.sh").write_text(f"A={'x' * 60_000}\ntorchrun {text}\n")
    started = time.process_time()  # the machine may be busy
    with suppress(InputError):
        shell.read(tmp_path / "a.sh")
    assert time.process_time() - started < 5


def test_values_do_not_grow_without_end(tmp_path):
    (tmp_path / "a.sh").write_text("A=xx\n" + "A=$A$A\n" * 60 + "torchrun $A")
    with pytest.raises(InputError, match="more than"):
        shell.read(tmp_path / "a.sh")
