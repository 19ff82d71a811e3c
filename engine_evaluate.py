"""Evaluating a model by the images it makes: generation, features, scores. No parsing.

Letters: B images of a batch, S their side in pixels.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from engine_sample import SampleSettings, balanced_labels, generate, sample_settings
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.cli import check_writable
from util.log import get_logger
from util.metrics import FeatureStatistics, InceptionFeatures, fid, inception_score, load_reference_stats

logger = get_logger()


def evaluate(model: TokenBridge, vae: AutoencoderKL, labels: Sequence[int], settings: SampleSettings, features: InceptionFeatures,
             reference: dict[str, np.ndarray], device: torch.device, on_images: Callable[[list[int], Tensor], None] | None = None) -> dict[str, float]:
    """Generate len(labels) images over all processes and score them: {"fid", "inception_score", "inception_score_std"} on every process.

    on_images(numbers, uint8 images) is called for each finished batch (to save them).
    """
    statistics, logits, order = FeatureStatistics(), [], []
    mine = range(dist.rank(), len(labels), dist.world_size())
    started = time.perf_counter()
    for numbers, images in generate(model, vae, labels, mine, settings, device):
        found = features(images)
        statistics.update(found["2048"])
        logits.append(found["logits_unbiased"].cpu())
        order += numbers
        if on_images is not None:
            on_images(numbers, images)
        rate = len(order) / (time.perf_counter() - started)
        logger.info("generated %d/%d images  %.2f images/s  ETA %.0f s", len(order) * dist.world_size(), len(labels), rate * dist.world_size(),
                    (len(mine) - len(order)) / rate)
    statistics.merge()
    gathered = dist.gather_objects((order, torch.cat(logits) if logits else None))
    everything = torch.empty(len(labels), next(part.shape[1] for _, part in gathered if part is not None))
    for numbers, part in gathered:
        if part is not None:
            everything[numbers] = part
    score, spread = inception_score(everything)
    return {"fid": fid(statistics.as_dict(), reference), "inception_score": score, "inception_score_std": spread}


class Evaluator:
    """FID and Inception Score of generated images; all its inputs are read, and refused if wrong, when it is made."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.reference = load_reference_stats(args.fid_stats)
        self.features = InceptionFeatures(args.inception_weights, device)
        self.args, self.settings, self.device = args, sample_settings(args, device), device
        self.output = check_writable(args.output_dir, "--output_dir")

    def __call__(self, model: TokenBridge, vae: AutoencoderKL, **about: object) -> dict:
        """Scores, logged and appended to OUT/eval.jsonl together with the settings and what is said `about` the weights."""
        labels = balanced_labels(self.args.num_images, range(model.class_num))
        scores = evaluate(model, vae, labels, self.settings, self.features, self.reference, self.device)
        logger.info("FID %.3f  Inception Score %.2f +- %.2f  (%d images, cfg %g, temperature %g, %d iterations)", scores["fid"],
                    scores["inception_score"], scores["inception_score_std"], len(labels),
                    self.settings.cfg, self.settings.temperature, self.settings.num_iter)
        if dist.is_main():
            record = scores | asdict(self.settings) | about | {"num_images": len(labels), "fid_stats": self.args.fid_stats}
            with (self.output / "eval.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        return scores
