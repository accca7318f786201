"""The notebook runs from its first cell to its last, with a short training, and leaves pictures."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorials" / "one_step.ipynb"
PICTURE = "image/png"


def pictures(notebook):
    return [
        output.data[PICTURE]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if PICTURE in output.get("data", {})
    ]


def test_it_is_stored_with_what_it_shows():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    assert len(pictures(stored)) == 5
    text = "".join(output.get("text", "") for cell in stored.cells for output in cell.get("outputs", []))
    assert "1 network evaluation: " in text
    assert not re.search(r"/(?:home|root|tmp|work)/", NOTEBOOK.read_text())


@pytest.mark.long
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "STEPS = 200" in cell.source]
    parameters.source = parameters.source.replace("STEPS = 200", "STEPS = 2")
    (shortened,) = [cell for cell in notebook.cells if "config.data.clips = 1024" in cell.source]
    shortened.source = shortened.source.replace(
        "clips = 1024", "clips = 32\nconfig.batch_size = 4\nconfig.guard.enabled = False"
    )
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": tmp_path}}).execute()
    assert len(pictures(notebook)) == 5 and (tmp_path / "runs/notebook/phase1/model").is_dir()
