"""Image metrics: PSNR, SSIM, LPIPS; FID, sFID, Inception Score, precision and recall, KID on torch-fidelity's features (SPEC 9).

Features are taken from uint8 batches in memory and summed in float64 as they come, so that 50,000 images need no more memory than one batch;
sums of several processes merge exactly. Only precision, recall, KID and FID-infinity need the features themselves.

Letters: B images of a batch, N of a set, F feature dimensions.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from util.dist import agree, all_reduce_sum, float32_precision
from util.files import file_sha256

CPU = torch.device("cpu")
FEATURE_DIM = 2048
SPATIAL_CHANNELS, SPATIAL_GRID = 7, 17
SPATIAL_DIM = SPATIAL_GRID**2 * SPATIAL_CHANNELS  # ADM's sFID features: 2023
LOGITS_DIM = 1008
IS_SPLITS, IS_SEED = 10, 2020  # parts over which the Inception Score is averaged, torch-fidelity's shuffle
INCEPTION_CHUNK = 32  # images at a time, so that activations stay below 1 GiB
PRC_NEIGHBOURS, PRC_CHUNK = 3, 250  # precision and recall: k, and rows of the distance matrix at a time
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images (N, 3, H, W): (N,). Equal images give 100."""
    error = (a.double() - b.double()).pow(2).flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error.clamp_min(255.0**2 * 1e-10))).float()


SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the Gaussian window of Wang et al. 2004: 11 x 11 pixels
SMALLEST_FOR_SSIM = 2 * SSIM_RADIUS + 1
SSIM_CHUNK = 16  # images at a time, so that float64 maps stay small beside the VAE's


def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """Matrix (size, size - 10) that turns a row of pixels into its Gaussian means, only where the whole window fits."""
    weights = torch.exp(
        -(torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64, device=device) ** 2) / (2 * SSIM_SIGMA**2)
    )
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

    def blur(x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 3, H-10, W-10)
        return rows @ (x @ columns)

    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.double().split(SSIM_CHUNK), b.double().split(SSIM_CHUNK), strict=True):
        mean_x, mean_y = blur(x), blur(y)
        spread = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        shared = blur(x * y) - mean_x * mean_y
        index = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))
        values.append(index.flatten(1).mean(1))
    return torch.cat(values).float()


# ------------------------------------------------------------------------------------------------------------- Inception


def find_inception_weights(path: str | None) -> Path:
    """The weights file: `path` (--inception_weights), else torch-fidelity's download cache. FileNotFoundError says what to put where."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    found = Path(path) if path else cached
    if not found.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {found}: download {URL_INCEPTION_V3} and give its path with --inception_weights, "
            f"or put it at {cached}"
        )
    return found


def fetch_inception_weights(path: str | None, download: bool = True) -> Path:
    """As `find_inception_weights`, but torch-fidelity's file is downloaded if it is not there yet; every process must call it.

    One process per machine downloads, the others wait. FileNotFoundError with what to do by hand if that fails, as without a network.
    """
    error = None
    try:
        find_inception_weights(path)
    except FileNotFoundError as absent:
        error = absent
        if download and not path:
            error = _download(absent) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    agree(error)
    return find_inception_weights(path)


def _download(absent: FileNotFoundError) -> FileNotFoundError | None:
    """torch-fidelity's weights into its cache; None if that worked, otherwise `absent` with the reason."""
    target, timeout = (
        Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1],
        socket.getdefaulttimeout(),
    )
    try:
        socket.setdefaulttimeout(20)  # a firewall that swallows packets would hold the job for ever
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(target), hash_prefix=target.stem.rsplit("-", 1)[1], progress=False
        )
        return None
    except Exception as error:  # URLError, timeouts, a wrong hash, a full disk
        return FileNotFoundError(
            f"{absent} (the download failed: {(str(error).splitlines() or [type(error).__name__])[0]})"
        )
    finally:
        socket.setdefaulttimeout(timeout)


class InceptionFeatures:
    """torch-fidelity's `inception-v3-compat` extractor on a device.

    uint8 images (B, 3, H, W) -> {"2048": pool features (B, 2048), "spatial": (B, 2023), "logits_unbiased": (B, 1008)}, float32 on the device.
    The spatial features are those of ADM's sFID: the first 7 channels of the 17 x 17 map of block Mixed_6d (TensorFlow's mixed_6), row by row
    with the channel fastest. Every process must make one at the same time. FileNotFoundError without weights, ValueError for a file that does
    not hold them (code in it is never run).
    """

    def __init__(self, weights: str | None, device: torch.device):
        path = fetch_inception_weights(weights)
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would run code in the file
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(path)
            ).to(device)
        except Exception as error:
            raise ValueError(
                f"{path} (--inception_weights) does not hold torch-fidelity's Inception weights: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from error
        # its channels come first in the block's 768
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.device, self.sha256 = device, file_sha256(path)

    def _keep_spatial(self, module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        parts = []
        with float32_precision(self.device):
            for chunk in images.split(INCEPTION_CHUNK):
                pool, logits = self.network(chunk.to(self.device))
                parts.append((pool, self._spatial, logits))
        return dict(zip(("2048", "spatial", "logits_unbiased"), map(torch.cat, zip(*parts, strict=True)), strict=True))


# ------------------------------------------------------------------------------------------------------------- running sums


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches: float64, centred, mergeable over processes without loss (Chan et al. 1979)."""

    def __init__(self, dim: int = FEATURE_DIM):
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @float32_precision(CPU)
    def update(self, features: Tensor) -> None:
        """Add features (B, F)."""
        x = features.detach().cpu().double()
        if not len(x):
            return
        mean, count = x.mean(0), self.count + len(x)
        x, shift = x - mean, mean - self.mean
        self.scatter.addmm_(x.T, x).addr_(shift, shift, alpha=float(self.count * len(x) / count))
        self.mean += shift * (len(x) / count)
        self.count = count

    def merge(self) -> "FeatureStatistics":
        """All processes' features, in place on every process."""
        count = all_reduce_sum(self.count.clone())
        mean = all_reduce_sum(self.mean * self.count) / count.clamp_min(1)
        shift = self.mean - mean
        self.scatter = all_reduce_sum(self.scatter.addr(shift, shift, alpha=float(self.count)))
        self.count, self.mean = count, mean
        return self

    @property
    def mu(self) -> np.ndarray:
        return self.mean.numpy()

    @property
    def sigma(self) -> np.ndarray:
        """Unbiased covariance, as numpy.cov."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        return (self.scatter / (self.count - 1)).numpy()

    def as_dict(self) -> dict[str, np.ndarray]:
        return {"mu": self.mu, "sigma": self.sigma}


class InceptionScoreSums:
    """The Inception Score of N numbered images from sums alone: per split, the sum of p and of p log p, in float64.

    An image's split follows from its number: torch-fidelity's shuffle (seed 2020) of the images in their order, cut into 10 parts. So batches
    may come in any order and from several processes. ValueError for fewer images than splits.
    """

    def __init__(self, num_images: int, splits: int = IS_SPLITS):
        if num_images < splits:
            raise ValueError(f"the Inception Score needs at least {splits} images, one per split; got {num_images}")
        order = np.random.RandomState(IS_SEED).permutation(num_images)
        place = np.empty(num_images, dtype=np.int64)
        place[order] = np.arange(num_images)
        self.split_of = torch.from_numpy(
            np.searchsorted([(i + 1) * num_images // splits for i in range(splits)], place, side="right")
        )
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.p = torch.zeros(splits, LOGITS_DIM, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)

    @float32_precision(CPU)
    def update(self, numbers: Sequence[int], logits: Tensor) -> None:
        """Add the logits (B, 1008) of the images with these numbers."""
        logits, split = logits.detach().cpu().double(), self.split_of[torch.as_tensor(list(numbers), dtype=torch.long)]
        p = logits.softmax(1)
        if p.shape[1] != self.p.shape[1] and not self.count.any():
            self.p = torch.zeros(len(self.p), p.shape[1], dtype=torch.float64)
        self.count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self.p.index_add_(0, split, p)
        self.p_log_p.index_add_(0, split, (p * logits.log_softmax(1)).sum(1))

    def merge(self) -> "InceptionScoreSums":
        """Sum over all processes, in place."""
        for tensor in (self.count, self.p, self.p_log_p):
            all_reduce_sum(tensor)
        return self

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits that hold images."""
        filled = self.count > 0
        q = self.p[filled] / self.count[filled].unsqueeze(1)
        scores = (self.p_log_p[filled] / self.count[filled] - torch.xlogy(q, q).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


# ------------------------------------------------------------------------------------------------------------- scores


def fid(stats_1: dict[str, np.ndarray], stats_2: dict[str, np.ndarray]) -> float:
    """Frechet distance of two {"mu", "sigma"}, by torch-fidelity's formula."""
    with float32_precision(CPU):
        return fid_statistics_to_metric(stats_1, stats_2, False)[KEY_METRIC_FID]


def inception_score(logits: Tensor, splits: int = IS_SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over the splits, from logits (N, 1008) in image order, shuffled as torch-fidelity does by default."""
    sums = InceptionScoreSums(len(logits), splits)
    sums.update(range(len(logits)), logits)
    return sums.score()


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, k = 3) of features (N, F) each, by torch-fidelity in chunks of rows.

    Precision: the share of generated images within the manifold of the real ones; recall the reverse. ValueError for fewer than 4 images.
    """
    if min(len(generated), len(real)) <= PRC_NEIGHBOURS:
        raise ValueError(
            f"precision and recall need more than {PRC_NEIGHBOURS} images of each kind, got {len(generated)} and {len(real)}"
        )
    with float32_precision(generated.device):
        found = prc_features_to_metric(
            generated, real, prc_neighborhood=PRC_NEIGHBOURS, prc_batch_size=PRC_CHUNK, save_cpu_ram=True, verbose=False
        )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def kid(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Kernel Inception Distance: mean and standard deviation over 100 subsets of 1000 images (of all, if there are fewer), by torch-fidelity."""
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    with float32_precision(generated.device):
        found = kid_features_to_metric(
            generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=IS_SEED, verbose=False
        )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


@float32_precision(CPU)
def fid_infinity(features: Tensor, reference: dict[str, np.ndarray], points: int = 10) -> float:
    """FID extrapolated to infinitely many images (Chong and Forsyth 2020): the intercept of FID over 1/n, n from a tenth of the images to all.

    features (N, F) of generated images in their order; the subsets are nested parts of one fixed shuffle. ValueError below 20 images.
    """
    if len(features) < 2 * points:
        raise ValueError(f"the extrapolation of FID needs at least {2 * points} images, got {len(features)}")
    values, vectors = np.linalg.eigh(reference["sigma"])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # symmetric root of the reference's covariance
    shuffled = torch.from_numpy(np.random.RandomState(IS_SEED).permutation(len(features)))
    sizes = np.linspace(len(features) / points, len(features), points).round().astype(int)
    statistics, distances, done = FeatureStatistics(features.shape[1]), [], 0
    for size in sizes:
        for part in shuffled[done:size].split(PRC_CHUNK):
            statistics.update(features[part])
        done = size
        difference, sigma = statistics.mu - reference["mu"], statistics.sigma
        cross = np.sqrt(np.linalg.eigvalsh(root @ sigma @ root).clip(0)).sum()
        distances.append(difference @ difference + np.trace(sigma) + np.trace(reference["sigma"]) - 2 * cross)
    return float(np.polyfit(1 / sizes, distances, 1)[1])


# ------------------------------------------------------------------------------------------------------------- LPIPS

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's name for the weights that LPIPS was calibrated on
SMALLEST_FOR_LPIPS = 64


class Lpips:
    """LPIPS (Zhang et al. 2018) with AlexNet, by the package `lpips`, whose calibration comes with it: uint8 images (N, 3, H, W) twice -> (N,).

    AlexNet's own weights are torchvision's file: `path` (--lpips_weights), or where torch keeps downloads. FileNotFoundError where there is none;
    ValueError for a file that holds something else (code in it is never run).
    """

    def __init__(self, path: str | None, device: torch.device):
        found = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
        if not found.is_file():
            raise FileNotFoundError(
                f"no AlexNet weights at {found}: download https://download.pytorch.org/models/{ALEXNET} and give its path "
                "with --lpips_weights"
            )
        import lpips  # optional: slow to import, and needed for this alone

        self.network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        # slice2.3.weight is features.3.weight
        own = {key: f"features.{key.split('.', 1)[1]}" for key in self.network.net.state_dict()}
        try:
            state = torch.load(found, map_location="cpu", weights_only=True)
            self.network.net.load_state_dict({key: state[theirs] for key, theirs in own.items()}, strict=True)
        except Exception as error:
            raise ValueError(
                f"{found} (--lpips_weights) does not hold torchvision's AlexNet: {(str(error).splitlines() or [''])[0]}"
            ) from error
        self.network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        with float32_precision(self.device):
            return self.network(*(x.to(self.device).float() / 127.5 - 1 for x in (a, b))).flatten()
