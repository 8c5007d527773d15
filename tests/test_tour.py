"""The notebook runs from top to bottom in a kernel of its own, shows its plots, and is committed without outputs."""

from pathlib import Path

import pytest

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def test_the_tour_runs_and_shows_its_plots(llama, chat_tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    notebook = nbformat.read(TOUR, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("MODEL = None")
    cells[0].source = f"MODEL = {str(tmp_path)!r}"
    nbclient.NotebookClient(notebook, timeout=120).execute()
    plots = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(plots) == 7
    printed = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stdout"]
    assert "router: 0." in printed[0]


def test_the_tour_is_committed_without_outputs():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
