"""Scores of a set of generated images: FID, sFID, Inception Score, precision and recall, KID, FID-infinity.

METRICS is the registry: a function and a line there add a metric, and the scores of `--evaluate`, the printed line, the
sweep's table and CSV, and eval.jsonl follow (docs/adding.md). Statistics are sums in float64 over batches as they come,
so that 50,000 images need the memory of one batch, and sums of several processes merge exactly. Only precision,
recall, KID and FID-infinity need the features of all images.

Letters: B images of a batch, N of a set, F feature dimensions.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.inception import FEATURE_DIM, LOGITS_DIM, SPATIAL_DIM
from util.dist import all_reduce_sum, float32_precision, gather_objects, gather_to_main

CPU = torch.device("cpu")
IS_SPLITS, IS_SEED = 10, 2020  # parts over which the Inception Score is averaged, torch-fidelity's shuffle
PRC_NEIGHBOURS, PRC_CHUNK = 3, 250  # precision and recall: k, and rows of the distance matrix at a time
FEWEST_FOR_PRC, INFINITY_POINTS = PRC_NEIGHBOURS + 1, 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
Statistics = dict[str, np.ndarray]  # "mu" (F,) and "sigma" (F, F), float64


@dataclass
class Reference:
    """Statistics of the real images; arrays in float64, features in float32. What the source does not say is None."""

    mu: np.ndarray  # (2048,)
    sigma: np.ndarray  # (2048, 2048)
    mu_s: np.ndarray | None = None  # (2023,) ADM's spatial features
    sigma_s: np.ndarray | None = None
    features: Tensor | None = None  # (N, 2048) of some of the images, for precision, recall, KID
    img_size: int | None = None
    crop: str | None = None
    num_images: int | None = None
    inception_sha256: str | None = None
    num_available: int | None = None  # images of the source, of which num_images were taken
    selection: str | None = None  # how

    @property
    def pool(self) -> Statistics:
        """Of the pool features."""
        return {"mu": self.mu, "sigma": self.sigma}

    @property
    def spatial(self) -> Statistics | None:
        """Of the spatial features."""
        return None if self.mu_s is None else {"mu": self.mu_s, "sigma": self.sigma_s}


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches: float64, centred.

    Merging over processes loses nothing (Chan et al. 1979).
    """

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
        """The mean (F,)."""
        return self.mean.numpy()

    @property
    def sigma(self) -> np.ndarray:
        """Unbiased covariance (F, F), as numpy.cov. ValueError below two images."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        return (self.scatter / (self.count - 1)).numpy()

    def as_dict(self) -> Statistics:
        """As `fid` takes them."""
        return {"mu": self.mu, "sigma": self.sigma}


class InceptionScoreSums:
    """The Inception Score of N numbered images from sums alone: per split, the sum of p and of p log p, in float64.

    An image's split follows from its number: torch-fidelity's shuffle (seed 2020) of the images in their order, divided
    into 10 parts. So batches may come in any order and from several processes. ValueError below one image per split.
    """

    def __init__(self, num_images: int, splits: int = IS_SPLITS):
        if num_images < splits:
            raise ValueError(f"the Inception Score needs at least {splits} images, one per split; got {num_images}")
        order = np.random.RandomState(IS_SEED).permutation(num_images)
        place = np.empty(num_images, dtype=np.int64)
        place[order] = np.arange(num_images)
        ends = [(i + 1) * num_images // splits for i in range(splits)]
        self.split_of = torch.from_numpy(np.searchsorted(ends, place, side="right"))
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


def fid(stats_1: Statistics, stats_2: Statistics) -> float:
    """Frechet distance of two {"mu", "sigma"}, by torch-fidelity's formula."""
    from torch_fidelity import metric_fid  # training and sampling run without the package

    with float32_precision(CPU):
        return metric_fid.fid_statistics_to_metric(stats_1, stats_2, False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: Tensor, splits: int = IS_SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over the splits, from logits (N, 1008) in image order, torch-fidelity's shuffle."""
    sums = InceptionScoreSums(len(logits), splits)
    sums.update(range(len(logits)), logits)
    return sums.score()


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, k = 3) of features (N, F) each, by torch-fidelity.

    Precision: the share of generated images within the manifold of the real ones; recall the reverse. ValueError for
    fewer than 4 images.
    """
    from torch_fidelity import metric_prc

    if min(len(generated), len(real)) < FEWEST_FOR_PRC:
        counts = f"{len(generated)} and {len(real)}"
        raise ValueError(f"precision and recall need more than {PRC_NEIGHBOURS} images of each kind, got {counts}")
    settings = dict(prc_neighborhood=PRC_NEIGHBOURS, prc_batch_size=PRC_CHUNK, save_cpu_ram=True, verbose=False)
    with float32_precision(generated.device):
        scores = metric_prc.prc_features_to_metric(generated, real, **settings)
    return scores[metric_prc.KEY_METRIC_PRECISION], scores[metric_prc.KEY_METRIC_RECALL]


def kid(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Kernel Inception Distance of features (N, F) each, by torch-fidelity.

    Mean and standard deviation over 100 subsets of 1000 images (of all, if there are fewer).
    """
    from torch_fidelity import metric_kid

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    settings = dict(kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=IS_SEED, verbose=False)
    with float32_precision(generated.device):
        scores = metric_kid.kid_features_to_metric(generated, real, **settings)
    return scores[metric_kid.KEY_METRIC_KID_MEAN], scores[metric_kid.KEY_METRIC_KID_STD]


@float32_precision(CPU)
def fid_infinity(features: Tensor, reference: Statistics, points: int = INFINITY_POINTS) -> float:
    """FID extrapolated to infinitely many images (Chong and Forsyth 2020).

    The intercept of FID over 1/n, n from a tenth of the images to all. features (N, F) of generated images in their
    order; the subsets are nested parts of one fixed shuffle. ValueError below 20 images.
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


class FeatureSums:
    """What every score is computed from: sums over the features of numbered images, merged over all processes.

    num_images: of all processes, for the Inception Score; None without it. spatial: ADM's spatial features too. keep:
    numbers of the images whose pool features are kept. device: for distances of all pairs of images.
    """

    def __init__(
        self,
        dim: int,
        num_images: int | None = None,
        *,
        spatial: bool = False,
        keep: Collection[int] = (),
        device: torch.device = CPU,
    ):
        self.pool = FeatureStatistics(dim)
        self.spatial = FeatureStatistics(SPATIAL_DIM) if spatial else None
        self.classes = None if num_images is None else InceptionScoreSums(num_images)
        self.keep, self.device = keep, device
        self.kept: dict[int, Tensor] = {}  # first image of a batch -> pool features of its images
        self.features: Tensor | None = None  # (N, F) of the kept images in their order, on the CPU, after `merge`

    def add(self, numbers: Sequence[int], found: dict[str, Tensor]) -> None:
        """Features of the images with these numbers, by FEATURE_KEYS."""
        self.pool.update(found["2048"])
        if self.spatial is not None:
            self.spatial.update(found["spatial"])
        if self.classes is not None:
            self.classes.update(numbers, found["logits_unbiased"])
        if rows := [row for row, number in enumerate(numbers) if number in self.keep]:
            self.kept[numbers[0]] = found["2048"][rows].cpu()

    def merge(self, features_everywhere: bool = False) -> "FeatureSums":
        """All processes' sums, in place on every process; the kept features on rank 0 only, unless everywhere."""
        for sums in (self.pool, self.spatial, self.classes):
            if sums is not None:
                sums.merge()
        if not self.keep:
            return self
        parts, self.kept = (gather_objects if features_everywhere else gather_to_main)(self.kept), {}
        if parts is not None:
            owner = {first: batches for batches in parts for first in batches}
            self.features = torch.empty(len(self.keep), len(self.pool.mean))
            done = 0
            for first in sorted(owner):
                part = owner[first].pop(first)  # batches are freed as they are copied
                self.features[done : done + len(part)] = part
                done += len(part)
            self.features = self.features[:done]
        return self


@dataclass(frozen=True)
class Metric:
    """A metric of the registry. It is computed where the reference has what it needs."""

    compute: Callable[[FeatureSums, Reference], Sequence[float]]  # the columns' values
    columns: dict[str, str]  # key in records and CSV -> title in tables; without a title, only in records and CSV
    needs: str | None = None  # the attribute of Reference that must be there
    keeps_features: bool = False  # whether it needs FeatureSums.features
    on_request: bool = False  # computed only if asked for by name


def _precision_recall(generated: FeatureSums, real: Reference) -> tuple[float, float]:
    return precision_recall(generated.features.to(generated.device), real.features.to(generated.device))


METRICS = {
    "fid": Metric(lambda made, real: [fid(made.pool.as_dict(), real.pool)], {"fid": "FID"}),
    "inception_score": Metric(
        lambda made, real: made.classes.score(), {"inception_score": "IS", "inception_score_std": ""}
    ),
    "sfid": Metric(lambda made, real: [fid(made.spatial.as_dict(), real.spatial)], {"sfid": "sFID"}, needs="spatial"),
    "precision_recall": Metric(
        _precision_recall, {"precision": "precision", "recall": "recall"}, needs="features", keeps_features=True
    ),
    "kid": Metric(
        lambda made, real: kid(made.features, real.features),
        {"kid": "KID", "kid_std": ""},
        needs="features",
        keeps_features=True,
    ),
    "fid_infinity": Metric(
        lambda made, real: [fid_infinity(made.features, real.pool)],
        {"fid_infinity": "FID inf."},
        keeps_features=True,
        on_request=True,
    ),
}


def computable(reference: Reference, requested: Collection[str] = ()) -> list[Metric]:
    """The metrics of the registry that this reference allows; those on request if they are requested by name."""
    return [
        metric
        for name, metric in METRICS.items()
        if (not metric.on_request or name in requested)
        and (metric.needs is None or getattr(reference, metric.needs) is not None)
    ]


def columns() -> dict[str, str]:
    """Key -> title of every metric's columns, those with a title first."""
    found = {key: title for metric in METRICS.values() for key, title in metric.columns.items()}
    return dict(sorted(found.items(), key=lambda item: not item[1]))
