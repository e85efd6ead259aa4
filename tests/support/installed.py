"""The project installed into a fresh virtual environment, which borrows this one's dependencies."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path


def run(*words: object, cwd: Path) -> str:
    """What a command prints, away from the checkout."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(folder: Path, *what: object) -> tuple[Path, Path]:
    """Make a virtual environment in `folder` and install `what` with pip; its python, and its folder of packages."""
    venv.create(folder, with_pip=False)
    program = folder / "bin/python"
    own = Path(run(program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A line of a .pth file adds a folder, and runs none of that folder's own .pth files: this checkout stays out.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [
        program,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--ignore-installed",
    ]
    run(*pip, "--prefix", folder, *what, cwd=folder)
    return program, own
