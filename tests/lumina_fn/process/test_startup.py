"""How a command ends that is interrupted, or that nobody listens to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HELP = [sys.executable, "-m", "experiments.finetune", "--help"]
REPORT = ["report", "experiments/demo/assets/lm/config.json"]
TINY = [sys.executable, "-m", "experiments.dataset", *REPORT]
LUMINA = [Path(sys.executable).with_name("lumina"), "dataset", *REPORT]


@pytest.mark.parametrize("command", [TINY, LUMINA], ids=["python -m", "lumina"])
@pytest.mark.parametrize("wait", [0.1, 0.2, 0.4, 0.7, 1.1, 1.6])
def test_ctrl_c_while_a_command_imports(wait, command):
    """At once, without a traceback; before Python has read its own files there is nothing that could answer."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(wait)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=30)
    done = child.returncode == 0 and "near-duplicates" in said  # it was faster
    # On a busy machine 0.1 s is before Python has read its own `site`, whose traceback nothing of ours can prevent.
    too_early = child.returncode == 1 and "experiments" not in said and "lumina_fn" not in said
    assert done or too_early or child.returncode in (130, -signal.SIGINT)
    assert too_early or "Traceback" not in said


def shell(line: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        f"{sys.executable} -m experiments.pretokenize x y --model m --vq v",
        f"{sys.executable} -m lumina_fn.convert x y --to hf",
        f"{LUMINA[0]} convert x y --to hf",
    ],
)
def test_memory_that_is_refused_while_a_command_imports(command):
    """PyTorch's library alone takes more; a program like it ends with Python's own exit code."""
    ended = shell(f"ulimit -v 300000; {command}")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert ended.stderr.startswith("error: out of memory: ")


def test_an_output_that_cannot_be_written():
    command = " ".join(HELP)
    full = shell(f"{command} > /dev/full")
    assert (full.returncode, full.stderr) == (1, "error: cannot write to standard output: No space left on device; what was asked for may be done: look at its folder\n")  # fmt: skip
    closed = shell(f"set -o pipefail; {command} | head -1")
    assert (closed.returncode, closed.stderr, closed.stdout.count("\n")) == (0, "", 1)
    for stream in ("2>/dev/full", "2>&-", ">&- 2>&-"):
        assert shell(f"{sys.executable} -m experiments.finetune --modle x {stream}").returncode == 2


def test_what_compiles_nothing_does_not_wait_for_the_compiler():
    """Its imports take two seconds."""
    code = """
import sys
from experiments.pretokenizing import run
from experiments.sampling import run as sampling
from experiments.datasets import report, verify
from lumina_fn import config, conversion, model, vq
model.init(config.LUMINA_7B, device="meta")
vq.init(config.VQConfig(), device="meta")
assert not {"torch._dynamo", "torch._functorch.aot_autograd"} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_changes_no_handler():
    code = "import signal; a = signal.getsignal(2); import lumina_fn, experiments; assert signal.getsignal(2) is a"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, check=False).returncode == 0


@pytest.mark.parametrize(("word", "ends"), [("/usr/local/bin/lumina", True), ("/usr/bin/pytest", False)])
def test_the_console_script_ends_at_once_from_its_first_import_on(word, ends):
    code = f"import signal, sys; sys.argv = [{word!r}]; from lumina_fn.process import startup; print(signal.getsignal(2) is startup.end_at_once)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"{ends}\n"


CHOSEN = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}


@pytest.mark.parametrize(
    ("module", "chosen", "policy"),
    [
        ("experiments.finetune", {}, "passive"),
        ("experiments.pretokenize", {}, "passive"),
        ("experiments.sample", {}, None),  # its calls are short: waking threads for each costs a quarter of the time
        *(
            ("experiments.finetune", {name: value}, {"OMP_WAIT_POLICY": value}.get(name))
            for name, value in CHOSEN.items()
        ),
    ],
)
def test_idle_threads_sleep_in_commands_that_gain_by_it_unless_the_user_has_chosen(module, chosen, policy):
    """It is set before PyTorch is loaded, which reads it once."""
    code = f"""
import os, runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit:
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN} | chosen
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert said.splitlines()[-1] == f"{policy} False"


def test_importing_a_command_sets_nothing():
    code = "import os, experiments.finetune, experiments.pretokenize; assert 'OMP_WAIT_POLICY' not in os.environ"
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
