"""`python -m tools.bench eval`: scores of images in memory against a folder of PNGs; memory, agreement of processes.

Random weights in the real format stand for Inception's: time and memory are those of the real ones. The scores of many
images are computed from random features of the real shapes, since what they cost does not depend on their values.
"""

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.images import save_png
from evaluation.feature_sums import FeatureStatistics
from evaluation.inception import FEATURE_DIM, LOGITS_DIM, SPATIAL_DIM, InceptionFeatures, write_random_inception
from evaluation.metrics import Reference, fid, inception_score
from evaluation.reference import KEEP_FEATURES
from evaluation.scores import Scores
from evaluation.store import batches_of
from tools.bench.counting import print_table
from tools.bench.options import BenchOptions
from util import dist
from util.options import option


@dataclass
class Options(BenchOptions):
    """How many images go both ways, and of how many the scores are computed."""

    num_images: int = option(64, "images that go both ways", lowest=10)
    img_size: int = option(256, lowest=8)
    batch_size: int = option(64, lowest=1)
    scored_images: int = option(50_000, "images whose scores are computed from random features", lowest=10)
    pairs: bool = option(True, "precision, recall and KID too, minutes on a CPU")


def smooth_images(count: int, size: int, seed: int) -> Tensor:
    """uint8 (N, 3, S, S): low-frequency noise, which compresses about as photographs do."""
    coarse = torch.randn(count, 3, max(2, size // 8), max(2, size // 8), generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return (fine * 50 + 128).clamp(0, 255).to(torch.uint8)


def compare_paths(options: Options, weights: Path, device: torch.device) -> dict[str, float]:
    """Seconds of both ways from the same uint8 batches to FID and Inception Score, and the scores.

    The baseline is torch-fidelity on a folder of PNGs.
    """
    import torch_fidelity

    images, real = (smooth_images(options.num_images, options.img_size, seed) for seed in (0, 1))
    extractor = InceptionFeatures(str(weights), device)
    extractor(images[:2])  # warm up
    statistics_of, logits = {"images": FeatureStatistics(), "real": FeatureStatistics()}, []
    started = time.perf_counter()
    for batch in images.split(options.batch_size):
        features = extractor(batch)
        statistics_of["images"].update(features["2048"])
        logits.append(features["logits_unbiased"].cpu())
    found = {"in memory": time.perf_counter() - started}
    for batch in real.split(options.batch_size):
        statistics_of["real"].update(extractor(batch)["2048"])
    found["fid"] = fid(statistics_of["images"].as_dict(), statistics_of["real"].as_dict())
    found["is"] = inception_score(torch.cat(logits))[0]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for i, image in enumerate(images):
            save_png(Path(folder) / "images" / f"{i:06d}.png", image)
        found["write"] = time.perf_counter() - started
        found["bytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*.png"))
        for i, image in enumerate(real):
            save_png(Path(folder) / "real" / f"{i:06d}.png", image)
        common = dict(input1=f"{folder}/images", feature_extractor_weights_path=str(weights), cuda=device.type != "cpu")
        common |= dict(batch_size=options.batch_size, verbose=False, save_cpu_ram=True, cache=False)
        started = time.perf_counter()
        scores = torch_fidelity.calculate_metrics(isc=True, **common)
        found["read"] = time.perf_counter() - started
        scores |= torch_fidelity.calculate_metrics(input2=f"{folder}/real", fid=True, **common)
    names = {"baseline fid": "frechet_inception_distance", "baseline is": "inception_score_mean"}
    return found | {key: scores[name] for key, name in names.items()}


def random_features(numbers: range) -> dict[str, Tensor]:
    """What the extractor would give for the images with these numbers; the same on every process."""
    rng = np.random.default_rng([7, numbers.start])
    dims = {"2048": FEATURE_DIM, "spatial": SPATIAL_DIM, "logits_unbiased": LOGITS_DIM}
    found = {key: rng.standard_normal((len(numbers), dim), dtype=np.float32) for key, dim in dims.items()}
    flaws = {key: torch.zeros(len(numbers), dtype=torch.bool) for key in ("near_constant", "saturated")}
    return {key: torch.from_numpy(value) for key, value in found.items()} | flaws


def score_features(num_images: int, batch_size: int, pairs: bool) -> dict | None:
    """The scores of random features, as an evaluation computes them; pairs: precision, recall and KID too."""
    reference = Reference(np.zeros(FEATURE_DIM), np.eye(FEATURE_DIM), np.zeros(SPATIAL_DIM), np.eye(SPATIAL_DIM))
    if pairs:
        rng = np.random.default_rng(3)
        reference.features = torch.from_numpy(rng.standard_normal((KEEP_FEATURES, FEATURE_DIM), dtype=np.float32))
    scores = Scores(num_images, reference)
    for batch in batches_of(num_images, batch_size)[dist.rank() :: dist.world_size()]:
        scores.add(batch, random_features(batch))
    return scores.finish()


def _process(rank: int, together: dict[str, str], out: str, function: Callable[..., dict | None], *arguments) -> None:
    """One of the processes: run the function; rank 0 writes its result and the peak memory."""
    os.environ |= together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if together["WORLD_SIZE"] != "1":
        torch.set_num_threads(1)
    device, started = dist.init("cpu"), time.perf_counter()
    try:
        result = function(*arguments)
    finally:
        dist.shutdown()
    if result is not None:
        cost = {"peak_gib": dist.peak_memory_gib(device), "seconds": time.perf_counter() - started}
        Path(out).write_text(json.dumps(result | cost))


def in_processes(world: int, function: Callable[..., dict | None], *arguments: object) -> dict:
    """What `function` returns on rank 0 of so many new processes, with "peak_gib" and "seconds"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        torch.multiprocessing.spawn(_process, (together, str(out), function, *arguments), nprocs=world)
        return json.loads(out.read_text())


def run(options: Options) -> None:
    """Both ways from images to scores, then the scores of many features in one and in two processes."""
    device = dist.pick_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_random_inception(Path(folder) / "inception.pth")
        runs = [compare_paths(options, weights, device) for _ in range(options.repeats)]
    found = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
    baseline, ours = found["write"] + found["read"], found["in memory"]
    rows = [
        ("write PNGs, s", [f"{found['write']:.2f}", "-", ""]),
        ("features (and reading PNGs), s", [f"{found['read']:.2f}", f"{ours:.2f}", ""]),
        ("together, s", [f"{baseline:.2f}", f"{ours:.2f}", f"{baseline / ours:.2f}x"]),
        ("on the disk, MiB", [f"{found['bytes'] / 2**20:.1f}", "0.0", ""]),
    ]
    for name, key in (("FID", "fid"), ("Inception Score", "is")):
        a, b = found[f"baseline {key}"], found[key]
        rows.append((f"{name} (random weights)", [f"{a:.6g}", f"{b:.6g}", f"{b / a - 1:+.1e}"]))
    print_table(
        f"From {options.num_images} images of {options.img_size} pixels to features and Inception Score, on {device}",
        ["folder", "memory", "ratio"],
        rows,
    )
    size = options.scored_images, options.batch_size
    one, two = in_processes(1, score_features, *size, options.pairs), in_processes(2, score_features, *size, False)
    columns = {"FID": "fid", "sFID": "sfid", "IS": "inception_score"}
    columns |= {"precision": "precision", "recall": "recall", "KID": "kid"}
    rows = []
    for name, result in (("1 process", one), ("2 processes, no pairs", two)):
        scores = ["-" if result[key] is None else f"{result[key]:.6g}" for key in columns.values()]
        rows.append((name, [*scores, f"{result['peak_gib']:.2f}", f"{result['seconds']:.0f}"]))
    print_table(
        f"Scores of {options.scored_images} random features, in new processes on the CPU",
        [*columns, "peak GiB", "s"],
        rows,
    )
    difference = max(abs(two[key] / one[key] - 1) for key in ("fid", "sfid", "inception_score"))
    print(f"largest relative difference of 2 processes from 1: {difference:.1e} (expected: below 1e-6)")
