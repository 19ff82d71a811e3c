"""The paper's ablations on the demo's digits, small, with several seeds and their spread.

  python -m demo.ablations head       per-dimension autoregressive head against all dimensions of a token at once
  python -m demo.ablations bits       3, 4 and 6 bits per latent dimension
  python -m demo.ablations order      dimensions in frequency order against the reverse
  python -m demo.ablations all

Every run is the demo's model, trained for fewer steps on the demo's cache (made first if missing). Three figures are
compared: bits per dimension of held-out digits (cross-entropy of masked tokens, fixed masks), class accuracy of
generated digits (SVM), and the Fréchet distance between generated and training digits on that classifier's features,
its 45 pairwise margins. Ablations share runs; rerunning skips finished runs and resumes the interrupted one. Writes
OUT/ablations/<ablation>.json and prints the table.
"""

import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import main_tokenbridge
from dataset.image_folder import ImageFolderDataset
from dataset.images import atomic_write
from demo.digits import DIGITS
from demo.run import TRAINING, build_stages, run_stages
from generation import Pipeline, load
from models.sampling.orders import random_orders
from models.tokenbridge import TokenBridge, draw_mask_ratio, mask_from_orders, num_masked_tokens
from models.vae import AutoencoderKL
from util.checkpoint import atomic_save
from util.cli import check_writable, make_parser, run_cli
from util.files import write_json
from util.json_reader import read_json
from util.locks import folder_lock
from util.log import get_logger
from util.options import add_options, check_options, flag_names, option, read_options
from util.presets import load_preset
from util.stages import STAMP, StageRunner

logger = get_logger()

# Variant -> flags of main_tokenbridge.py. "reversed order" has a VAE file of its own, which holds the channel order.
VARIANTS = {
    "base": [],
    "parallel head": ["--head", "parallel"],
    "3 bits": ["--quant_bits", "3"],
    "4 bits": ["--quant_bits", "4"],
    "reversed order": [],
}
BASE = "6 bits, autoregressive head, frequency order"
# Ablation -> its variants, from worst to best by the paper.
ABLATIONS = {
    "head": ("parallel head", "base"),
    "bits": ("3 bits", "4 bits", "base"),
    "order": ("reversed order", "base"),
}
FIGURES = {"bits_per_dim": -1, "accuracy": +1, "frechet": -1}  # which direction is better
MASK_RATIO_MIN = load_preset("digits").flags["mask_ratio_min"]
SAMPLING = dict(cfg=2.0, temperature=0.9, num_iter=12)  # of the studies whose figures are in docs/


@dataclass(frozen=True)
class Options:
    """How often and how long each variant is trained."""

    seeds: int = option(3, "runs per variant", lowest=1, highest=1000)
    steps: int = option(600, "optimizer steps per run", lowest=1)
    batch_size: int = option(32, lowest=1)
    num_images: int = option(300, "samples per run", lowest=20, highest=10**6)

    def __post_init__(self) -> None:
        check_options(self)


def prepare(out: Path, sizes: Mapping[str, int]) -> None:
    """The demo's digits, VAE and cache, made by its own stages if missing; a VAE with reversed channel order."""
    folder = out / "ablations"
    if os.path.lexists(folder) and not (folder / STAMP).is_file():
        what = f"was not made by this command (it has no {STAMP}), which would replace its files"
        raise ValueError(f"{folder} {what}: choose another --output_dir, or move that folder away")
    run_stages(StageRunner(build_stages(DIGITS, out, out, sizes)[:4], out))
    write_json(folder / STAMP, {"made by": "python -m demo.ablations"})
    content = torch.load(out / "vae" / "vae.pth", weights_only=True)
    content["config"]["channel_order"] = content["config"]["channel_order"][::-1]
    atomic_save(content, folder / "vae-reversed.pth")


def train(variant: str, seed: int, options: Options, out: Path, folder: Path) -> Pipeline:
    """A trained model of this variant, EMA weights, with its VAE; resumes an interrupted run."""
    vae = out / "ablations" / "vae-reversed.pth" if variant == "reversed order" else out / "vae" / "vae.pth"
    values = dict(vae_path=vae, cached_path=out / "cache", output_dir=folder, resume=folder, seed=seed)
    values |= dict(batch_size=options.batch_size, max_steps=options.steps, epochs=100_000)
    values |= dict(ema_rate=0.99, save_last_freq=5)
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    main_tokenbridge.main([*TRAINING.format(name=DIGITS.name).split()[1:], *flags, *VARIANTS[variant]])
    return load(folder, vae, device="cpu")


@torch.no_grad()
def bits_per_dim(model: TokenBridge, vae: AutoencoderKL, root: Path, rounds: int = 8) -> float:
    """Cross-entropy in bits per dimension of the masked tokens of root/<class>/*.png.

    Latents are posterior means, with `rounds` fixed masks per image. Mask ratios are evenly
    spaced quantiles of the training distribution; every variant gets the same masks.
    """
    data = ImageFolderDataset(root, DIGITS.img_size, flip=False)
    images, labels = torch.stack([data.load(i) for i in range(len(data))]), torch.tensor(data.labels)
    latents = vae.scale(vae.encode(images).mode())  # (N, C, h, w)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for i in range(rounds):
        masked = num_masked_tokens(draw_mask_ratio(MASK_RATIO_MIN, (i + 0.5) / rounds), model.num_tokens)
        orders = random_orders(len(images), model.num_tokens, generator, images.device)
        losses.append(model(latents, labels, mask_from_orders(orders, masked), num_masked=masked).item())
    return statistics.mean(losses) / math.log(2)


def score_images(
    images: Sequence[Image.Image], labels: Sequence[int], train_root: Path, folder: Path
) -> tuple[float, float]:
    """(class accuracy, Fréchet distance); the images are written to `folder`, since the classifier reads files."""
    files = [folder / f"{number:06d}.png" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        atomic_write(image, file)
    return DIGITS.fit_classifier(train_root).score(files, labels)


def run_variant(variant: str, seed: int, options: Options, out: Path) -> dict:
    """The figures of one run, read from its result.json if it is finished."""
    steps, num_images = options.steps, options.num_images
    folder = out / "ablations" / f"{variant.replace(' ', '-')}-{steps}x{options.batch_size}-seed{seed}"
    result = folder / f"result-{num_images}.json"
    if result.is_file():
        return read_json(result)
    pipeline = train(variant, seed, options, out, folder)
    bits = bits_per_dim(pipeline.model, pipeline.vae, out / "digits" / "val")
    labels = [i * 10 // num_images for i in range(num_images)]  # as many of each class
    images = pipeline.generate(labels, seed=seed, batch_size=50, **SAMPLING)
    accuracy, distance = score_images(images, labels, out / "digits" / "train", folder / "samples")
    figures = {"variant": variant, "seed": seed, "steps": steps}
    figures |= {"bits_per_dim": bits, "accuracy": accuracy, "frechet": distance}
    write_json(result, figures)
    text = f"{bits:.3f} bits per dimension, class accuracy {accuracy:.1%}, Fréchet distance {distance:.3f}"
    logger.info("%s, seed %d: %s", variant, seed, text)
    return figures


def verdict(worse: Sequence[float], better: Sequence[float], direction: int) -> str:
    """Whether `better` beats `worse`: the mean over seeds of their difference against its standard deviation.

    Runs of one seed share the order of the data and the masks, so they are compared with each other.
    """
    gains = [direction * (b - w) for w, b in zip(worse, better, strict=True)]
    if len(gains) < 2:
        return "undecided (one seed)"
    mean = statistics.mean(gains)
    if abs(mean) <= statistics.stdev(gains):
        return "undecided (within the spread)"
    return "holds" if mean > 0 else "does not hold"


def summary(ablation: str, runs: dict[str, list[dict]]) -> dict:
    """Mean and standard deviation over seeds of every figure; the paper's sign for neighbouring variants."""
    values = {variant: {name: [run[name] for run in runs[variant]] for name in FIGURES} for variant in runs}
    table = {
        variant: {
            name: [statistics.mean(x), statistics.stdev(x) if len(x) > 1 else None] for name, x in figures.items()
        }
        for variant, figures in values.items()
    }
    compared = [name for name in FIGURES if (ablation, name) != ("bits", "bits_per_dim")]
    variants = ABLATIONS[ablation]
    signs = {
        f"{better} better than {worse}": {
            name: verdict(values[worse][name], values[better][name], FIGURES[name]) for name in compared
        }
        for worse, better in zip(variants, variants[1:], strict=False)
    }
    return {"ablation": ablation, "base": BASE, "table": table, "signs": signs, "runs": runs}


def print_summary(found: dict) -> None:
    """The table and the verdicts, for people."""
    print(f"\n{found['ablation']} (base: {found['base']}; mean ± standard deviation over seeds)")
    print(f"{'':<16}{'bits/dim, held out':>22}{'class accuracy':>20}{'Fréchet distance':>22}")
    for variant, figures in found["table"].items():
        cells = [f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}") for mean, spread in figures.values()]
        print(f"{variant:<16}{cells[0]:>22}{cells[1]:>20}{cells[2]:>22}")
    for pair, verdicts in found["signs"].items():
        print(f"{pair}: " + ", ".join(f"{name} {text}" for name, text in verdicts.items()))
    if found["ablation"] == "bits":
        print("bits per dimension of different quantizers are lengths of different codes and are not compared")


def main(argv: Sequence[str] | None = None, sizes: Mapping[str, int] = DIGITS.sizes) -> None:
    """Run the ablations, print their tables; `sizes` of the demo's stages. ValueError for bad input."""
    parser = make_parser(__doc__)
    parser.add_argument("ablation", choices=[*ABLATIONS, "all"])
    add_options(parser, Options)
    parser.add_argument(
        "--output_dir", default="demo/out", help="the demo's; its VAE and cache are used if they are there"
    )
    args = parser.parse_args(argv)
    with flag_names(parser):
        options = read_options(Options, args)
    out = check_writable(args.output_dir, "--output_dir").resolve()
    with folder_lock(out, "--output_dir"):
        prepare(out, sizes)
        ablations = list(ABLATIONS) if args.ablation == "all" else [args.ablation]
        runs: dict[str, list[dict]] = {variant: [] for ablation in ablations for variant in ABLATIONS[ablation]}
        for seed in range(options.seeds):  # seed by seed, so that the first results compare all variants
            for variant in runs:
                runs[variant].append(run_variant(variant, seed, options, out))
        for ablation in ablations:
            found = summary(ablation, {variant: runs[variant] for variant in ABLATIONS[ablation]})
            write_json(out / "ablations" / f"{ablation}.json", found)
            print_summary(found)


if __name__ == "__main__":
    sys.exit(run_cli(main))
