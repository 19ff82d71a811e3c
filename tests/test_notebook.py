"""docs/notebook.ipynb runs from top to bottom on a CPU, with the demo's toy model."""

import sys
from pathlib import Path

import pytest
from conftest import REPO


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat, an optional extra, is not installed: make extras")
    nbclient = pytest.importorskip("nbclient", reason="nbclient, an optional extra, is not installed: make extras")
    pytest.importorskip("ipykernel", reason="ipykernel, an optional extra, is not installed: make extras")
    monkeypatch.setenv("TOKENBRIDGE_DEMO", str(tmp_path / "demo"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = nbformat.read(REPO / "docs" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code"), "clear the outputs before it is committed"
    nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(REPO / "docs")}}).execute()
    pictures = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
