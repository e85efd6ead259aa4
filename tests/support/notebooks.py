"""make notebooks: run every notebook, and keep what it shows in its .ipynb.

    python -m tests.support.notebooks [NUMBER ...]

The .py of a pair is what is edited; the .ipynb is made from it.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from tests.support import project_copy
from tests.support.paths import ROOT

FOLDER = ROOT / "experiments" / "notebooks"


def made(path: Path, copy: Path) -> nbformat.NotebookNode:
    """The notebook of a .py, run in a copy of the project, with its outputs and nothing that changes from run to run."""
    notebook = jupytext.read(path)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(copy / "experiments" / "notebooks")}},
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    return notebook


def main(numbers: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = project_copy.make(Path(folder) / "project")
        os.environ.update(project_copy.environment(copy))
        for path in sorted(FOLDER.glob("[1-9]*.py")):
            if not numbers or path.name[0] in numbers:
                begun = time.perf_counter()
                nbformat.write(made(path, copy), path.with_suffix(".ipynb"))
                print(f"{path.with_suffix('.ipynb').name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
