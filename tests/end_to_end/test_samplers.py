"""demo/samplers.py: a toy run whose exact settings are exact."""

import json
from pathlib import Path

import pytest

from demo.ablations import SAMPLING
from demo.digits import DIGITS
from demo.samplers import EXACT, SETTINGS, run
from generation import Pipeline
from tests.helpers import tiny_model, tiny_vae


@pytest.mark.slow
def test_a_toy_study(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of three settings, the exact one and its twin give equal images, another order does not; one line each."""
    DIGITS.write_images(tmp_path / "digits")
    settings = {EXACT: {}, "twin": dict(reuse_features=1), "order raster": SETTINGS["order raster"]}
    run(Pipeline(tiny_model(), tiny_vae()), tmp_path, 20, range(2), settings, SAMPLING | dict(num_iter=2))
    results = json.loads((tmp_path / "samplers.json").read_text())["settings"]
    assert [figures["equal"] for figures in results.values()] == [[1, 1], [1, 1], [0, 0]]
    assert all(0 <= x <= 1 for figures in results.values() for x in figures["accuracy"])
    assert results[EXACT]["frechet"] == results["twin"]["frechet"] != results["order raster"]["frechet"]
    printed = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(name) for line in printed) == 1 for name in settings)
