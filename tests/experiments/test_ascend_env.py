"""The environment of an NPU: what the guide's table allows passes, what it does not is named; which device `auto` is."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import ascend_env, devices, finetune, pretokenize, sample
from experiments.ascend_env import TABLE
from lumina_fn.errors import InputError
from tests.support.paths import ROOT

LAUNCH = ROOT / "experiments" / "launch"
BY_NAME = {variable.name: variable for variable in TABLE}
# The guide's table: each variable with values at the ends of its range, and values just beyond it.
GUIDE = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": (["0", "1"], ["2", "-1", "True"]),
    "ASCEND_GLOBAL_LOG_LEVEL": (["0", "1", "2", "3", "4"], ["5", "-1", "ERROR"]),
    "TASK_QUEUE_ENABLE": (["0", "1", "2"], ["3", "-1", "on"]),
    "COMBINED_ENABLE": (["0", "1"], ["2", "-1", "true"]),
    "CPU_AFFINITY_CONF": (["0", "1", "2"], ["3", "-1", "fine"]),
    "HCCL_CONNECT_TIMEOUT": (["120", "1200", "7200"], ["119", "7201", "120s", "120.5"]),
    "PYTORCH_NPU_ALLOC_CONF": (
        ["expandable_segments:True", "expandable_segments:False"],
        ["expandable_segments", "expandable_segments:1", "True"],
    ),
    "HCCL_EXEC_TIMEOUT": (["68", "1800", "17340"], ["67", "17341", "0", "1e3"]),
    "ACLNN_CACHE_LIMIT": (["1", "10000", "10000000"], ["0", "10000001", "10,000", "9" * 30]),
    "TOKENIZERS_PARALLELISM": (["False", "True", "false", "true"], ["maybe", "2"]),
    "MULTI_STREAM_MEMORY_REUSE": (["0", "1"], ["2", "-1"]),
    "NPU_ASD_ENABLE": (["0", "1", "2", "3"], ["4", "-1"]),
    "ASCEND_LAUNCH_BLOCKING": (["0", "1"], ["2", "yes"]),
    "NPUS_PER_NODE": (["1", "8", "16"], ["0", "-8", "8.0", "auto"]),
}


def test_the_table_is_the_guides():
    assert [variable.name for variable in TABLE] == list(GUIDE)


@pytest.mark.parametrize("name", GUIDE)
def test_values_in_range_pass_and_others_are_named(name):
    allowed, refused = GUIDE[name]
    for value in allowed:
        assert ascend_env.problems({name: value}) == []
    for value in [*refused, "", " ", f"{allowed[0]} ", f"{allowed[0]}\n", "\u0661"]:
        (problem,) = ascend_env.problems({name: value})
        assert problem == f"{name}={value}: expected {BY_NAME[name].values}"
    default = BY_NAME[name].default
    assert default is None or BY_NAME[name].allows(default)


def test_what_is_not_set_is_no_problem():
    assert ascend_env.problems({"PATH": "/bin"}) == []


def test_an_error_names_every_variable_that_is_wrong():
    environment = {"HCCL_EXEC_TIMEOUT": "5", "NPU_ASD_ENABLE": "9", "COMBINED_ENABLE": "1"}
    with pytest.raises(InputError) as error:
        ascend_env.check(environment, "error", print)
    assert "HCCL_EXEC_TIMEOUT=5: expected a whole number from 68 to 17340" in str(error.value)
    assert "NPU_ASD_ENABLE=9: expected 0, 1, 2 or 3" in str(error.value)
    assert "COMBINED_ENABLE" not in str(error.value)
    assert "--env-check warn" in str(error.value)


def test_a_warning_lets_the_run_go_on():
    said = []
    ascend_env.check({"NPU_ASD_ENABLE": "9"}, "warn", said.append)
    assert said == ["warning: NPU_ASD_ENABLE=9: expected 0, 1, 2 or 3"]


def test_values_in_force_are_those_set_or_the_defaults():
    lines = ascend_env.effective({"HCCL_EXEC_TIMEOUT": "70"})
    assert len(lines) == len(TABLE)
    assert {"HCCL_EXEC_TIMEOUT=70", "HCCL_CONNECT_TIMEOUT is not set (120)"} <= set(lines)


def command(**environment: str) -> subprocess.CompletedProcess:
    """The command, where torch cannot be imported."""
    outside = {name: value for name, value in os.environ.items() if name not in GUIDE}
    code = "import sys; sys.modules['torch'] = None; from experiments import ascend_env; from lumina_fn.process import entry; entry.run(ascend_env.main)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**outside, **environment}, capture_output=True, text=True, timeout=60
    )  # fmt: skip


def test_the_command_prints_the_table_without_torch():
    done = command(HCCL_EXEC_TIMEOUT="70")
    assert (done.returncode, done.stderr) == (0, "")
    assert "HCCL_EXEC_TIMEOUT=70\n" in done.stdout
    assert all(variable.name in done.stdout and variable.meaning in done.stdout for variable in TABLE)


def test_the_command_says_what_is_wrong():
    done = command(TASK_QUEUE_ENABLE="7\x1b[2J")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert r"TASK_QUEUE_ENABLE=7\x1b[2J: expected 0, 1 or 2" in done.stderr
    assert "\x1b" not in done.stdout


def exports(**environment: str) -> dict[str, str]:
    """What the processes of a launch script find set, of a shell that has only this in its environment."""
    script = f'. "{LAUNCH / "ascend_env.sh"}"; exec env -0'
    done = subprocess.run(
        ["bash", "-euc", script], env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True,
        timeout=10, check=True,
    )  # fmt: skip
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def test_the_launch_scripts_defaults_are_in_range():
    given = exports()
    assert ascend_env.problems(given) == []
    guides = {"TASK_QUEUE_ENABLE": "2", "COMBINED_ENABLE": "1", "CPU_AFFINITY_CONF": "1", "HCCL_CONNECT_TIMEOUT": "1200",
              "ASCEND_SLOG_PRINT_TO_STDOUT": "0", "ASCEND_GLOBAL_LOG_LEVEL": "3", "NPUS_PER_NODE": "8",
              "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}  # fmt: skip
    assert guides.items() <= given.items()


def test_a_variable_that_is_set_keeps_its_value():
    mine = {name: allowed[-1] for name, (allowed, _) in GUIDE.items()}
    assert mine.items() <= exports(**mine).items()


def test_canns_own_environment_is_sourced_where_it_is(tmp_path):
    (tmp_path / "set_env.sh").write_text("export ASCEND_HOME_PATH=/opt/cann:$NOT_SET COMBINED_ENABLE=0\n")
    given = exports(ASCEND_ENV=str(tmp_path / "set_env.sh"))
    assert given["ASCEND_HOME_PATH"] == "/opt/cann:"
    assert given["COMBINED_ENABLE"] == "0"
    assert "ASCEND_HOME_PATH" not in exports(ASCEND_ENV=str(tmp_path / "nowhere.sh"))


def test_every_launch_script_sources_it():
    scripts = {path for path in LAUNCH.iterdir() if path.name != "ascend_env.sh"}
    assert {path.name for path in scripts} == {"ascend_1x8.sh", "ascend_2x8.sh", "ascend_slurm.sh"}
    assert all(re.search(r'^\. ".*/ascend_env\.sh"$', path.read_text(), re.MULTILINE) for path in scripts)


def test_the_docs_table_is_this_one():
    page = (ROOT / "docs/how-to/from-mindspeed.md").read_text()
    given = exports()
    rows = [
        f"| `{v.name}` | {v.values} | {v.meaning} | {f'`{v.default}`' if v.default else '-'} | "
        + (f"`ascend_env.sh` exports `{given[v.name]}` |" if v.name in given else "left alone |")
        for v in TABLE
    ]
    assert "\n".join(rows) in page


def say_nothing(line: str) -> None:
    raise AssertionError(line)


ASSETS = ROOT / "experiments" / "demo" / "assets"
COMMANDS = {
    finetune: ["--features", "nowhere"],
    pretokenize: ["nowhere.json", "--vq", ASSETS / "vq", "--size", 64],
    sample: ["--vq", ASSETS / "vq", "--prompt", "a red heart"],
}


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_commands_for_an_npu_check_and_offer_to_warn(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "5")
    out = [tmp_path / "out"] if kind is pretokenize else ["--out", tmp_path / "out"]
    argv = [*COMMANDS[kind], *out, "--model", ASSETS / "lm", "--device", "npu:99"]
    with pytest.raises(InputError, match="HCCL_EXEC_TIMEOUT=5: expected a whole number from 68 to 17340"):
        kind.main([*map(str, argv)])
    with pytest.raises(InputError, match="--device npu:99: not available here"):
        kind.main([*map(str, argv), "--env-check", "warn"])
    assert not (tmp_path / "out").exists()


def test_on_a_cpu_the_environment_is_nobodys_business(monkeypatch):
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "5")
    run = SimpleNamespace(device="cpu", env_check="error")
    assert devices.checked_device(run, say=say_nothing) == torch.device("cpu")


def on_npu(run: SimpleNamespace) -> tuple[list[str], list[str]]:
    """What is said, and the devices that were asked for, where `npu` is one that can be had."""
    said, asked = [], []
    devices.checked_device(run, lambda name: asked.append(name) or torch.device("cpu"), said.append)
    return said, asked


def test_on_an_npu_it_is_checked_before_the_device_is_touched(monkeypatch):
    for name in GUIDE:
        monkeypatch.delenv(name, raising=False)
    said, asked = on_npu(SimpleNamespace(device="npu:0", env_check="error"))
    assert (said, asked) == (ascend_env.effective({}), ["npu:0"])
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "5")
    touched = lambda name: pytest.fail("the device was touched")
    with pytest.raises(InputError, match="HCCL_EXEC_TIMEOUT=5"):
        devices.checked_device(SimpleNamespace(device="npu", env_check="error"), touched, say_nothing)
    said, asked = on_npu(SimpleNamespace(device="npu", env_check="warn"))
    assert said[0].startswith("warning: HCCL_EXEC_TIMEOUT=5")
    assert asked == ["npu"]


def test_auto_prefers_an_npu_then_a_gpu_then_the_cpu(monkeypatch):
    there = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    assert devices.kind("auto") == "cpu"
    monkeypatch.setattr(torch, "cuda", there)
    assert devices.kind("auto") == "cuda"
    monkeypatch.setattr(torch, "npu", there)
    assert devices.kind("auto") == "npu"
    assert devices.kind("cuda:1") == "cuda"


@pytest.mark.skipif(hasattr(torch, "npu"), reason="torch_npu is loaded")
def test_a_missing_npu_says_what_to_do():
    with pytest.raises(InputError, match=r"--device npu: .*torch_npu is not installed: pip install .*set_env\.sh"):
        devices.device("npu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told():
    with pytest.raises(InputError, match="--device cuda: not available here"):
        devices.device("cuda")


def test_a_number_that_no_device_has_is_told():
    with pytest.raises(InputError, match="--device cpu:7: not available here: torch finds 1, numbered from 0"):
        devices.device("cpu:7")
