"""Scores of a set of generated images: FID, sFID, Inception Score, precision and recall, KID, FID-infinity.

METRICS is the registry: a function and a line there add a metric, and the scores of `--evaluate`, the printed line, the
sweep's table and CSV, and eval.jsonl follow (docs/adding.md).

Letters: N images of a set, F feature dimensions.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.feature_sums import (
    CPU,
    IS_SEED,
    IS_SPLITS,
    FeatureStatistics,
    FeatureSums,
    InceptionScoreSums,
    Statistics,
)
from util.dist import float32_precision

PRC_NEIGHBOURS, PRC_CHUNK = 3, 250  # precision and recall: k, and rows of the distance matrix at a time
FEWEST_FOR_PRC, INFINITY_POINTS = PRC_NEIGHBOURS + 1, 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


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


@dataclass(frozen=True)
class Metric:
    """A metric of the registry. It is computed where the reference has what it needs."""

    compute: Callable[[FeatureSums, Reference], Sequence[float]]  # the columns' values
    columns: dict[str, str]  # key in records and CSV -> title in tables; without a title, only in records and CSV
    needs: str | None = None  # the attribute of Reference that must be there
    keeps_features: bool = False  # whether it needs FeatureSums.features
    on_request: bool = False  # computed only if asked for by name


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
