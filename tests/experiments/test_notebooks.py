"""The notebooks: each pair holds the same cells, every cell was run and its output is kept, and every cell runs."""

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import project_copy
from tests.support.project_copy import ROOT

NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("[1-9]*.py"))
# The training is cut short: that it runs is tested here, what it teaches in `make demo`.
SHORTER = {"3_fine_tune_in_five_minutes": ("STEPS, BATCH = 300, 32", "STEPS, BATCH = 2, 4")}
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return project_copy.make(tmp_path_factory.mktemp("notebooks") / "project")


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@named
def test_pair_holds_the_same_cells(path):
    ours, theirs = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in ours.cells] == [(c.cell_type, c.source) for c in theirs.cells]
    code = [cell for cell in theirs.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [out.output_type for cell in code for out in cell.outputs]
    assert "error" not in kinds
    assert "display_data" in kinds  # a figure, visible where code is shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@named
def test_notebook_runs(path, copy, monkeypatch):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    if path.stem in SHORTER:
        before, after = SHORTER[path.stem]
        assert sum(before in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(before, after)
    for name, value in project_copy.environment(copy).items():
        monkeypatch.setenv(name, value)
    here = {"metadata": {"path": str(copy / "experiments" / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here).execute()
