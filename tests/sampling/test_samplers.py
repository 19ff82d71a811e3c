"""demo/samplers.py: a toy run whose exact settings are seen to be exact, and its bad input."""

import json
from pathlib import Path

import pytest

from demo import digits, samplers
from demo.samplers import EXACT, SETTINGS
from tests.helpers import tiny_model, tiny_vae


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--num_images", "5"], "--num_images"),
        ([], "holds no trained digits model; run make demo first"),
    ],
)
def test_bad_flags(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samplers.main([*flags, "--output_dir", str(tmp_path)])


def test_a_toy_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Of three settings, the exact one and its twin give equal images, another order does not; one line each."""
    digits.write_image_folder(tmp_path / "digits")
    (tmp_path / "model").mkdir()
    chosen = {EXACT: {}, "twin": dict(reuse_features=1), "order raster": SETTINGS["order raster"]}
    monkeypatch.setattr(samplers, "SETTINGS", chosen)
    monkeypatch.setattr(samplers, "SAMPLING", samplers.SAMPLING | dict(num_iter=2))
    monkeypatch.setattr(samplers, "load", lambda *_, **__: (tiny_model(), tiny_vae()))
    samplers.main(["--num_images", "20", "--seeds", "2", "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "samplers.json").read_text())["settings"]
    assert [figures["equal"] for figures in found.values()] == [[1, 1], [1, 1], [0, 0]]
    assert all(0 <= x <= 1 for figures in found.values() for x in figures["accuracy"])
    assert found[EXACT]["frechet"] == found["twin"]["frechet"] != found["order raster"]["frechet"]
    printed = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(name) for line in printed) == 1 for name in chosen)
