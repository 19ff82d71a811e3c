"""Scoring images in batches over all processes: Scores sums what METRICS need, `evaluate` feeds it, resumable.

Batches are always the same, batch b is made by process b mod (number of processes). The features of each go to a shard
on the disk and into float64 sums, which merge exactly: one process and eight give the same scores, and a killed run
resumes.

Letters: B images of a batch, N of all, S their side in pixels.
"""

import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from evaluation.feature_sums import FeatureSums
from evaluation.inception import FEATURE_KEYS, InceptionFeatures
from evaluation.metrics import Reference, columns, computable
from evaluation.store import EvalStore, batches_of, image_flaws
from util import dist
from util.log import get_logger

logger = get_logger()
CPU = torch.device("cpu")
SUSPICIOUS_SHARE = 0.1  # of the images with a flaw, from which on it is worth a warning
FLAWS = {
    "near_constant": "show next to nothing (black, grey or one colour)",
    "saturated": "are saturated (nearly all values 0 or 255)",
}


class Scores(FeatureSums):
    """Sums over generated images, their flaws and their scores; features are kept only if a metric needs them.

    requested: names of metrics that are computed on request only. device: for the distances of all pairs of images.
    """

    def __init__(
        self, num_images: int, reference: Reference, requested: Collection[str] = (), device: torch.device = CPU
    ):
        self.num_images, self.reference, self.metrics = num_images, reference, computable(reference, requested)
        keep = range(num_images) if any(metric.keeps_features for metric in self.metrics) else ()
        spatial = reference.spatial is not None
        super().__init__(len(reference.mu), num_images, spatial=spatial, keep=keep, device=device)
        self.flaws = torch.zeros(1 + len(FLAWS), dtype=torch.float64)  # images, and how many have each flaw

    def add(self, numbers: Sequence[int], found: dict[str, Tensor]) -> None:
        """A batch's features and flaws, by FEATURE_KEYS and FLAWS."""
        super().add(numbers, found)
        self.flaws += torch.tensor([len(numbers), *(float(found[key].sum()) for key in FLAWS)], dtype=torch.float64)

    def finish(self) -> dict[str, float | None] | None:
        """The scores, None for those without what they need; on rank 0 (None elsewhere). Every process must call it."""
        self.merge()
        images, *flawed = dist.all_reduce_sum(self.flaws).tolist()
        if not dist.is_main():
            return None
        if images != self.num_images:
            raise RuntimeError(f"{images:.0f} images were scored instead of {self.num_images}")
        scores: dict[str, float | None] = dict.fromkeys(columns())
        for metric in self.metrics:
            scores |= zip(metric.columns, metric.compute(self, self.reference), strict=True)
        return scores | {f"{key}_share": count / images for key, count in zip(FLAWS, flawed, strict=True)}


def warn_of_flaws(scores: dict) -> None:
    """Log a warning if many images show nothing."""
    for key, what in FLAWS.items():
        share = scores[f"{key}_share"]
        if share > SUSPICIOUS_SHARE:
            reasons = "a broken or untrained model, the EMA of a short run (--weights model), or another VAE's latents"
            logger.warning("%.0f %% of the images %s: %s", 100 * share, what, reasons)


def evaluate(
    make_images: Callable[[range], Tensor],
    labels: Sequence[int],
    batch_size: int,
    extractor: InceptionFeatures,
    reference: Reference,
    *,
    store: EvalStore | None = None,
    requested: Collection[str] = (),
    device: torch.device = CPU,
) -> dict | None:
    """Score len(labels) images over all processes; the scores on rank 0, None on the others.

    make_images(numbers) returns the uint8 images (B, 3, S, S) of a batch. store: what it holds is not generated again,
    and new batches are written to it.
    """
    keys = (*FEATURE_KEYS, *FLAWS)
    batches = batches_of(len(labels), batch_size)[dist.rank() :: dist.world_size()]
    scores = Scores(len(labels), reference, requested, device)
    missing = {batch for batch in batches if store is None or store.read(batch, keys) is None}
    total, left = sum(map(len, batches)), sum(map(len, missing))
    if left < total:
        logger.info("%d of %d images of this process exist already", total - left, total)
    started, made, processes = time.perf_counter(), 0, dist.world_size()
    for batch in batches:  # in their order: the sums of a resumed run are those of any other, to the last bit
        found = None if batch in missing else store.read(batch, keys)
        if found is not None:
            scores.add(batch, found)
            continue
        images = make_images(batch)
        found = extractor(images) | image_flaws(images)
        if store is not None:
            store.write(batch, images, found)
        scores.add(batch, found)
        made += len(batch)
        rate, count = made / (time.perf_counter() - started), min((total - left + made) * processes, len(labels))
        progress = (count, len(labels), rate * processes, (left - made) / rate)
        logger.info("generated %d/%d images  %.2f images/s  ETA %.0f s", *progress)
    result = scores.finish()
    if result is None:
        return None
    warn_of_flaws(result)
    if store is not None:
        store.write_archive(labels, batch_size)
    seconds = max(time.perf_counter() - started, 1e-9)
    return result | {"images_per_s": made * processes / seconds if made else None}
