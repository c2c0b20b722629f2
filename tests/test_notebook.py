"""The notebook in examples/ prints what it shows."""

import copy
import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "method.ipynb"


def printed(notebook):
    """What each cell printed, in order."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout") for cell in cells]


def pictures(notebook):
    """How many pictures each cell drew."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in cells]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_prints(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", f"{NOTEBOOK.parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XLA_FLAGS", "")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    run = copy.deepcopy(shown)
    nbclient.NotebookClient(run, timeout=600, kernel_name="python3").execute()
    # digits behind the third differ between processors
    assert [_rounded(text) for text in printed(run)] == [_rounded(text) for text in printed(shown)]
    assert pictures(run) == pictures(shown)
    assert sum(pictures(shown)) == 3


def _rounded(text):
    words = [word.rstrip(",") for word in text.split()]
    return [round(float(word), 3) if word.count(".") == 1 and word[0].isdigit() else word for word in words]
