"""Machines as containers are: without a name that means something, without users, without a folder for temporary files, in any language."""

import os
import subprocess
import sys

import pytest

from tests.experiments.launching import test_launch
from tests.experiments.launching.test_launch import STANDALONE, TORCHRUN, rows, slow
from tests.support.paths import ROOT

launch, inputs = test_launch.launch, test_launch.inputs  # fixtures
# A network of its own without IPv6 and without a way out, and a name that nobody knows. -r: for a user without rights.
ALONE = ("unshare", "-Urnu", "sh", "-c", 'hostname no-such-host && ip link set lo up && exec "$@"', "sh")
NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321")  # a user id without a name
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def refused(command: tuple[str, ...]) -> str | None:
    """Why this machine does not let a process of this user have such a container; None if it does."""
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=10)
    except OSError as error:
        return str(error)
    return None if tried.returncode == 0 else tried.stderr.strip()


def needs(command: tuple[str, ...]) -> pytest.MarkDecorator:
    why = refused(command)
    return pytest.mark.skipif(why is not None, reason=f"SKIPPED: no namespace here: {why}")


MEETING = """
from experiments.launching import start
def main(argv, world):
    print("ranks that met:", world.total(1))
start.run(main)
"""


@slow
@needs(ALONE)
@pytest.mark.parametrize("way", ["torchrun", "job"])
def test_a_name_that_means_nothing_does_not_matter(way, launch):
    """The line of the pages, and a launcher that is not torchrun."""
    python = (sys.executable, "-c", MEETING)
    both = ("sh", "-c", 'RANK=1 "$@" & RANK=0 "$@" && wait $!', "sh", *python)
    standalone = (TORCHRUN, *STANDALONE, "--nproc_per_node", 2, "--no-python", *python)
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    run = launch(*ALONE, *both, **where) if way == "job" else launch(*ALONE, *standalone)
    assert run.wait(60) == 0, run.text()
    assert run.text().count("ranks that met: 2") == 1


@needs(("unshare", "-Urn"))
def test_a_loopback_that_is_down_is_told_at_once():
    script = "from experiments.launching import addresses; addresses.listening('127.0.0.1', 0, many_hosts=False)"
    done = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=20
    )
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 101] Network is unreachable"


@slow
@needs((*ALONE, *NOBODY))
def test_the_script_runs_for_a_user_without_a_name_on_a_machine_without_one(launch, inputs, tmp_path):
    """In the language C, with names in Chinese, and TMPDIR at a folder that is not there."""
    here, out = tmp_path / "数据", tmp_path / "结果"
    here.symlink_to(inputs[3])
    unset = ("env", *(word for name in ("USER", "LOGNAME", "LNAME", "USERNAME") for word in ("-u", name)))
    script = ("bash", ROOT / "experiments/launch/ascend_1x8.sh")
    run = launch(
        *unset, *ALONE, *NOBODY, *script, *inputs, "--features", here, "--out", out, "--steps", 2, LC_ALL="C", LANG="C",
        TMPDIR=str(tmp_path / "没有"), NPUS_PER_NODE="2", PATH=f"{TORCHRUN.parent}:{os.environ['PATH']}",
    )  # fmt: skip
    assert run.wait(60) == 0, run.text()
    assert [row["step"] for row in rows(out)] == [2]
    assert f"2 steps, 0 skipped: {out}/model" in run.text()
    assert run.text().count(f"TMPDIR={tmp_path}/没有: they are written in ") == 1


def help_of(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.sample", "--help"],
        capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=20,
    )  # fmt: skip


def test_a_tmpdir_that_is_not_there_is_one_line(tmp_path):
    done = help_of(TMPDIR=str(tmp_path / "x"))
    assert done.returncode == 0
    assert done.stderr.startswith(
        f"note: no temporary file can be written in TMPDIR={tmp_path}/x: they are written in /"
    )
    assert done.stderr.count("\n") == 1
    assert help_of(TMPDIR=f"{tmp_path}/../{tmp_path.name}/").stderr == ""


def test_no_folder_for_temporary_files_is_one_line(tmp_path):
    """As in a container whose disk is read only. Python would take the folder that the command runs in."""
    script = (
        "import os, sys, tempfile\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc']\n"  # where nobody can write
        "sys.argv[0] = '-m'\nimport lumina_fn"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=20)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: No usable temporary directory found in ['/proc']; name a folder that can be written by TMPDIR\n"
    )


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict"])
def test_a_terminal_that_cannot_show_a_name_is_no_failure(encoding):
    script = "from lumina_fn.process import entry; entry.run(lambda argv: print('图片', 'caf\\u00e9'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": encoding},
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"\u56fe\u7247 caf")
