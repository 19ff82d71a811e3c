"""`python -m tools.bench eval`: scoring images in memory against writing them and reading them back; memory and agreement of 50,000 images' scores.

Random weights in the real format stand for Inception's: time and memory are those of the real ones. The scores of many images are computed from
random features of the real shapes, since what they cost does not depend on their values.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.images import save_png
from evaluation.metrics import FEATURE_DIM, LOGITS_DIM, SPATIAL_DIM, InceptionFeatures, fid, inception_score
from tools.bench.counting import add_command, print_table
from util import dist
from util.cli import at_least

REFERENCE_FEATURES = 10_000  # as many real images as ADM's reference batches have


def write_random_inception(path: Path) -> Path:
    """Weights in torch-fidelity's format, drawn from seed 0 so that activations keep their size."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            """The constructor insists on a file; this one is about to make it."""

    torch.save({}, path)
    network = Unfilled("inception-v3-compat", ["2048"], str(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.normal_(network.fc.weight, std=0.05)
    torch.save(network.state_dict(), path)
    return path


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """uint8 (N, 3, S, S): low-frequency noise, which compresses about as photographs do."""
    coarse = torch.randn(count, 3, max(2, size // 8), max(2, size // 8), generator=torch.Generator().manual_seed(seed))
    return (
        (nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") * 50 + 128).clamp(0, 255).to(torch.uint8)
    )


def compare_paths(args: argparse.Namespace, weights: Path, device: torch.device) -> dict[str, float]:
    """Seconds of both ways from the same uint8 batches to FID and Inception Score, and the scores; the plain way is torch-fidelity on a folder."""
    import torch_fidelity

    from evaluation.metrics import FeatureStatistics

    images, extractor = smooth_images(args.num_images, args.img_size), InceptionFeatures(str(weights), device)
    real = FeatureStatistics()
    extractor(images[:2])  # warm up
    seconds, started = {}, time.perf_counter()
    made, logits = FeatureStatistics(), []
    for batch in images.split(args.batch_size):
        found = extractor(batch)
        made.update(found["2048"])
        logits.append(found["logits_unbiased"].cpu())
    seconds["in memory"] = time.perf_counter() - started
    moved = smooth_images(args.num_images, args.img_size, seed=1)
    for batch in moved.split(args.batch_size):
        real.update(extractor(batch)["2048"])
    scores = {"fid": fid(made.as_dict(), real.as_dict()), "is": inception_score(torch.cat(logits))[0]}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for i, image in enumerate(images):
            save_png(Path(folder) / "made" / f"{i:06d}.png", image)
        seconds["write"] = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.png"))
        started = time.perf_counter()
        common = dict(
            input1=str(Path(folder) / "made"),
            cuda=device.type != "cpu",
            batch_size=args.batch_size,
            verbose=False,
            save_cpu_ram=True,
            cache=False,
            feature_extractor_weights_path=str(weights),
        )
        plain = torch_fidelity.calculate_metrics(isc=True, **common)
        seconds["read"] = time.perf_counter() - started
        for i, image in enumerate(moved):
            save_png(Path(folder) / "real" / f"{i:06d}.png", image)
        plain |= torch_fidelity.calculate_metrics(input2=str(Path(folder) / "real"), fid=True, **common)
    return seconds | {
        "bytes": size,
        "fid": scores["fid"],
        "is": scores["is"],
        "plain fid": plain["frechet_inception_distance"],
        "plain is": plain["inception_score_mean"],
    }


# ------------------------------------------------------------------------------------------------------------- scores of many images


def random_features(numbers: range) -> dict[str, Tensor]:
    """What the extractor would give for the images with these numbers; the same whichever process asks."""
    rng = np.random.default_rng([7, numbers.start])
    dims = {"2048": FEATURE_DIM, "spatial": SPATIAL_DIM, "logits_unbiased": LOGITS_DIM}
    found = {
        key: torch.from_numpy(rng.standard_normal((len(numbers), dim), dtype=np.float32)) for key, dim in dims.items()
    }
    return found | {key: torch.zeros(len(numbers), dtype=torch.bool) for key in ("near_constant", "saturated")}


def random_reference() -> object:
    """A reference with everything: both statistics and the features of 10,000 images."""
    from evaluation.reference import Reference

    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.standard_normal((REFERENCE_FEATURES, FEATURE_DIM), dtype=np.float32))
    return Reference(np.zeros(FEATURE_DIM), np.eye(FEATURE_DIM), np.zeros(SPATIAL_DIM), np.eye(SPATIAL_DIM), features)


def score_features(num_images: int, batch_size: int, pairs: bool) -> dict | None:
    """The scores of random features, as `engine_evaluate.evaluate` computes them; pairs: precision, recall and KID too."""
    from evaluation.scores import Scores
    from evaluation.store import batches_of

    reference = random_reference()
    if not pairs:
        reference.features = None
    scores = Scores(num_images, reference)
    for batch in batches_of(num_images, batch_size)[dist.rank() :: dist.world_size()]:
        scores.add(batch, random_features(batch))
    return scores.finish()


def _process(
    rank: int, world: int, port: int, out: str, function: Callable[..., dict | None], arguments: tuple
) -> None:
    """One process of `world`: run the function, let rank 0 write its result and the peak memory."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1 if world > 1 else torch.get_num_threads())
    device = dist.init("cpu")
    result, started = None, time.perf_counter()
    try:
        result = function(*arguments)
    finally:
        dist.shutdown()
    if result is not None:
        Path(out).write_text(
            json.dumps(result | {"peak_gib": dist.peak_memory_gib(device), "seconds": time.perf_counter() - started})
        )


def in_processes(world: int, function: Callable[..., dict | None], *arguments: object) -> dict:
    """What `function` returns on rank 0 of so many fresh processes, with "peak_gib" and "seconds". RuntimeError if one fails."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        context = multiprocessing.get_context("spawn")
        out = str(Path(folder) / "result.json")
        started = [
            context.Process(target=_process, args=(rank, world, port, out, function, arguments))
            for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise RuntimeError(f"a process ended with exit code {[process.exitcode for process in started]}")
        return json.loads(Path(out).read_text())


def bench_eval(args: argparse.Namespace) -> None:
    """Both tables."""
    device = dist.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_random_inception(Path(folder) / "inception.pth")
        runs = [compare_paths(args, weights, device) for _ in range(args.repeats)]
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    plain = found["write"] + found["read"]
    print_table(
        f"From {args.num_images} images of {args.img_size} pixels to features and Inception Score, on {device}",
        ["folder", "memory", "ratio"],
        [
            ("write PNGs, s", [f"{found['write']:.2f}", "-", ""]),
            ("features (and reading PNGs), s", [f"{found['read']:.2f}", f"{found['in memory']:.2f}", ""]),
            ("together, s", [f"{plain:.2f}", f"{found['in memory']:.2f}", f"{plain / found['in memory']:.2f}x"]),
            ("on the disk, MiB", [f"{found['bytes'] / 2**20:.1f}", "0.0", ""]),
            (
                "FID (random weights)",
                [f"{found['plain fid']:.6g}", f"{found['fid']:.6g}", f"{found['fid'] / found['plain fid'] - 1:+.1e}"],
            ),
            (
                "Inception Score (random weights)",
                [f"{found['plain is']:.6g}", f"{found['is']:.6g}", f"{found['is'] / found['plain is'] - 1:+.1e}"],
            ),
        ],
    )
    one = in_processes(1, score_features, args.scored_images, args.batch_size, args.pairs)
    columns = ["FID", "sFID", "IS", "precision", "recall", "KID", "peak GiB", "s"]

    def cells(result: dict) -> list[str]:
        numbers = [result[key] for key in ("fid", "sfid", "inception_score", "precision", "recall", "kid")]
        return ["-" if x is None else f"{x:.6g}" for x in numbers] + [
            f"{result['peak_gib']:.2f}",
            f"{result['seconds']:.0f}",
        ]

    two = in_processes(2, score_features, args.scored_images, args.batch_size, False)
    print_table(
        f"Scores of {args.scored_images} random features, in fresh processes on the CPU",
        columns,
        [("1 process", cells(one)), ("2 processes, no pairs", cells(two))],
    )
    apart = max(abs(two[key] / one[key] - 1) for key in ("fid", "sfid", "inception_score"))
    print(f"largest relative difference of 2 processes from 1: {apart:.1e} (to be below 1e-6)")


def check(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    at_least(args, num_images=10, img_size=8, batch_size=1, scored_images=10, repeats=1)


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    sub = add_command(
        commands,
        "eval",
        bench_eval,
        check,
        "scores of images: in memory against a folder of PNGs; memory, agreement of processes",
        1,
    )
    sub.add_argument("--num_images", type=int, default=64, help="images that go both ways")
    sub.add_argument("--img_size", type=int, default=256)
    sub.add_argument("--batch_size", type=int, default=64)
    sub.add_argument(
        "--scored_images", type=int, default=50_000, help="images whose scores are computed from random features"
    )
    sub.add_argument(
        "--pairs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="precision, recall and KID too, minutes on a CPU",
    )
