"""What is known only when a script runs is asked for where it decides results, and else left to whoever runs commands.sh.

Bash, with a torchrun that prints what it is given, is the oracle of what a script's lines come to.
"""

import os
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments import finetune, migrate
from experiments.migration import shell
from lumina_fn.errors import InputError
from lumina_fn.process.flags import parse
from tests.support.extracted_features import write_alpha
from tests.support.mindspeed_guide import BASE, TRAIN, migrated, write_guide

SCRIPTS = ("pretrain.sh", "feature_extract/feature_extraction.sh")


def edited(guide, *changes, names=SCRIPTS[:1]):
    """The guide with (old, new) pairs of text in these scripts."""
    for name in names:
        script = guide / BASE / name
        text = script.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        script.write_text(text)
    return guide


def written(guide, out, *flags):
    migrate.main([str(guide), "--out", str(out), *flags])
    return (out / "commands.sh").read_text()


def with_bash(script, folder, *arguments):
    """The words that torchrun is given, and the folder that it is started in."""
    code = f'torchrun() {{ printf "%s\\0" "$PWD" "$@" >&3; }}; conda() {{ :; }}; source() {{ :; }}; . {script} "$@"'
    done = subprocess.run(["bash", "-c", f"{code} 3>{script}.seen", script, *arguments], cwd=folder, capture_output=True, text=True)  # fmt: skip
    folder, *words = (script.parent / f"{script.name}.seen").read_text().split("\0")[:-1]
    return folder, words, done


def counted(guide):
    """Devices and machines are known when the scripts run, and the batch follows from them."""
    return edited(guide, ("N=8", "NPUS_PER_NODE=$(ls /dev/davinci* | wc -l)\nN=$NPUS_PER_NODE"), ("NODES=${NODES:-1}", "NNODES=${1:-2}\nNODES=$NNODES"),
        ("LAUNCH=", "NODE_RANK=$RANK\nLAUNCH="), ("--node_rank 0", "--node_rank $NODE_RANK"))  # fmt: skip


def test_all_that_decides_results_is_asked_for_at_once(tmp_path):
    guide = counted(write_guide(tmp_path / "guide"))
    edited(guide, ("--lr 2e-5", "--lr $LR"), ("--train-iters 500", '--train-iters "$2"'))
    with pytest.raises(InputError) as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out"), "--set", "NPUS_PER_NODE=8"])
    said = str(error.value)
    assert said.startswith("3 values are known only when the scripts run")
    assert "NNODES (line 7: ${1:-2} is known when the script runs) decides --global-batch-size" in said
    assert "$LR is set nowhere" in said
    assert all(f"--set {name}=..." in said for name in ("2", "LR", "NNODES"))
    assert "NODE_RANK, which commands.sh takes" in said
    assert not (tmp_path / "out").exists()
    flags = [word for name in ("NPUS_PER_NODE=4", "NNODES=3", "LR=1e-4", "2=70") for word in ("--set", name)]
    text = written(guide, tmp_path / "out", *flags)
    assert "NPUS_PER_NODE=4 NNODES=3" in text
    assert "--steps 70 --batch 48 --micro-batch 2 --lr 0.0001" in text


def test_refused_fields_and_open_values_are_one_message(tmp_path):
    guide = counted(write_guide(tmp_path / "guide", extra="--fp16"))
    with pytest.raises(InputError, match=r"^2 values .*; 1 of its fields would change results: .*--fp16"):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("line", "given", "seen"),
    [
        ("N=$(ls /dev/davinci* | wc -l)", {"NPUS_PER_NODE": "4"}, "4"),
        ("N=$(ls /dev/davinci* | wc -l)", {}, None),
        ("N=${1:-16}", {}, "16"),
        ("N=${1:-16}", {"NPUS_PER_NODE": "4"}, "4"),
        ("N=${1:-$(touch hit)}", {}, None),
        ("N=$MINE", {"MINE": "5"}, "5"),
        ("N=$MINE", {"MINE": "5", "NPUS_PER_NODE": "6"}, "6"),
        ("N=`nvidia-smi -L | wc -l`", {"NPUS_PER_NODE": "$(touch hit)"}, "$(touch hit)"),
    ],
)
def test_what_changes_no_result_is_left_to_who_runs_the_commands(tmp_path, line, given, seen):
    """The batch is known: how many devices share it changes no result."""
    guide = edited(write_guide(tmp_path / "guide"), ("LAUNCH=", f"{line}\nLAUNCH="))
    text = written(guide, tmp_path / "out")
    assert "--batch 32" in text
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("bash", "torchrun", "python", "cp"):
        (stubs / name).write_text(f'#!/bin/sh\necho "{name} $NPUS_PER_NODE" >> {tmp_path}/seen\n')
        (stubs / name).chmod(0o755)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "HOME": str(tmp_path), **given}
    done = subprocess.run(["/bin/bash", tmp_path / "out/commands.sh"], env=environment, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    if seen is None:  # before hours of work
        assert done.returncode != 0
        assert "NPUS_PER_NODE=... bash commands.sh" in done.stderr
        assert "line 6:" in done.stderr  # of commands.sh, in which the features come later
        assert not (tmp_path / "seen").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert f"bash {seen}\n" in (tmp_path / "seen").read_text()
    assert not list(tmp_path.rglob("hit"))


def test_several_machines_take_what_is_open_from_their_environment(tmp_path):
    guide = counted(write_guide(tmp_path / "guide"))
    edited(guide, ("GBS=$(($N*$NODES*$MBS*2))", "GBS=64"), ("--master_addr localhost", "--master_addr $(hostname -I)"))
    text = written(guide, tmp_path / "out")
    line = next(line for line in text.splitlines() if "ascend_2x8.sh" in line)
    assert 'NNODES="${NNODES:-2}"' in line
    assert 'NODE_RANK="${NODE_RANK:-${RANK:?' in line
    assert 'MASTER_ADDR="${MASTER_ADDR:?' in line
    assert "hostname" not in text
    subprocess.run(["bash", "-n", tmp_path / "out/commands.sh"], check=True)


def test_on_one_machine_its_number_and_address_are_not_needed(tmp_path):
    guide = edited(
        write_guide(tmp_path / "guide"), ("--node_rank 0", "--node_rank $RANK"), ("localhost", "$(hostname)")
    )
    line = next(line for line in written(guide, tmp_path / "out").splitlines() if "ascend_1x8.sh" in line)
    assert "NPUS_PER_NODE=8 NNODES=1 MASTER_PORT=6000 bash" in line


@pytest.mark.parametrize("flag", ["--num-workers $(nproc)", "--tensorboard-dir $LOG_DIR", "--distributed-timeout-minutes ${3:-10}"])  # fmt: skip
def test_what_decides_nothing_is_not_asked_for(tmp_path, flag):
    guide = write_guide(tmp_path / "guide", extra=flag)
    migrated(guide, tmp_path / "out")
    assert f"| pretrain.sh | `{flag.split()[0]}` |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("$EXTRA", "--set EXTRA=..."),
        ("--bf16 $EXTRA", "--set EXTRA=..."),
        ("--bf16 word", "a word that belongs to no flag"),
        ('"$@"', "known when the script runs"),
        ("--seed $(date +%s)", "write what it comes to"),
        ("--seed $(($(date +%s)%7))", "write what it comes to"),
        ("--lr-decay-iters ${PLACE%/}", "write what it comes to"),
    ],
)
def test_what_could_hold_anything_is_not_passed_over(tmp_path, extra, said):
    with pytest.raises(InputError) as error:
        migrate.main([str(write_guide(tmp_path / "guide", extra=extra)), "--out", str(tmp_path / "out")])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("NODES", "expected a variable"),
        ("A B=2", "expected a variable"),
        ("=2", "expected a variable"),
        ("0=x", "expected a variable"),
        ("MBS=1\n2", "expected a variable"),
        ("MBS=\ue0001\ue001", "expected a variable"),
        ("NODE=2", "no variable or argument NODE is in"),
    ],
)
def test_a_set_that_sets_nothing_is_refused(tmp_path, flag, said):
    guide = str(write_guide(tmp_path / "guide"))
    with pytest.raises(InputError, match=said):
        migrate.main([guide, "--out", str(tmp_path / "out"), "--set", flag])
    with pytest.raises(InputError, match="--set MBS is given twice"):
        migrate.main([guide, "--out", str(tmp_path / "out"), "--set", "MBS=1", "--set", "MBS=2"])


def test_a_batch_that_follows_from_the_devices_is_asked_for(tmp_path):
    """Where the flag is missing it is a micro batch for each device."""
    guide = edited(write_guide(tmp_path / "guide"), ("N=8", "N=$(nproc)"), (" --global-batch-size $GBS", ""))
    with pytest.raises(InputError, match=r"^1 value is .* N \(line 5: \$\(nproc\) .* decides the batch.*--set N="):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert "--batch 8 --micro-batch 2" in written(guide, tmp_path / "out", "--set", "N=4")


def test_a_set_comes_before_a_default(tmp_path):
    guide = write_guide(tmp_path / "guide", extra="--seed ${SEED:-3}")
    assert "--seed 3" in written(guide, tmp_path / "out")
    assert "--seed 4" in written(guide, tmp_path / "set", "--set", "SEED=4")


def test_features_have_no_scripts(tmp_path):
    write_alpha(tmp_path / "theirs", [(4, 4)])
    with pytest.raises(InputError, match=r"--set N=1: .* holds extracted features, and no scripts"):
        migrate.main([str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), "--set", "N=1"])


def test_a_set_holds_for_what_follows_from_it_and_runs_nothing(tmp_path):
    guide = write_guide(tmp_path / "guide")
    found = migrated(guide, tmp_path / "out")
    migrate.main([str(guide), "--out", str(tmp_path / "set"), "--set", "MBS=4", "--set", "SAVE_PATH=$(touch hit)"])
    text = (tmp_path / "set/commands.sh").read_text()
    assert parse(finetune.Settings, None, found["experiments.finetune"]).batch == 32
    assert "--batch 64 --micro-batch 4" in text
    assert f"--out '{guide}/$(touch hit)'" in text


PLACES = [
    "cd {guide}",
    'cd "{guide}" || exit 1',
    "cd $(dirname $0)/../../..",
    'cd "$(dirname "${{BASH_SOURCE[0]}}")/../../../"',
    'HERE="$(cd "$(dirname "$0")" && pwd)"\ncd $HERE/../../..',
    "ROOT=$(pwd); cd mindspeed_mm; cd ..; cd -P $ROOT",
    "cd `pwd`/examples && cd ..",
]
OTHERS = ["cd ./mindspeed_mm", "cd {guide}/examples; cd ../mindspeed_mm/tools"]


@pytest.mark.parametrize("line", PLACES + OTHERS)
def test_a_change_of_folder_is_where_paths_are_found_from(tmp_path, line):
    guide = write_guide(tmp_path / "guide")
    edited(guide, ("N=8", f"{line.format(guide=guide)}\nN=8"), names=SCRIPTS if line in OTHERS else SCRIPTS[:1])
    script = guide / BASE / "pretrain.sh"
    folder, words, _ = with_bash(script, guide)
    read = shell.read(script, str(guide))
    assert (read.folder, read.command) == (folder, words)
    text = written(guide, tmp_path / "out")
    assert f"--model {os.path.normpath(folder + '/converted')} " in text
    assert "| pretrain.sh | `cd` |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cd", "`cd` without one folder"),
        ("cd -", "`cd` without one folder"),
        ("cd nowhere", "`cd` to nowhere, which is not there"),
        ("cd '/a\nb'", "control characters"),
        ("cd $WORK", "--set WORK=..."),
        ("cd ~/mm", "--set HOME=..."),
        ("[ -d x ] && cd examples", "depends on what ran before"),
        ("pushd examples", "`pushd` is not read"),
    ],
)
def test_a_folder_that_is_not_known_is_named(tmp_path, line, said):
    guide = edited(write_guide(tmp_path / "guide"), ("N=8", f"{line}\nN=8"))
    with pytest.raises(InputError) as error:
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    assert said in str(error.value)


def test_a_folder_elsewhere_is_taken_as_it_is_written(tmp_path):
    """The scripts may come from another machine."""
    guide = edited(write_guide(tmp_path / "guide"), ("N=8", "cd $WORK/mm\nN=8"), names=SCRIPTS)
    text = written(guide, tmp_path / "out", "--set", "WORK=/home/me")
    assert "# The guide's scripts worked in /home/me/mm:" in text
    assert "experiments.pretokenize /home/me/mm/set/data.json /home/me/mm/feats" in text


@pytest.mark.parametrize(
    "line",
    ["set -e", "set -euo pipefail", "set -x; ulimit -n 65535", "conda activate mm", "conda activate mm || exit 1", "source activate mm",
     "source ~/miniconda3/etc/profile.d/conda.sh && conda activate mm", 'eval "$(conda shell.bash hook)"', ". venv/bin/activate", ": ${X:=1}"],
)  # fmt: skip
def test_what_prepares_a_shell_changes_no_command(tmp_path, line):
    plain = migrated(write_guide(tmp_path / "guide"), tmp_path / "out")
    edited(tmp_path / "guide", ("N=8", f"N=8\n{line}"), names=SCRIPTS)
    assert migrated(tmp_path / "guide", tmp_path / "again") == plain


@pytest.mark.parametrize(
    "line", ['eval "$(conda shell.bash hook; touch hit)"', "eval $(touch hit)", "eval conda activate"]
)
def test_no_other_text_is_evaluated(tmp_path, line):
    with pytest.raises(InputError, match="`eval` is not read"):
        migrate.main(
            [str(edited(write_guide(tmp_path / "g"), ("N=8", f"N=8\n{line}"))), "--out", str(tmp_path / "out")]
        )


def test_lines_after_an_exit_are_not_run(tmp_path):
    plain = migrated(write_guide(tmp_path / "guide"), tmp_path / "out")
    edited(tmp_path / "guide", ("TIME=", "exit 0\ntorchrun more.py\nTIME="))
    assert migrated(tmp_path / "guide", tmp_path / "again") == plain


COMMENTS = [
    "#  --seed 9 \\",
    "  # --seed 9 \\",
    "# --seed 9",
    "  #",
    "--log-interval 2 # --seed 9 \\",
    "--log-interval 2 \\ ",
]
PLAIN = TRAIN.format(devices=8, extra="").replace("source", ": source")
ARGUMENTS = [at for at, line in enumerate(PLAIN.splitlines()) if line.endswith(("\\", ".log")) or line == '"']


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ARGUMENTS), st.sampled_from(COMMENTS)), min_size=1, max_size=3))
def test_a_comment_among_arguments_is_what_bash_makes_of_it(tmp_path_factory, marks):
    lines = PLAIN.splitlines()
    for at, mark in sorted(marks, reverse=True):
        lines.insert(at, mark)
    script = tmp_path_factory.mktemp("script") / "pretrain.sh"
    script.write_text("\n".join(lines) + "\n")
    _, words, done = with_bash(script, script.parent)
    failed = re.search(": [^ ]*: command not found", done.stdout + done.stderr)
    try:
        read = shell.read(script)
    except InputError:
        assert failed  # bash has no such command either
        return
    assert read.command == words
    assert bool(read.lost) == bool(failed)


def test_arguments_that_a_comment_cuts_off_are_said(tmp_path, capsys):
    guide = edited(write_guide(tmp_path / "guide"), ("    --load $LOAD_PATH", "#   --seed 3 \\\n    --load $LOAD_PATH"))
    with pytest.raises(InputError, match=r"--load : is missing.*line 24: --load \$LOAD_PATH .* no part of the command"):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])
    edited(guide, ("$LAUNCH pretrain_lumina.py", "$LAUNCH pretrain_lumina.py --load $LOAD_PATH --save $SAVE_PATH"))
    migrated(guide, tmp_path / "out")
    assert "note: pretrain.sh: line 24 --load $LOAD_PATH" in capsys.readouterr().out


def test_inside_quotes_there_are_no_comments(tmp_path):
    guide = edited(write_guide(tmp_path / "guide"), ("    --train-iters", "    # --seed 9 \\\n    --train-iters"))
    with pytest.raises(InputError, match="begins no comment inside quotes"):
        migrate.main([str(guide), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("where", ["", BASE])
def test_the_example_is_enough_without_tools_json(tmp_path, capsys, where):
    """Upstream deleted the example: copies of its folder are what people have."""
    expected = migrated(write_guide(tmp_path / "guide"), tmp_path / "out")
    shutil.rmtree(tmp_path / "guide/mindspeed_mm")
    capsys.readouterr()
    assert migrated(tmp_path / "guide" / where, tmp_path / "again") == expected
    assert "note: mindspeed_mm/tools/tools.json: sorafeature.save_path" in capsys.readouterr().out
    (tmp_path / "guide" / BASE).rename(tmp_path / "alone")
    found = migrated(tmp_path / "alone", tmp_path / "third")
    assert {
        k: [w.replace(str(tmp_path / "alone"), str(tmp_path / "guide")) for w in v] for k, v in found.items()
    } == expected
