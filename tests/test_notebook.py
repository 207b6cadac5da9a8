"""The notebook runs from top to bottom, and is stored with what it shows.

After a change of play.ipynb or of what it shows, `python tests/test_notebook.py` runs it and stores
it with its new outputs. Look at its pictures then: its text says what is in them.
"""

import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "play.ipynb"


def execute(notebook, folder: Path) -> None:
    """Run all cells in `folder`. A cell that raises ends it with the cell's traceback."""
    import nbclient

    client = nbclient.NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        coalesce_streams=True,  # of a progress bar only its last state is stored
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def test_it_is_stored_as_executed_from_top_to_bottom(stored):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    pictures = [output for output in outputs(stored) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 7


def test_its_stored_outputs_show_no_place_of_the_machine_and_one_line_a_bar(stored):
    for output in outputs(stored):
        text = output.get("text", "")
        assert "/home/" not in text and "/work/" not in text and "site-packages" not in text
        assert text.count("it/s") + text.count("s/it") <= 1


def test_its_cells_fit_on_a_screen(stored):
    for cell in stored.cells:
        assert max(map(len, cell.source.splitlines())) <= 100


def test_it_runs(stored, tmp_path, monkeypatch):
    """In a folder of its own. What a cell asserts is the test."""
    pytest.importorskip("nbclient")
    shutil.copy(ROOT / "input.txt", tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    execute(stored, tmp_path)


if __name__ == "__main__":
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook, ROOT)
    nbformat.write(notebook, NOTEBOOK)
