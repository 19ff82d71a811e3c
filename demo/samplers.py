"""What the sampler's options do to time and quality, on the demo's digits model.

  python -m demo.samplers              after `make demo`

Every setting generates the same number of images of each class, once per seed, in turn with the others. It is scored as
the ablations are: class accuracy by a classifier, and the Fréchet distance to training digits on the classifier's
features. `equal` is the share of images whose pixels are those of the exact sampler: 100 % means that the option is
exact here. Writes OUT/samplers.json and prints the table.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.ablations import SAMPLING, score_images
from generation import Pipeline, load
from util.cli import check_writable, make_parser, run_cli
from util.files import write_json
from util.log import get_logger
from util.options import add_options, check_options, flag_names, option, read_options

logger = get_logger()

EXACT = "random order, nothing reused"
# Name -> sampler options beside SAMPLING.
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


@dataclass(frozen=True)
class Options:
    """How many images every setting makes."""

    num_images: int = option(500, "images per setting and seed", lowest=20, highest=10**6)
    seeds: int = option(3, lowest=1, highest=1000)

    def __post_init__(self) -> None:
        check_options(self)


Figures = dict[str, dict[str, list[float]]]  # setting -> figure -> one value per seed


def study(
    pipeline: Pipeline, settings: Mapping[str, Mapping], sampling: Mapping, num_images: int, seeds: range, out: Path
) -> Figures:
    """Seconds (of all images), accuracy, frechet and equal of each setting; `sampling` holds the options they share."""
    labels = [i * 10 // num_images for i in range(num_images)]
    results: Figures = {name: {} for name in settings}
    pipeline.generate(labels[:50], batch_size=50, **sampling)  # warm up
    for seed in seeds:
        exact: list[Image.Image] = []
        for name, options in settings.items():
            started = time.perf_counter()
            images = pipeline.generate(labels, seed=seed, batch_size=50, **sampling | options)
            figures = {"seconds": time.perf_counter() - started}
            exact = exact or images
            folder = out / "samplers" / name.replace(" ", "-").replace(",", "")
            figures["accuracy"], figures["frechet"] = score_images(images, labels, out / "digits" / "train", folder)
            figures["equal"] = statistics.mean(a.tobytes() == b.tobytes() for a, b in zip(images, exact, strict=True))
            for key, value in figures.items():
                results[name].setdefault(key, []).append(value)
        logger.info("seed %d: %s", seed, ", ".join(f"{n} {f['accuracy'][-1]:.1%}" for n, f in results.items()))
    return results


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several values, standard deviation."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def print_study(results: Figures, sampling: Mapping, num_images: int) -> None:
    """The table: mean and standard deviation over the seeds; the time as a ratio to the exact sampler's."""
    print(
        f"\n{num_images} images per seed, {sampling['num_iter']} iterations, cfg {sampling['cfg']}, "
        f"temperature {sampling['temperature']}; mean ± standard deviation over seeds"
    )
    print(f"{'':<38}{'time':>8}{'accuracy, %':>18}{'Fréchet distance':>20}{'equal images':>16}")
    base = statistics.mean(results[EXACT]["seconds"])
    for name, figures in results.items():
        accuracy = spread([100 * value for value in figures["accuracy"]], ".1f")
        print(
            f"{name:<38}{statistics.mean(figures['seconds']) / base:>7.2f}x{accuracy:>18}"
            f"{spread(figures['frechet'], '.3f'):>20}{statistics.mean(figures['equal']):>16.1%}"
        )


def run(
    pipeline: Pipeline,
    out: Path,
    num_images: int,
    seeds: range,
    settings: Mapping = SETTINGS,
    sampling: Mapping = SAMPLING,
) -> None:
    """The study, written to out/samplers.json and printed."""
    results = study(pipeline, settings, sampling, num_images, seeds, out)
    write_json(out / "samplers.json", {"num_images": num_images, "sampling": sampling, "settings": results})
    print_study(results, sampling, num_images)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study on OUT/model, print the table. ValueError for bad input."""
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", default="demo/out", help="the demo's, with its digits, VAE and model")
    add_options(parser, Options)
    args = parser.parse_args(argv)
    with flag_names(parser):
        options = read_options(Options, args)
    out = Path(args.output_dir).resolve()
    if not (out / "model").is_dir():
        raise ValueError(f"{out} (--output_dir) holds no trained digits model; run make demo first")
    check_writable(out, "--output_dir")
    pipeline = load(out / "model", out / "vae" / "vae.pth", device="cpu")
    run(pipeline, out, options.num_images, range(options.seeds))


if __name__ == "__main__":
    sys.exit(run_cli(main))
