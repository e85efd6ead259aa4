"""What is said of the ladder's rungs: one that did not run is never taken for one that passed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.ascend import ladder, overlay


def reports(**some: list[str]) -> dict[str, list[SimpleNamespace]]:
    """Of tests in these files, by outcome."""
    report = lambda file: SimpleNamespace(nodeid=f"tests/ascend/{file}::test", longrepr=("", 1, "Skipped: no reason"))
    return {"passed": [], "failed": [], "skipped": []} | {key: [*map(report, files)] for key, files in some.items()}


@pytest.mark.parametrize(
    ("some", "said"),
    [
        ({}, None),
        ({"passed": ["test_rung3.py"]}, None),
        ({"passed": ["test_rung4.py", "test_wheel_bugs.py", "test_rung3.py"]}, "RAN 2 checks"),
        ({"passed": ["test_rung4.py"], "failed": ["test_wheel_bugs.py"]}, "RAN 2 checks, 1 FAILED"),
        ({"failed": ["test_rung4.py"]}, "RAN 1 checks, 1 FAILED"),
        ({"passed": ["test_rung4.py"], "skipped": ["test_rung4.py"]}, "RAN 1 checks"),
        ({"skipped": ["test_rung4.py"]}, "SKIPPED: no reason"),
    ],
)
def test_what_is_said_of_rung_4(some, said):
    assert ladder.verdict(4, reports(**some)) == said


@pytest.mark.parametrize("rung", ladder.FILES)
def test_a_rung_is_excused_only_by_its_machine(rung, monkeypatch, tmp_path):
    monkeypatch.setattr(overlay, "folder", lambda name: tmp_path)
    monkeypatch.setattr(overlay, "foreign", lambda: None)
    assert not ladder.excused(rung)
    (tmp_path / "missing").write_text("gcc is not installed\n")
    assert not ladder.excused(rung)
    (tmp_path / "missing").write_text(f"{overlay.UNREACHABLE}\n")
    assert ladder.excused(rung) == (rung != 1)  # which needs no wheel
    monkeypatch.setattr(overlay, "foreign", lambda: "Darwin arm64")
    assert ladder.excused(rung)


def test_a_session_without_a_rung_that_must_run_fails():
    """In .venv no test of rung 3 is collected, and what is there passes."""
    command = "-m pytest -q -p tests.ascend.ladder --rungs 3 -k declared_twice tests/ascend"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=overlay.ROOT, capture_output=True, text=True, timeout=300
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    if ladder.excused(3):
        pytest.skip(f"rung 3 need not run here: {overlay.foreign() or ladder.missing(3)}")
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("rung 3: "))
    assert line.startswith("rung 3: SKIPPED")
    assert line.endswith("(which is a failure: this machine can run it)")
