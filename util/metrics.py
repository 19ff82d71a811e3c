"""Image metrics: PSNR, SSIM, and FID / Inception Score on torch-fidelity's features (SPEC 9)."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from util.dist import all_reduce_sum

FEATURE_DIM = 2048
IS_SPLITS = 10             # parts over which the Inception Score is averaged


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images (N, 3, H, W): (N,). Equal images give 100."""
    error = (a.double() - b.double()).pow(2).flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error.clamp_min(255.0**2 * 1e-10))).float()


SSIM_SIGMA, SSIM_RADIUS = 1.5, 5                          # the Gaussian window of Wang et al. 2004: 11 x 11 pixels
SMALLEST_FOR_SSIM = 2 * SSIM_RADIUS + 1
SSIM_CHUNK = 16                                           # images at a time, so that float64 maps stay small beside the VAE's


def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """Matrix (size, size - 10) that turns a row of pixels into its Gaussian means, only where the whole window fits."""
    weights = torch.exp(-torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64, device=device) ** 2 / (2 * SSIM_SIGMA**2))
    places = torch.arange(size - 2 * SSIM_RADIUS, device=device)
    band = torch.zeros(size, len(places), dtype=torch.float64, device=device)
    for offset, weight in enumerate(weights / weights.sum()):
        band[places + offset, places] = weight
    return band


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window, as scikit-image computes it) of uint8 images (N, 3, H, W): (N,).

    Float64 on the images' device; a mean over the channels and all whole windows. ValueError if a side is below 11 pixels.
    """
    if min(a.shape[-2:]) < SMALLEST_FOR_SSIM:
        raise ValueError(f"SSIM needs images of at least {SMALLEST_FOR_SSIM} pixels a side, got {tuple(a.shape[-2:])}")
    rows, columns = _gaussian_band(a.shape[-2], a.device).T, _gaussian_band(a.shape[-1], a.device)

    def blur(x: Tensor) -> Tensor:                        # (N, 3, H, W) -> (N, 3, H-10, W-10)
        return rows @ (x @ columns)
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.double().split(SSIM_CHUNK), b.double().split(SSIM_CHUNK), strict=True):
        mean_x, mean_y = blur(x), blur(y)
        spread = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        shared = blur(x * y) - mean_x * mean_y
        index = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))
        values.append(index.flatten(1).mean(1))
    return torch.cat(values).float()


def find_inception_weights(path: str | None) -> Path:
    """The weights file: `path` (--inception_weights), else torch-fidelity's download cache. FileNotFoundError says what to put where."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    found = Path(path) if path else cached
    if not found.is_file():
        raise FileNotFoundError(f"no Inception weights at {found}: download {URL_INCEPTION_V3} and give its path with --inception_weights, "
                                f"or put it at {cached}")
    return found


class InceptionFeatures:
    """torch-fidelity's `inception-v3-compat` extractor on a device: uint8 (B, 3, H, W) -> {"2048": (B, 2048), "logits_unbiased": (B, 1008)}.

    Raises FileNotFoundError without weights, ValueError for a file that does not hold them (code in it is never run).
    """

    def __init__(self, weights: str | None, device: torch.device):
        path = find_inception_weights(weights)
        try:
            torch.load(path, map_location="cpu", weights_only=True)        # torch-fidelity itself would run code in the file
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path)).to(device)
        except Exception as error:
            raise ValueError(f"{path} (--inception_weights) does not hold torch-fidelity's Inception weights: "
                             f"{(str(error).splitlines() or [type(error).__name__])[0]}") from error
        self.device = device
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images.to(self.device))
        return {"2048": pool, "logits_unbiased": logits}


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, exact in float64, mergeable over processes."""

    def __init__(self, dim: int = FEATURE_DIM):
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (B, dim)."""
        x = features.detach().cpu().double()
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def merge(self) -> "FeatureStatistics":
        """Sum over all processes, in place."""
        for tensor in (self.count, self.total, self.outer):
            all_reduce_sum(tensor)
        return self

    @property
    def mu(self) -> np.ndarray:
        return (self.total / self.count).numpy()

    @property
    def sigma(self) -> np.ndarray:
        """Unbiased covariance, as numpy.cov."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        mean = self.total / self.count
        return ((self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)).numpy()

    def as_dict(self) -> dict[str, np.ndarray]:
        return {"mu": self.mu, "sigma": self.sigma}


def load_reference_stats(path: str | Path, flag: str = "--fid_stats", dim: int = FEATURE_DIM) -> dict[str, np.ndarray]:
    """`mu` (dim,) and `sigma` (dim, dim) in float64 from an .npz such as adm_in256_stats.npz; clear errors naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no FID reference statistics at {path} ({flag}); adm_in256_stats.npz comes with the MAR repository's fid_stats folder")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in ("mu", "sigma") if key not in arrays]
            if missing:
                raise ValueError(f"it has no array {' or '.join(missing)}, only {', '.join(arrays.files[:6])}")
            stats = {key: np.asarray(arrays[key], dtype=np.float64) for key in ("mu", "sigma")}
    except Exception as error:
        raise ValueError(f"{path} ({flag}) is not a file of FID statistics: {error}") from error
    if stats["mu"].shape != (dim,) or stats["sigma"].shape != (dim, dim):
        raise ValueError(f"{path} ({flag}): mu {stats['mu'].shape}, sigma {stats['sigma'].shape}; expected ({dim},) and ({dim}, {dim})")
    return stats


def fid(stats_1: dict[str, np.ndarray], stats_2: dict[str, np.ndarray]) -> float:
    """Frechet distance of two {"mu", "sigma"}, by torch-fidelity's formula."""
    return fid_statistics_to_metric(stats_1, stats_2, False)[KEY_METRIC_FID]


def inception_score(logits: Tensor, splits: int = IS_SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over the splits, from logits (N, 1008) in image order, shuffled as torch-fidelity does by default."""
    if len(logits) < splits:
        raise ValueError(f"the Inception Score needs at least {splits} images, one per split; got {len(logits)}")
    scores = isc_features_to_metric(logits.cpu(), splits=splits, shuffle=True, rng_seed=2020)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]
