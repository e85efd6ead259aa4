"""A pytest plugin that says of every rung of the ladder whether it ran, and why not: a skipped test looks like a passed one.

    pytest -p tests.ascend.ladder --rungs 3,4,5 tests/ascend

`--rungs` names those that must run: one that did not makes the session fail, unless the machine is one it cannot run on.
"""

import sys
from pathlib import Path

import pytest

from tests.ascend import overlay

FILES = {
    1: ("test_rung1.py",),
    2: ("test_rung2.py",),
    3: ("test_rung3.py",),
    4: ("test_rung4.py", "test_wheel_bugs.py"),
    5: ("test_rung5.py", "test_npu_sim.py", "test_npu_commands.py", "test_npu_check.py"),
    6: ("test_rung6.py",),
}
# The venv that a rung's tests run in, and the target that runs them.
HOMES = {1: ".venv", 2: ".venv", 3: ".venv-npu", 4: ".venv-npu", 5: ".venv-npu", 6: ".venv-triton"}
TARGETS = {".venv": "make test", ".venv-npu": "make ascend-test", ".venv-triton": "make ascend-kernels"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rungs", default="", help="rungs of tests/ascend that must run, with commas between")


def here() -> str:
    """The name of the venv this is; whatever is not an overlay is .venv."""
    name = Path(sys.prefix).name
    return name if name in TARGETS else ".venv"


def elsewhere() -> list[str]:
    """The files whose tests run in another venv."""
    return [file for rung, files in FILES.items() if HOMES[rung] != here() for file in files]


def missing(rung: int) -> str | None:
    """Why the rung's venv could not be made, where that is so. (Rung 2 reads the wheel that .venv-npu holds.)"""
    name = {2: "npu"}.get(rung, HOMES[rung].removeprefix(".venv").removeprefix("-"))
    note = overlay.folder(name) / "missing"
    return note.read_text().strip() if name and note.exists() else None


def excused(rung: int) -> bool:
    return bool(overlay.foreign()) or missing(rung) == overlay.UNREACHABLE


def verdict(rung: int, reports: dict[str, list[pytest.TestReport]]) -> str | None:
    """What is to be said of a rung, given the session's reports by outcome; None of one without tests in it."""
    of_rung = {
        key: [r for r in some if r.nodeid.partition("::")[0].endswith(FILES[rung])] for key, some in reports.items()
    }
    if ran := len(of_rung["passed"]) + len(of_rung["failed"]):
        return f"RAN {ran} checks" + (f", {len(of_rung['failed'])} FAILED" if of_rung["failed"] else "")
    if of_rung["skipped"]:
        return f"SKIPPED: {of_rung['skipped'][0].longrepr[2].removeprefix('Skipped: ')}"
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or hasattr(session.config, "workerinput"):  # a worker: its controller speaks
        return
    wanted = [int(rung) for rung in session.config.getoption("--rungs", "").split(",") if rung]
    reports = {key: terminal.stats.get(key, []) for key in ("passed", "failed", "skipped")}
    lines = []
    for rung in FILES:
        said = verdict(rung, reports)
        if said is None and wanted:
            said = f"SKIPPED: {missing(rung) or f'it has no tests here; {TARGETS[HOMES[rung]]} runs it'}"
        if said is not None:
            lines.append(f"rung {rung}: {said}")
        if rung in wanted and said.startswith("SKIPPED") and not excused(rung):
            lines[-1] += " (which is a failure: this machine can run it)"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    session.config.stash[LINES] = lines


LINES = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash.get(LINES, []):
        terminalreporter.line(line)
