"""The Dockerfile, built as far as a machine without a Docker engine can: its files make a project that installs and answers."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.installed import install, run
from tests.support.paths import ROOT

LINES = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines() if line and line[0] not in "# "]  # fmt: skip


def of(instruction: str) -> list[str]:
    return [rest for name, rest in LINES if name == instruction]


def test_instructions_are_dockers():
    assert {name for name, _ in LINES} <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT"}
    assert LINES[0][0] == "FROM"


def test_torch_is_the_version_that_the_project_asks_for():
    (torch,) = re.findall(r"'torch==([\d.]+)\*'", (ROOT / "Dockerfile").read_text())
    assert f'"torch~={torch}0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_what_is_copied_installs_and_answers(tmp_path):
    copied = tmp_path / "lumina"
    copied.mkdir()
    for line in of("COPY"):
        *sources, target = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, copied / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, copied / source)
    assert any("pip install --no-cache-dir --editable ." in line for line in of("RUN"))
    program, _ = install(tmp_path / "venv", "--editable", copied)
    (entry,) = of("ENTRYPOINT")
    said = run(tmp_path / "venv/bin" / json.loads(entry)[0], cwd=tmp_path)
    assert "finetune" in said
    where = run(program, "-c", "import lumina_fn; print(lumina_fn.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(copied)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0,
    reason="no Docker engine answers here",
)
def test_docker_builds_it():
    subprocess.run(["docker", "build", "--quiet", "--tag", "lumina-fn-test", "."], cwd=ROOT, check=True)
    assert "finetune" in subprocess.check_output(["docker", "run", "--rm", "lumina-fn-test"], text=True)
