"""commands.sh is run by its reader: nothing that a stranger's guide holds may run with it, however it is written there."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from experiments import migrate
from experiments.migration import run
from lumina_fn.errors import InputError
from tests.support.mindspeed_guide import BASE, write_guide

WORDS = [
    "$(touch {hit})",
    "`touch {hit}`",
    "'; touch {hit}; '",
    '"; touch {hit}; "',
    "x; touch {hit} #",
    "\\'; touch {hit} #",
    "}}$(touch {hit})",
    "${{X:-$(touch {hit})}}",
    "&& touch {hit} &&",
    "\\",
]


def with_line(guide: Path, line: str, name: str = "pretrain.sh") -> Path:
    script = guide / BASE / name
    script.write_text(script.read_text().replace('LAUNCH="', f'{line}\nLAUNCH="', 1))
    return script


def run_commands(out: Path, home: Path) -> list[list[str]]:
    """Run commands.sh where all programs that it starts are stubs; the words that each was given."""
    stubs, seen = out.parent / "stubs", out.parent / "seen"
    stubs.mkdir()
    for name in ("python", "torchrun", "bash", "cp"):
        (stubs / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> {seen}\necho >> {seen}\n')
        (stubs / name).chmod(0o755)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "HOME": str(home)}
    done = subprocess.run(["/bin/bash", out / "commands.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [line.split("\0")[:-1] for line in seen.read_text().splitlines()]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("devices", [1, 8])
def test_what_looks_like_a_command_stays_a_word(tmp_path, word, devices):
    hit = tmp_path / "hit"
    name, word = (word.format(hit=place) for place in ("hit", hit))  # a name has no slashes
    path = "dataset_param.basic_parameters.data_config.path"
    guide = write_guide(tmp_path / f"g{name}", [
        ("feature_extract/data.json", path, f"set{word}/data.json"),
        ("feature_extract/data.json", "dataset_param.tokenizer_config.from_pretrained", f"./w{word}"),
        ("feature_extract/model.json", "ae.from_pretrained", f"./vq{word}"),
        ("tools.json", "sorafeature.save_path", f"./feats{word}"),
        ("feature_data.json", path, f"./feats{word}/data.jsonl"),
    ], devices=devices)  # fmt: skip
    script = guide / BASE / "pretrain.sh"
    text = script.read_text().replace("$LOAD_PATH --save", f"{shlex.quote('./load' + word)} --save")
    script.write_text(text.replace("SAVE_PATH='./tuned'", f"SAVE_PATH={shlex.quote('./tuned' + word)}"))
    script.write_text(script.read_text().replace("find $SAVE_PATH", "find x"))
    migrate.main([str(guide), "--out", str(tmp_path / "out")])
    seen = run_commands(tmp_path / "out", tmp_path)
    commands = [c for c in json.loads((tmp_path / "out/report.json").read_text())["commands"] if c["active"]]
    assert seen == [command["words"] for command in commands]
    assert any(word in part for command in seen for part in command)
    assert not hit.exists()
    assert not (run.PROJECT / "hit").exists()


@pytest.mark.parametrize("flag", ["--node_rank 0", "--master_addr localhost", "--master_port 6000", "--nnodes $NODES"])
@pytest.mark.parametrize("word", WORDS[:8])
def test_what_torchrun_is_told_is_numbers_and_an_address(tmp_path, flag, word):
    """NODE_RANK is the one value that stands in double quotes, as ${NODE_RANK:-0}."""
    guide = write_guide(tmp_path / "guide")
    text = (guide / BASE / "pretrain.sh").read_text()
    name = flag.split()[0].removeprefix("--")
    text = text.replace(flag, "").replace("NODES=${NODES:-1}", "NODES=2")
    value = shlex.quote(word.format(hit=tmp_path / "hit"))
    text = text.replace("torchrun $LAUNCH", f"torchrun $LAUNCH --{name} {value}")
    text = text if name == "nnodes" else text.replace('LAUNCH="', 'LAUNCH="--nnodes 2 ', 1)
    (guide / BASE / "pretrain.sh").write_text(text)
    with pytest.raises(InputError, match="not a usable value"):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


FOREIGN = [
    ("source ./set_env.sh", "./set_env.sh"),
    ("source /tmp/stranger/set_env.sh", "/tmp/stranger/set_env.sh"),
    (". $HERE/set_env.sh", "$HERE/set_env.sh"),
    ("HERE=/tmp/x; . $HERE/set_env.sh", "/tmp/x/set_env.sh"),
    ("source /usr/local/Ascend/../../../tmp/set_env.sh", "../tmp/set_env.sh"),
    ("source '/usr/local/Ascend/;touch hit;/set_env.sh'", "touch hit"),
    ("source /usr/local/Ascend/$(touch hit)/set_env.sh", "touch hit"),
    ("source /home/somebody/Ascend/cann/set_env.sh", "somebody"),
    ('source "~/Ascend/a\nb/set_env.sh"', "Ascend/a"),
    ("export ASCEND_ENV=./stranger.sh", "stranger.sh"),
    ("export ASCEND_ENV=stranger.sh", "stranger.sh"),
    ("export OMP_TOOL_LIBRARIES=/tmp/x/tool.so", "tool.so"),
    ("export ASCEND_CUSTOM_OPP_PATH=/tmp/x", "ASCEND_CUSTOM_OPP_PATH"),
    ("export HCCL_X='$(touch hit)'", "touch hit"),
    ("export HCCL_X=$(touch hit)", "touch hit"),
    ('export HCCL_CONNECT_TIMEOUT="1`touch hit`"', "touch hit"),
    ("export TORCH_X='`touch hit`'", "touch hit"),
]


@pytest.mark.parametrize(("line", "part"), FOREIGN)
@pytest.mark.parametrize("name", ["pretrain.sh", "feature_extract/feature_extraction.sh"])
def test_what_would_run_is_left_to_the_user(tmp_path, capsys, line, part, name):
    guide = write_guide(tmp_path / "guide")
    with_line(guide, line, name)
    migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert part not in (tmp_path / "out/commands.sh").read_text()
    assert ". /usr/local/Ascend/cann/set_env.sh" in (tmp_path / "out/commands.sh").read_text()
    [said] = [said for said in capsys.readouterr().out.splitlines() if said.startswith("look at this yourself: ")]
    assert part in said
    [row] = [r for r in (tmp_path / "out/report.md").read_text().splitlines() if "| look at this yourself |" in r]
    assert part in row
    run_commands(tmp_path / "out", tmp_path)
    assert not list(tmp_path.rglob("hit"))


@pytest.mark.parametrize(
    "line",
    ["export PATH=/tmp/x", "export LD_PRELOAD=/tmp/x.so", "export PATH=$(touch hit)", "export HCCL_$(touch hit)=1",
     "export HCCL_X", "source", "export HCCL_X[$(touch hit)]=1", "HCCL_\u00c9=/tmp/x torchrun $LAUNCH x.py", "export HCCL_\u00c9=/tmp/x", "PYTHONPATH=/tmp/x true"],
)  # fmt: skip
def test_what_could_change_anything_is_refused(tmp_path, line):
    guide = write_guide(tmp_path / "guide")
    with_line(guide, line)
    with pytest.raises(InputError):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    ["MBS=$(touch hit)", 'MBS="`touch hit`"', "eval touch hit", "touch hit", f"MBS=$(touch hit {'x' * 100_000})"],
    ids=range(5),
)
def test_a_value_that_the_command_needs_is_asked_for(tmp_path, line):
    guide = write_guide(tmp_path / "guide")
    with_line(guide, line)
    with pytest.raises(InputError, match=r"(touch|eval).* look at this yourself and write what it comes to") as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", ["~/Ascend/cann/set_env.sh", "$HOME/Ascend/cann/set_env.sh", '"${HOME}/Ascend/cann/set_env.sh"']
)
def test_the_users_own_cann_is_sourced(tmp_path, path):
    guide = write_guide(tmp_path / "guide")
    with_line(guide, f"A=/usr/local/Ascend\n. $A/nnal/atb/set_env.sh\nsource {path}")
    migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert ". /usr/local/Ascend/nnal/atb/set_env.sh;" in (tmp_path / "out/commands.sh").read_text()
    home = tmp_path / "a home"
    (home / "Ascend/cann").mkdir(parents=True)
    (home / "Ascend/cann/set_env.sh").write_text(f"echo $NOT_THERE > {tmp_path}/sourced\n")
    run_commands(tmp_path / "out", home)
    assert (tmp_path / "sourced").exists()


@pytest.mark.parametrize("path", ["./other.sh", "~/.bashrc", "$(touch hit; echo other.sh)", "'a b/other.sh'"])
def test_what_is_sourced_first_is_left_to_the_user(tmp_path, capsys, path):
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    script.write_text(f"source {path}\n{script.read_text()}\n. /tmp/x/after.sh")
    migrate.main([str(guide), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/commands.sh").read_text()
    assert not any(word in text for word in ("bashrc", "other.sh", "after.sh"))
    said = [said for said in capsys.readouterr().out.splitlines() if said.startswith("look at this yourself: ")]
    assert [path.strip("'") in line for line in said] == [True, False]
    assert "HCCL_CONNECT_TIMEOUT=1200 NPUS_PER_NODE=8" in text
    run_commands(tmp_path / "out", tmp_path)
    assert not list(tmp_path.rglob("hit"))


def test_what_was_set_before_something_is_sourced_is_not_known_after(tmp_path, capsys):
    guide = write_guide(tmp_path / "guide")
    script = guide / BASE / "pretrain.sh"
    text = script.read_text()
    script.write_text(text.replace("N=8", "source ./other.sh\nN=8", 1))
    migrate.main([str(guide), "--out", str(tmp_path / "out")])
    found = (tmp_path / "out/commands.sh").read_text()
    assert "\nNPUS_PER_NODE=8" in found  # no HCCL_CONNECT_TIMEOUT before it
    assert "look at this yourself: pretrain.sh: HCCL_CONNECT_TIMEOUT" in capsys.readouterr().out
    script.write_text(text.replace("LAUNCH=", "source ./other.sh\nLAUNCH=", 1))
    with pytest.raises(InputError, match=r"\$N may be set by \./other\.sh, .*; look at this yourself"):
        migrate.main([str(guide), "--out", str(tmp_path / "again")])


def test_a_value_that_nothing_needs_has_a_line_too(tmp_path):
    migrate.main([str(write_guide(tmp_path / "guide")), "--out", str(tmp_path / "out")])
    assert "| `log` | - | not needed | $(date +%s) is known when" in (tmp_path / "out/report.md").read_text()


def test_of_many_refused_fields_twenty_are_named(tmp_path):
    guide = write_guide(tmp_path / "guide", [("model.json", f"f{i}", i) for i in range(1000)])
    with pytest.raises(InputError, match=r"^1000 of its fields .* f19 19: .*; and 980 more$") as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert len(str(error.value)) < 4000
    assert os.linesep not in str(error.value)
