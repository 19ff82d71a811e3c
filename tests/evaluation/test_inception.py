"""evaluation/inception.py: the weights' file, and features equal to torch-fidelity's own network."""

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation.inception import (
    FEATURE_DIM,
    SPATIAL_DIM,
    InceptionFeatures,
    fetch_inception_weights,
    find_inception_weights,
    write_random_inception,
)
from tests.helpers import Explosive
from tests.stand_ins import as_tensor, crops, offline
from util.options import ArgumentError

CPU = torch.device("cpu")
FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_inception_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To torch-fidelity's own place, its hash is checked; a file that is there needs no network."""
    asked = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url.rsplit("/", 1)[1], hash_prefix))
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = fetch_inception_weights(None), fetch_inception_weights(None)
    assert first == second == tmp_path / "checkpoints" / FILE_NAME
    assert asked == [(first.name, "6726825d")]


def test_inception_weights_absent_or_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="no Inception weights at .*none.pth: download") as caught:
        find_inception_weights(str(tmp_path / "none.pth"))
    assert caught.value.argument == "inception_weights"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ArgumentError, match="download https://.*the download failed: .*no route"):
        InceptionFeatures(None, CPU)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download that was ruled out")
    )
    with pytest.raises(ArgumentError, match="no Inception weights at"):
        fetch_inception_weights(None, download=False)
    cached = tmp_path / "hub" / "checkpoints" / FILE_NAME
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.touch()
    assert find_inception_weights(None) == cached

    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    torch.save([Explosive(tmp_path / "ran")], tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("other.pth", "code.pth", "text.pth"):
        with pytest.raises(ArgumentError, match=rf"{name} does not hold torch-fidelity's Inception weights") as caught:
            InceptionFeatures(str(tmp_path / name), CPU)
        assert caught.value.argument == "inception_weights"
    assert not (tmp_path / "ran").exists()


def test_truncated_inception_weights(tmp_path: Path, inception_weights: Path) -> None:
    cut = tmp_path / "cut.pth"
    with inception_weights.open("rb") as file:
        cut.write_bytes(file.read(5_000_000))
    with pytest.raises(ArgumentError, match=r"cut\.pth does not hold"):
        InceptionFeatures(str(cut), CPU)


def test_inception_features_are_torch_fidelitys(inception_weights: Path) -> None:
    """The extractor gives in two batches what torch-fidelity's own network gives at once."""
    images = as_tensor(crops(5, 40, seed=7))
    ours = InceptionFeatures(str(inception_weights), CPU)
    parts = [ours(part) for part in images.split(3)]
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_weights))
    pool, logits = network(images)
    assert pool.std(0).mean() > 1e-3  # the images do differ under these weights
    torch.testing.assert_close(torch.cat([p["2048"] for p in parts]), pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([p["logits_unbiased"] for p in parts]), logits, rtol=1e-4, atol=1e-4)
    assert pool.shape == (5, FEATURE_DIM) and logits.shape == (5, 1008)
    maps = {}
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.update(mixed_6=output))
    network(images)
    spatial = torch.cat([p["spatial"] for p in parts])
    assert maps["mixed_6"].shape == (5, 768, 17, 17) and spatial.shape == (5, SPATIAL_DIM)
    # TensorFlow's layout, as ADM's evaluator flattens it
    expected = maps["mixed_6"].permute(0, 2, 3, 1)[..., :7].flatten(1)
    torch.testing.assert_close(spatial, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).mean() > 1e-3
