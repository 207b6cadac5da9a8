"""The notebook runs from top to bottom, and is stored with what it shows."""

import os
import shutil

import nbformat
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(ROOT / "play.ipynb", as_version=4)


def test_it_is_stored_as_executed_from_top_to_bottom(stored):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert (
        sum(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code)
        >= 5
    )


def test_it_runs(stored, tmp_path, monkeypatch):
    """In a folder of its own: what a cell asserts is the test. An exception in a cell fails here with its traceback."""
    nbclient = pytest.importorskip("nbclient")
    shutil.copy(ROOT / "input.txt", tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    nbclient.NotebookClient(
        stored, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
