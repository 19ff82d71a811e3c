"""Sums over the Inception features of images, from which every score is computed.

They are sums in float64 over batches as they come, so that 50,000 images need the memory of one batch, and sums of
several processes merge exactly. Only precision, recall, KID and FID-infinity need the features of all images.

Letters: B images of a batch, N of a set, F feature dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.inception import FEATURE_DIM, LOGITS_DIM, SPATIAL_DIM
from util.dist import all_reduce_sum, float32_precision, gather_objects, gather_to_main

CPU = torch.device("cpu")
IS_SPLITS, IS_SEED = 10, 2020  # parts over which the Inception Score is averaged, torch-fidelity's shuffle
Statistics = dict[str, np.ndarray]  # "mu" (F,) and "sigma" (F, F), float64


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

    def merge(self, features_everywhere: bool = False) -> FeatureSums:
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

    def merge(self) -> FeatureStatistics:
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

    def merge(self) -> InceptionScoreSums:
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
