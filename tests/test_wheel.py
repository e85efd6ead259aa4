"""An installed wheel works away from the project: it is built, put into a fresh virtual environment, and used from another folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.installed import install, run
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
# What the embedded default's pictures and model are, as a user of the wheel finds them.
PREPARE = """
from pathlib import Path
from experiments.demo import splits, tasks
tasks.prepare(Path("data"), splits.fine_tuning()[:4])
print(tasks.LM, tasks.VQ)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # fmt: skip
    for name in filter(lambda name: (ROOT / name).is_file(), files.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
        cwd=folder,
    )
    (made,) = folder.glob("*.whl")
    return made


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"lumina_fn", "ops", "kernels", "experiments"}  # fmt: skip
    for floor in ("lumina_fn", "ops", "kernels", "experiments"):
        assert f"{floor}/py.typed" in names
    for path in (*ROOT.glob("kernels/vendored/*.txt"), *ROOT.glob("experiments/launch/*.sh"), *ROOT.glob("experiments/demo/assets/*/*")):  # fmt: skip
        assert str(path.relative_to(ROOT)) in names


def test_it_works_from_another_folder(wheel, tmp_path):
    program, own = install(tmp_path / "venv", wheel)
    lumina, work = tmp_path / "venv/bin/lumina", tmp_path / "work"
    work.mkdir()
    where = run(
        program, "-c", "import lumina_fn, experiments; print(lumina_fn.__file__, experiments.__file__)", cwd=work
    )
    assert all(Path(path).is_relative_to(own) for path in where.split())
    assert "finetune" in run(lumina, "--help", cwd=work)
    model, vq = run(program, "-W", "ignore", "-c", PREPARE, cwd=work).split()
    run(lumina, "export", model, "npu", "--what", "forward", "--target", "npu", cwd=work)
    run(lumina, "pretokenize", "data/data.json", "features", "--model", model, "--vq", vq, "--size", 64, cwd=work)
    run(lumina, "finetune", "--model", model, "--features", "features", "--out", "run", "--steps", 2, "--compile", "off", "--batch", 2, cwd=work)  # fmt: skip
    run(lumina, "sample", "--model", "run/model", "--vq", vq, "--prompt", "a red star", "--width", 32, "--height", 32, "--out", "pictures", cwd=work)  # fmt: skip
    assert (work / "pictures/0000_00.png").is_file()
