"""docs/notebook.ipynb runs on a CPU with an untrained model of the demo's size (test_demo.py runs the demo itself)."""

import sys
from pathlib import Path

import pytest

from models import MODELS
from models.vae import AutoencoderKL
from tests.helpers import REPO
from util.checkpoint import atomic_save


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "nbformat, nbclient or ipykernel, optional extras, are not installed: make extras"
    nbformat, nbclient, _ = (pytest.importorskip(n, reason=reason) for n in ("nbformat", "nbclient", "ipykernel"))
    vae = AutoencoderKL(embed_dim=4, ch_mult=(1, 1, 2, 2), ch=32, num_res_blocks=1, attention=False)
    model = MODELS["tokenbridge_digits"](img_size=32, vae_stride=8, vae_embed_dim=4, class_num=10, buffer_size=8)
    atomic_save({"model": vae.state_dict(), "config": vae.config}, tmp_path / "vae" / "vae.pth")
    config = {"model_name": "tokenbridge_digits", "model": model.config.to_dict(), "vae": vae.config}
    config["vae_fingerprint"] = vae.latent_fingerprint()
    content = {"model": model.state_dict(), "model_ema": dict(model.named_parameters()), "config": config}
    atomic_save(content, tmp_path / "model" / "checkpoint-last.pth")
    monkeypatch.setenv("TOKENBRIDGE_DEMO", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = nbformat.read(REPO / "docs" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs before it is committed"
    resources = {"metadata": {"path": str(REPO / "docs")}}
    nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources).execute()
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 4
