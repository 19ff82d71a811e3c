"""What the sampler's options do to time and quality, on the demo's digits model.

  python -m demo.samplers              after `make demo`

Every setting draws the same number of images of each class, once per seed, in turn with the others, and is judged as the ablations are: the share that
a classifier takes for its class, and the Fréchet distance to training digits on the classifier's features. `equal` is the share of images whose
pixels are those of the exact sampler, draw for draw: 100 % means that the option is exact here. Writes OUT/samplers.json and prints the table.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from demo.ablations import SAMPLING, judge_images
from generation.library import generate
from generation.loading import load
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util.cli import at_least, check_writable, make_parser
from util.files import write_json
from util.log import get_logger, run_cli

logger = get_logger()

EXACT = "random order, nothing reused"
# Name -> options of models.sampling.options.SamplerOptions beside the demo's.
SETTINGS: dict[str, dict] = {
    EXACT: {},
    "reuse_features 2": dict(reuse_features=2),
    "reuse_features 4": dict(reuse_features=4),
    "reuse_guidance 2": dict(reuse_guidance=2),
    "reuse_guidance 4": dict(reuse_guidance=4),
    "reuse_features 2, reuse_guidance 2": dict(reuse_features=2, reuse_guidance=2),
    "order confidence": dict(order="confidence"),
    "order halton": dict(order="halton"),
    "order subsample": dict(order="subsample"),
    "order raster": dict(order="raster"),
}


def draw(
    model: TokenBridge, vae: AutoencoderKL, labels: Sequence[int], seed: int, options: dict
) -> tuple[list[Image.Image], float]:
    """The images and the seconds that they took."""
    started = time.perf_counter()
    images = generate(model, vae, list(labels), seed=seed, batch_size=50, **SAMPLING | options)
    return images, time.perf_counter() - started


def study(
    model: TokenBridge, vae: AutoencoderKL, num_images: int, seeds: Sequence[int], out: Path
) -> dict[str, dict[str, list[float]]]:
    """Setting -> its figures, one per seed: seconds (of all images), accuracy, frechet, equal."""
    labels = [i * 10 // num_images for i in range(num_images)]
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "accuracy": [], "frechet": [], "equal": []} for name in SETTINGS
    }
    generate(model, vae, labels[:50], batch_size=50, **SAMPLING)  # warm up
    for seed in seeds:
        exact: list[Image.Image] = []
        for name, options in SETTINGS.items():
            images, seconds = draw(model, vae, labels, seed, options)
            exact = exact or images
            accuracy, distance = judge_images(
                images, labels, out / "digits" / "train", out / "samplers" / name.replace(" ", "-").replace(",", "")
            )
            equal = statistics.mean(a.tobytes() == b.tobytes() for a, b in zip(images, exact, strict=True))
            for key, value in (("seconds", seconds), ("accuracy", accuracy), ("frechet", distance), ("equal", equal)):
                found[name][key].append(value)
        logger.info(
            "seed %d: %s", seed, ", ".join(f"{name} {figures['accuracy'][-1]:.1%}" for name, figures in found.items())
        )
    return found


def print_study(found: dict[str, dict[str, list[float]]], num_images: int) -> None:
    """Mean and standard deviation over the seeds; the time as a ratio to the exact sampler's."""

    def spread(values: Sequence[float], form: str, unit: float = 1.0) -> str:
        values = [value * unit for value in values]
        return format(statistics.mean(values), form) + (
            f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        )

    print(
        f"\n{num_images} images per seed, {SAMPLING['num_iter']} iterations, cfg {SAMPLING['cfg']}, temperature {SAMPLING['temperature']}; "
        "mean ± standard deviation over seeds"
    )
    print(f"{'':<38}{'time':>8}{'accuracy, %':>18}{'Fréchet distance':>20}{'equal images':>16}")
    base = statistics.mean(found[EXACT]["seconds"])
    for name, figures in found.items():
        print(
            f"{name:<38}{statistics.mean(figures['seconds']) / base:>7.2f}x{spread(figures['accuracy'], '.1f', 100):>18}"
            f"{spread(figures['frechet'], '.3f'):>20}{statistics.mean(figures['equal']):>16.1%}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study on OUT/model, print the table. ValueError for bad input."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--output_dir", default="demo/out", help="the demo's: its digits, VAE and model are read from there"
    )
    parser.add_argument("--num_images", type=int, default=500, help="images per setting and seed")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    at_least(args, num_images=20, seeds=1)
    out = check_writable(args.output_dir, "--output_dir").resolve()
    if not (out / "model").is_dir():
        raise ValueError(f"{out} (--output_dir) holds no trained digits model; run make demo first")
    model, vae = load(out / "model", out / "vae" / "vae.pth", device="cpu")
    found = study(model, vae, args.num_images, range(args.seeds), out)
    write_json(out / "samplers.json", {"num_images": args.num_images, "sampling": SAMPLING, "settings": found})
    print_study(found, args.num_images)


if __name__ == "__main__":
    sys.exit(run_cli(main))
