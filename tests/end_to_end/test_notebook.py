"""docs/notebook.ipynb: its committed outputs, and that it runs with an untrained model of the demo's size."""

import json
import sys
from pathlib import Path

import pytest

from models import MODELS
from models.vae import AutoencoderKL
from tests.helpers import REPO
from util.checkpoint import atomic_save

NOTEBOOK = REPO / "docs" / "notebook.ipynb"
PICTURES = 8


def count_pictures(cells: list[dict]) -> int:
    """Figures among the outputs."""
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_committed_outputs() -> None:
    text = NOTEBOOK.read_text()
    cells = json.loads(text)["cells"]
    assert len(text) < 300_000 and count_pictures(cells) == PICTURES
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 10 and [cell["execution_count"] for cell in code] == list(range(1, 11))
    streams = [output for cell in code for output in cell["outputs"] if output["output_type"] == "stream"]
    assert streams and all(output["name"] == "stdout" for output in streams), "no warnings, no paths of a machine"


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
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(REPO / "docs")}}
    nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources).execute()
    assert count_pictures(notebook.cells) == PICTURES
