"""Stand-ins for Inception, whose weights tests do not have, and the references and images that go with them."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.feature_sums import FeatureStatistics
from evaluation.inception import FEATURE_DIM, SPATIAL_DIM
from evaluation.metrics import Reference
from tests.helpers import photographs

SMALL = 6  # feature dimensions of FewColours: the Fréchet distance of 2048 takes ten seconds


class Colours:
    """An extractor with the real one's shapes: block means of an image, repeated."""

    sha256 = "stand-in"
    dim = FEATURE_DIM

    def __init__(self, *arguments: object):
        self.calls = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8
        self.calls += len(images)
        blocks = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 64  # (B, 48)
        return {
            "2048": blocks.repeat(1, 43)[:, :FEATURE_DIM],
            "spatial": blocks.repeat(1, 43)[:, :SPATIAL_DIM],
            "logits_unbiased": blocks.repeat(1, 21),
        }


class FewColours(Colours):
    """Six features that stand for the 2048: mean colours of the upper and the lower half."""

    dim = SMALL

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        halves = torch.nn.functional.adaptive_avg_pool2d(images.float(), (2, 1)).flatten(1) / 64  # (B, 6)
        return super().__call__(images) | {"2048": halves}


def small_reference(with_features: bool = True) -> Reference:
    """A reference for FewColours."""
    features = torch.from_numpy(np.random.default_rng(0).normal(2, 1, (30, SMALL)).astype(np.float32))
    x = features.double().numpy()
    return Reference(x.mean(0), np.cov(x, rowvar=False), features=features if with_features else None)


def stats_of(x: np.ndarray | Tensor) -> dict[str, np.ndarray]:
    """{"mu", "sigma"} of features (N, F)."""
    statistics = FeatureStatistics(x.shape[1])
    statistics.update(torch.as_tensor(x))
    return statistics.as_dict()


def crops(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    """uint8 (N, S, S, 3) of the photographs."""
    rng, photos = np.random.default_rng(seed), photographs()
    corners = zip(rng.integers(427 - size, size=count), rng.integers(640 - size, size=count), strict=True)
    return np.stack([photos[i % 2][y : y + size, x : x + size] for i, (y, x) in enumerate(corners)])


def as_tensor(images: np.ndarray) -> Tensor:
    """(N, S, S, 3) -> (N, 3, S, S)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def damaged(images: Tensor, strength: float) -> Tensor:
    """uint8 images with Gaussian noise of that many grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + strength * noise).round().clamp(0, 255).to(torch.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """folder/0/000.png, folder/1/001.png, folder/0/002.png and so on."""
    for i, image in enumerate(images):
        path = folder / str(i % 2) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_stats(path: Path, **arrays: object) -> Path:
    """An .npz of these arrays."""
    np.savez(path, **arrays)
    return path


def adm_arrays() -> dict[str, np.ndarray]:
    """Arrays with the names and sizes of ADM's file, cheap to write."""
    return {
        "mu": np.zeros(FEATURE_DIM, np.float32),
        "sigma": np.broadcast_to(np.float32(0), (FEATURE_DIM, FEATURE_DIM)),
        "mu_s": np.zeros(SPATIAL_DIM, np.float32),
        "sigma_s": np.broadcast_to(np.float32(0), (SPATIAL_DIM, SPATIAL_DIM)),
    }


def offline(*args: object, **kwargs: object) -> None:
    """A download without a network."""
    raise URLError("no route")
