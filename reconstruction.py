"""How much the quantizer costs: reconstruct images through VAE and quantizer; PSNR, SSIM, rate and, where weights are there, rFID, IS and LPIPS.

  one setting   python reconstruction.py --bits 6 --range 5.0 --image_dir DIR          (if DIR holds train/: DIR/train)
  a sweep       python reconstruction.py --bits 3 4 5 6 --range 2 3 4 5 --image_dir DIR          (all pairs)
  many GPUs     torchrun --nproc_per_node=8 reconstruction.py --bits 6 --range 5.0 --image_dir DIR

DIR holds <class>/<image>, training or validation images alike; the first --images_per_class images of each class are used, or all, ADM-cropped.

FID is taken against two references. "FID" is against --fid_stats, at 256 px by default ADM's ImageNet statistics,
beside the published 1.11: that of 50 training images of each class, whose pixels the published script truncates, as
--pixels does here by default where published figures stand beside. "rFID" is against the images' own originals, beside
the published 0.53 of the VAE alone on the validation images.

Each image is encoded once; every pair and "VAE alone" decode the same latents. Prints a table and writes to OUT: results.json, results.csv,
rate_distortion.png, grid.png and worst_median.png (the images that the first pair, the first of --bits with the first of --range, harms most, and
those in the middle). The columns of both grids are original | VAE alone | quantized with the first pair.

The rate is given twice: "bits/image" as stored (bits x dimensions x tokens), and the entropy of the indices, each dimension coded by itself.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from checkpoints import download
from dataset.folders import BAD_IMAGE_CHOICES, ImageFolderDataset
from dataset.images import PIXELS, save_grid, save_png, to_uint8
from dataset.loader import build_loader
from evaluation.metrics import (
    IS_SPLITS,
    SMALLEST_FOR_LPIPS,
    SMALLEST_FOR_SSIM,
    FeatureStatistics,
    InceptionFeatures,
    InceptionScoreSums,
    Lpips,
    fetch_inception_weights,
    fid,
    psnr,
    ssim,
)
from evaluation.reference import Reference, load_reference
from evaluation.report import (
    PUBLISHED_IS_ABOUT,
    draw_rate_distortion,
    published_figures,
    table,
    worst_and_median,
    write_csv,
)
from models.quantizer import MAX_BITS, TableQuantizer
from models.quantizer_tables import QUANTIZERS, build_quantizer
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from util import dist
from util.cli import add_process_flags, at_least, check_writable, make_parser, parse
from util.files import write_json
from util.log import get_logger, run_cli
from util.options import flag_names
from util.seeds import mixed_seed

logger = get_logger()

FITTED_IMAGES = 256  # --quantizer lloyd is fitted to the latents of so many images
FEW_IMAGES = 10_000  # with fewer, FID's bias is larger than the differences between the rows
ADM_STATS = download.PUBLISHED["stats"].target


def as_list(value: object) -> list:
    """The values of a flag that takes one or several, each once."""
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


def images_per_class(text: str) -> int:
    """--images_per_class: a number, or "all"."""
    return sys.maxsize if text == "all" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """The published flags with their meaning and defaults (SPEC 10), and ours."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--vae_path", default="pretrained_models/vae/kl16.ckpt", help='VAE checkpoint (weights under "model")'
    )
    parser.add_argument(
        "--vae_embed_dim", type=int, default=None, help="latent channels, to be checked against the VAE's"
    )
    parser.add_argument(
        "--image_dir",
        default="./data/imagenet/train",
        help="folder with <class>/<image>, or with train/<class>/<image>",
    )
    parser.add_argument(
        "--images_per_class", type=images_per_class, default=50, help="the first so many images of each class, or all"
    )
    parser.add_argument(
        "--num_images", type=int, default=None, help="at most so many images in all, spread evenly over the classes"
    )
    parser.add_argument("--img_size", type=int, default=256, help="side of the images, pixels")
    parser.add_argument("--output_dir", default="quantization_results", help="where results.json and grid.png go")
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        default=6,
        help=f"bits per latent dimension, 1 to {MAX_BITS}; several make a sweep",
    )
    parser.add_argument(
        "--range", type=float, nargs="+", default=5.0, help="the quantizer covers [-range, range]; several make a sweep"
    )
    parser.add_argument(
        "--quantizer",
        nargs="+",
        default="gaussian",
        choices=QUANTIZERS,
        help="where the levels come from, several to compare: the paper's, equal widths, or fitted to the images' own latents",
    )
    parser.add_argument(
        "--save_images",
        action="store_true",
        help="also write every image quantized with the first pair to OUT/images/<class>/",
    )
    parser.add_argument(
        "--mode", action="store_true", help="decode the posterior's mean; default: a sample, as published"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images per process decoded together")
    parser.add_argument(
        "--precision", default="fp32", choices=dist.PRECISIONS, help="of the VAE; the quantizer is float32 always"
    )
    parser.add_argument(
        "--inception_weights", default=None, help="torch-fidelity's Inception weights; default: its download folder"
    )
    parser.add_argument(
        "--fid_stats",
        default=None,
        help="also the FID to these images' statistics (see python -m tools.fid_stats), not the originals'; "
        f"default at {download.PUBLISHED_SIZE} px: {ADM_STATS}, fetched if it is missing; none for no such FID",
    )
    parser.add_argument(
        "--no_download",
        action="store_true",
        help="fetch no published file that is missing (VAE, statistics, Inception weights)",
    )
    parser.add_argument(
        "--pixels",
        default=None,
        choices=PIXELS,
        help="how reconstructions become bytes; default: truncate, as the published script, "
        "where published figures stand beside, otherwise round",
    )
    parser.add_argument(
        "--lpips_weights",
        default=None,
        help="torchvision's AlexNet weights, for LPIPS; default: where torch keeps downloads",
    )
    parser.add_argument(
        "--no_rfid", action="store_true", help="no rFID and Inception Score even if the weights are there"
    )
    parser.add_argument(
        "--grid_images", type=int, default=8, help="rows of grid.png, spread evenly over the classes; 0 for no grid"
    )
    parser.add_argument("--on_bad_image", default="error", choices=BAD_IMAGE_CHOICES)
    add_process_flags(parser, seed=0)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused without reading a file. ValueError naming the flag."""
    at_least(args, images_per_class=1, num_images=1, batch_size=1, grid_images=0, img_size=SMALLEST_FOR_SSIM)
    for bits in as_list(args.bits):
        if not 1 <= bits <= MAX_BITS:
            raise ValueError(f"--bits must be from 1 to {MAX_BITS}, got {bits}")
    for half_width in as_list(args.range):
        if not (half_width > 0 and math.isfinite(half_width)):
            raise ValueError(f"--range must be finite and greater than 0, got {half_width}")
    if args.no_rfid and args.fid_stats not in (None, "none"):
        raise ValueError("--no_rfid and --fid_stats contradict each other; leave one out")
    if args.lpips_weights and args.img_size < SMALLEST_FOR_LPIPS:
        raise ValueError(
            f"--lpips_weights: LPIPS needs images of at least {SMALLEST_FOR_LPIPS} pixels, --img_size is {args.img_size}"
        )
    if args.no_rfid and args.inception_weights:
        raise ValueError("--no_rfid and --inception_weights contradict each other; leave one out")


def fill_in_defaults(args: argparse.Namespace) -> None:
    """Set --image_dir, --fid_stats and --pixels to what they mean.

    ValueError if --image_dir holds val/ but no train/.
    """
    root = Path(args.image_dir)
    if (root / "train").is_dir():
        args.image_dir = str(root / "train")
        logger.info("%s (--image_dir) holds train/: the images are those of %s", root, args.image_dir)
    elif (root / "val").is_dir():
        raise ValueError(f"{root} (--image_dir) holds val/, which is no class: give {root / 'val'}")
    args.fid_stats_given = args.fid_stats not in (None, "none")
    if args.fid_stats is None and args.img_size == download.PUBLISHED_SIZE and not args.no_rfid:
        args.fid_stats = ADM_STATS
    elif args.fid_stats == "none":
        args.fid_stats = None
    args.pixels = args.pixels or ("truncate" if beside_published(args) else "round")


def beside_published(args: argparse.Namespace) -> bool:
    """Whether the published figures stand beside ours: those of 256 px, against ADM's statistics."""
    return (
        args.img_size == download.PUBLISHED_SIZE
        and args.fid_stats is not None
        and Path(args.fid_stats).name == Path(ADM_STATS).name
    )


# ------------------------------------------------------------------------------------------------------------- images


def first_of_each_class(labels: Sequence[int], images_per_class: int, num_images: int | None) -> list[int]:
    """Numbers of the first `images_per_class` samples of each label, in their order; of these, `num_images` evenly spaced ones."""
    seen: dict[int, int] = {}
    chosen = []
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= images_per_class:
            chosen.append(number)
    return chosen if num_images is None else spread_evenly(chosen, num_images)


def spread_evenly(items: Sequence, count: int) -> list:
    """`count` items at equal distances, the first among them; all of them if there are not more."""
    return list(items) if count >= len(items) else [items[i * len(items) // count] for i in range(count)]


class NumberedImages(Dataset):
    """An ImageFolderDataset's images by their number -> (image (3, S, S) in [-1, 1], number, readable).

    A bad image is an error or, with --on_bad_image skip, left out: no other takes its place, which would count that one twice.
    """

    def __init__(self, folder: ImageFolderDataset):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, number: int) -> tuple[Tensor, int, bool]:
        try:
            return self.folder.load(number), number, True
        except ValueError as error:
            self.folder.bad.report(error, self.folder.samples[number][0])
            return torch.zeros(3, self.folder.img_size, self.folder.img_size), number, False


def posterior_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Normal noise (B, C, h, w) on the CPU; row i depends on (seed, numbers[i]) alone, whatever the batch, process or device."""
    return torch.stack(
        [
            torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(mixed_seed(seed, n)), device="cpu")
            for n in numbers
        ]
    )


# ------------------------------------------------------------------------------------------------------------- one row of the table


@dataclass
class Row:
    """What is known of one variant: the VAE alone (no quantizer), or one kind of quantizer with one (bits, range) pair."""

    quantizer: TableQuantizer | None
    used: Tensor | None = None  # (C, K) int64: how often each index occurred in each dimension
    outside: Tensor | None = None  # scalar int64: latents that the quantizer clamps
    # image number -> PSNR, SSIM and, with weights, LPIPS
    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    statistics: FeatureStatistics | None = None
    classes: InceptionScoreSums | None = None

    @property
    def pair(self) -> tuple[int, float] | None:
        return None if self.quantizer is None else (self.quantizer.bits, self.quantizer.max_value)

    @property
    def kind(self) -> str | None:
        return None if self.quantizer is None else self.quantizer.kind

    @property
    def name(self) -> str:
        if self.quantizer is None:
            return "VAE alone"
        return f"{self.quantizer.bits} bits, ±{self.quantizer.max_value:g}" + (
            "" if self.kind == "gaussian" else f", {self.kind}"
        )

    def quantized(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> what is left of them after the trip through their indices; counts those indices."""
        if self.quantizer is None:
            return latents
        indices = self.quantizer.quantize(latents)
        self.used += torch.stack(
            [torch.bincount(one.flatten(), minlength=self.used.shape[1]) for one in indices.unbind(1)]
        )
        self.outside += (latents.abs() > self.quantizer.max_value).sum()
        return self.quantizer.dequantize(indices)


def build_rows(
    kinds: Sequence[str],
    bits: Sequence[int],
    ranges: Sequence[float],
    device: torch.device,
    num_channels: int,
    latents: Tensor | None = None,
    num_images: int | None = None,
) -> list[Row]:
    """VAE alone first, then every kind of quantizer with every pair of bits and range; latents: what lloyd is fitted to.

    num_images: how many images will come, if features of them are wanted.
    """
    rows = [Row(None)]
    for kind in kinds:
        for b in bits:
            for half_width in ranges:
                quantizer = build_quantizer(
                    kind, b, -half_width, half_width, latents=None if latents is None else latents.numpy()
                ).to(device)
                used = torch.zeros(num_channels, 2**b, dtype=torch.int64, device=device)
                rows.append(Row(quantizer, used, torch.zeros((), dtype=torch.int64, device=device)))
    for row in rows if num_images is not None else ():
        row.statistics = FeatureStatistics()
        row.classes = InceptionScoreSums(num_images) if num_images >= IS_SPLITS else None
    return rows


@torch.no_grad()
def latents_to_fit(
    vae: AutoencoderKL,
    folder: ImageFolderDataset,
    chosen: Sequence[int],
    args: argparse.Namespace,
    device: torch.device,
) -> Tensor:
    """Scaled latents (N, C, h, w) of at most FITTED_IMAGES of the chosen images, on the CPU; computed by rank 0 for all. ValueError if unreadable."""
    found, problem = [], None
    try:
        for number in spread_evenly(chosen, FITTED_IMAGES) if dist.is_main() else ():
            image, _, readable = NumberedImages(folder)[number]
            if readable:
                posterior = vae.encode(image[None].to(device))
                noise = posterior_noise(args.seed, [number], posterior.mean.shape[1:]).to(device)
                found.append(finite(vae.scale(posterior.sample(noise=noise)), [number], "latents", "fp32").cpu())
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)
    latents = dist.broadcast_from_main(torch.cat(found) if found else None)
    if latents is None:
        raise ValueError(f"{args.image_dir} (--image_dir): no image to fit --quantizer lloyd to can be read")
    return latents


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass
class Outcome:
    """What one pass over this process's images gives besides the rows."""

    done: list[int] = field(default_factory=list)  # numbers of the images that were read
    bad: list[int] = field(default_factory=list)  # and of those that could not be
    num_latents: int = 0  # scalars, each quantized once per pair
    originals: FeatureStatistics | None = None
    # number -> original, VAE alone, first pair; uint8 (3, S, S)
    pictures: dict[int, list[Tensor]] = field(default_factory=dict)


def finite(x: Tensor, numbers: Sequence[int], what: str, precision: str) -> Tensor:
    """x (B, ...) itself; ValueError naming an image if its part of x is not finite."""
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the {what} of image {numbers[bad[0]]} (and {len(bad) - 1} more of its batch) are not finite: "
            + (
                "the VAE (--vae_path) is broken"
                if precision == "fp32"
                else f"--precision {precision} overflowed; use fp32"
            )
        )
    return x


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL,
    rows: Sequence[Row],
    folder: ImageFolderDataset,
    mine: Sequence[int],
    shown: Sequence[int],
    args: argparse.Namespace,
    device: torch.device,
    features: InceptionFeatures | None,
    places: dict[int, int],
    lpips: Lpips | None = None,
) -> Outcome:
    """Fill `rows` from the images numbered `mine`: encode once, then decode each row's version of the same latents.

    places: image number -> its place among all chosen ones, which decides its split of the Inception Score.
    """
    out = Outcome(originals=None if features is None else FeatureStatistics())
    batches = [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    loader = build_loader(NumberedImages(folder), batches, args.num_workers, args.pin_mem)
    for images, numbers, readable in tqdm(loader, unit="batch", disable=not dist.is_main()):
        out.bad += numbers[~readable].tolist()
        if not readable.any():
            continue
        images, numbers = images[readable].to(device), numbers[readable].tolist()  # (B, 3, S, S)
        out.done += numbers
        with dist.autocast(device, args.precision):
            posterior = vae.encode(images)
        shape = posterior.mean.shape[1:]
        noise = torch.zeros(len(numbers), *shape) if args.mode else posterior_noise(args.seed, numbers, shape)
        raw = posterior.mean.float() + posterior.std.float() * noise.to(device)  # (B, C, h, w)
        latents = finite(vae.scale(raw), numbers, "latents", args.precision)
        out.num_latents += latents.numel()
        originals = to_uint8(images)
        if features is not None:
            out.originals.update(features(originals)["2048"])
        versions = [originals]
        for row in rows:
            with dist.autocast(device, args.precision):
                decoded = vae.decode(vae.unscale(row.quantized(latents)))
            version = to_uint8(finite(decoded, numbers, "pixels", args.precision), args.pixels)
            measured = [psnr(version, originals), ssim(version, originals)] + (
                [lpips(version, originals)] if lpips is not None else []
            )
            row.scores.update(zip(numbers, zip(*(values.tolist() for values in measured), strict=True), strict=True))
            if features is not None:
                found = features(version)
                row.statistics.update(found["2048"])
                if row.classes is not None:
                    row.classes.update([places[number] for number in numbers], found["logits_unbiased"])
            if len(versions) < 3:  # original, VAE alone, first pair
                versions.append(version)
        for i, number in enumerate(numbers):
            if args.save_images:
                name = Path(folder.samples[number][0]).relative_to(args.image_dir)
                save_png(
                    Path(args.output_dir) / "images" / (name if name.suffix == ".png" else f"{name}.png"),
                    versions[2][i],
                )
            if number in shown:
                out.pictures[number] = [version[i].cpu() for version in versions]
    return out


def gathered(mine: dict[int, object]) -> dict[int, object]:
    """All processes' {image number: value}, in image order."""
    everything = {number: value for part in dist.gather_objects(mine) for number, value in part.items()}
    return {number: everything[number] for number in sorted(everything)}


def summarise(
    row: Row,
    out: Outcome,
    reference: dict | None,
    num_images: int,
    other: Reference | None = None,
    published: bool = False,
) -> dict:
    """A row's figures over all processes' images; every process must call it, rFID, FID and Inception Score are on rank 0 only."""
    scores = list(zip(*gathered(row.scores).values(), strict=True))
    means = [math.fsum(values) / len(values) for values in scores] + [None] * (3 - len(scores))
    figures = {
        "name": row.name,
        "bits": row.pair and row.pair[0],
        "range": row.pair and row.pair[1],
        "quantizer": row.kind,
        **dict(zip(("psnr", "ssim", "lpips"), means, strict=True)),
        "rfid": None,
        "fid": None,
        "inception_score": None,
        "inception_score_std": None,
        "clamped_share": None,
        "indices_used": None,
        "bits_per_image": None,
        "entropy_bits_per_image": None,
        "entropy_per_dimension": None,
        **published_figures(row.pair, published and row.kind in (None, "gaussian")),
    }
    if row.quantizer is not None:
        used, counts = (
            dist.all_reduce_sum(row.used),
            dist.all_reduce_sum(torch.stack([row.outside, row.outside.new_tensor(out.num_latents)])),
        )
        p = used.double() / used.sum(1, keepdim=True)  # (C, K)
        entropy = -torch.xlogy(p, p).sum(1) / math.log(2)  # (C,) bits
        per_dimension = float(counts[1]) / num_images / len(used)  # tokens of an image
        figures |= {
            "indices_used": int((used.sum(0) > 0).sum()),
            "clamped_share": float(counts[0]) / float(counts[1]),
            "bits_per_image": row.quantizer.bits * len(used) * per_dimension,
            "entropy_bits_per_image": float(entropy.sum()) * per_dimension,
            "entropy_per_dimension": entropy.tolist(),
        }
    if reference is not None:
        statistics = row.statistics.merge().as_dict()
        if row.classes is not None:
            row.classes.merge()
        if dist.is_main():  # an eigenvalue problem: seconds on all cores
            figures["rfid"] = fid(statistics, reference)
            figures["fid"] = None if other is None else fid(statistics, other.pool)
            if row.classes is not None:
                figures["inception_score"], figures["inception_score_std"] = row.classes.score()
    return figures


def worst_median_grid(
    vae: AutoencoderKL,
    rows: Sequence[Row],
    folder: ImageFolderDataset,
    psnr_of: dict[int, float],
    args: argparse.Namespace,
    device: torch.device,
) -> Tensor:
    """uint8 (M, 3, S, S): for the images that the first pair harms most and for those in the middle, original | VAE alone | first pair."""
    wanted = [number for part in worst_and_median(psnr_of, args.grid_images // 2) for number in part]
    alone, first = rows[:2]
    first_pair = [
        Row(alone.quantizer),
        Row(first.quantizer, torch.zeros_like(first.used), torch.zeros_like(first.outside)),
    ]
    once = argparse.Namespace(**{**vars(args), "save_images": False, "num_workers": 0})
    pictures = reconstruct(
        vae, first_pair, folder, list(dict.fromkeys(wanted)), set(wanted), once, device, None, {}
    ).pictures
    return torch.stack([picture for number in wanted for picture in pictures[number]])


def load_features(args: argparse.Namespace, device: torch.device) -> tuple[InceptionFeatures | None, str | None]:
    """(extractor, None), or (None, why there is no rFID). Weights that were asked for and are absent or broken are an error."""
    if args.no_rfid:
        return None, "--no_rfid was given"
    try:
        fetch_inception_weights(args.inception_weights, download=not args.no_download)
    except (FileNotFoundError, ValueError) as error:  # ValueError: another process could not
        if args.inception_weights or args.fid_stats_given:
            raise
        return None, str(error)
    return InceptionFeatures(args.inception_weights, device), None


def load_other(
    args: argparse.Namespace, features: InceptionFeatures | None, no_rfid: str | None
) -> tuple[Reference | None, str | None]:
    """(the reference of --fid_stats, None), or (None, why there is no FID to it).

    One that was asked for and is absent is an error.
    """
    if features is None or args.fid_stats is None:
        return None, no_rfid or "no --fid_stats"
    try:
        download.provide(args.fid_stats, "--fid_stats", args.no_download)
    except (OSError, ValueError) as error:  # ValueError: another process could not
        if args.fid_stats_given:
            raise
        return None, str(error)
    reference = load_reference(args.fid_stats, features, args.img_size, batch_size=args.batch_size)
    published = download.PUBLISHED["stats"].git_blob
    if beside_published(args) and download.file_hash(args.fid_stats, published) != published and dist.is_main():
        logger.warning(
            "%s (--fid_stats) has another content than ADM's published file: FID is not comparable with the "
            "published figures",
            args.fid_stats,
        )
    return reference, None


def load_lpips(args: argparse.Namespace, device: torch.device) -> tuple[Lpips | None, str | None]:
    """(LPIPS, None), or (None, why there is none). Weights that were asked for and are absent or broken are an error."""
    if args.img_size < SMALLEST_FOR_LPIPS:
        return None, f"it needs {SMALLEST_FOR_LPIPS} pixels"
    try:
        return Lpips(args.lpips_weights, device), None
    except (FileNotFoundError, ImportError) as error:
        if args.lpips_weights:
            raise ValueError(str(error)) from error
        return None, str(error)


def run_record(
    args: argparse.Namespace, vae: AutoencoderKL, folder: ImageFolderDataset, done: Sequence[int], bad: Sequence[int]
) -> dict:
    """What results.json says of the run: settings, images, VAE, reference, pixels, what the published figures are."""
    return {
        "settings": {name: value for name, value in vars(args).items() if name != "fid_stats_given"},
        "num_images": len(done),
        "num_classes": len({folder.labels[n] for n in done}),
        "bad_images": [folder.samples[n][0] for n in bad],
        "world_size": dist.world_size(),
        "vae": {
            "path": str(args.vae_path),
            "scale_factor": vae.scale_factor,
            "shift": vae.shift,
            "stride": vae.stride,
            "fingerprint": vae.latent_fingerprint(),
        },
        "fid_stats": args.fid_stats,
        "pixels": args.pixels,
        "published_is_about": PUBLISHED_IS_ABOUT if beside_published(args) else None,
    }


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Check and load everything, reconstruct, write and print (rank 0). ValueError or OSError for bad input."""
    args.vae_path = download.local_path(args.vae_path, "--vae_path")
    download.provide(args.vae_path, "--vae_path", args.no_download)
    vae = load_vae(args.vae_path, args.vae_embed_dim)
    if args.img_size % vae.stride:
        raise ValueError(f"--img_size {args.img_size} is not a multiple of {vae.stride}, the stride of {args.vae_path}")
    folder = ImageFolderDataset(
        args.image_dir, args.img_size, flip=False, on_bad_image=args.on_bad_image, flag="--image_dir"
    )
    chosen = first_of_each_class(folder.labels, args.images_per_class, args.num_images)
    features, no_rfid = load_features(args, device)
    lpips, no_lpips = load_lpips(args, device)
    other, no_fid = load_other(args, features, no_rfid)
    output = check_writable(args.output_dir, "--output_dir")
    vae, kinds = vae.to(device), as_list(args.quantizer)
    fitted_to = latents_to_fit(vae, folder, chosen, args, device) if "lloyd" in kinds else None
    rows = build_rows(
        kinds,
        as_list(args.bits),
        as_list(args.range),
        device,
        vae.embed_dim,
        fitted_to,
        None if features is None else len(chosen),
    )
    logger.info(
        "%d images of %d classes from %s, %d px; VAE %s, scale %s; %s; %s on %s; --pixels %s",
        len(chosen),
        len(folder.classes),
        args.image_dir,
        args.img_size,
        args.vae_path,
        vae.scale_factor,
        "posterior mean" if args.mode else "posterior samples",
        args.precision,
        device,
        args.pixels,
    )
    if no_rfid and dist.is_main():
        logger.warning("rFID and Inception Score are not computed: %s", no_rfid)
    if no_fid and not no_rfid and args.fid_stats and dist.is_main():
        logger.warning("the FID against %s is not computed: %s", args.fid_stats, no_fid)
    if no_lpips and dist.is_main():
        logger.info("LPIPS is not computed: %s", no_lpips)

    shown, out, error = set(spread_evenly(chosen, args.grid_images)), Outcome(), None
    try:
        out = reconstruct(
            vae,
            rows,
            folder,
            chosen[dist.rank() :: dist.world_size()],
            shown,
            args,
            device,
            features,
            {number: place for place, number in enumerate(chosen)},
            lpips,
        )
    except (ValueError, OSError) as caught:
        error = caught
    dist.agree(error)
    done, bad = (sorted(n for part in dist.gather_objects(numbers) for n in part) for numbers in (out.done, out.bad))
    if not done:
        raise ValueError(f"{args.image_dir} (--image_dir): not one of the {len(bad)} chosen images can be read")
    if features is not None and len(done) < 2:
        no_rfid = f"it needs at least two images, there is {len(done)}"
    reference = out.originals.merge().as_dict() if features is not None and no_rfid is None else None
    if reference is None:
        no_fid = no_rfid
    figures = [summarise(row, out, reference, len(done), other, beside_published(args)) for row in rows]
    pictures, first_pair = gathered(out.pictures), gathered(rows[1].scores)
    if not dist.is_main():
        return
    write_json(
        output / "results.json",
        run_record(args, vae, folder, done, bad)
        | {
            "device": str(device),
            "inception_sha256": None if features is None else features.sha256,
            "rfid_not_computed": no_rfid,
            "fid_not_computed": no_fid,
            "lpips_not_computed": no_lpips,
            "rows": figures,
        },
    )
    write_csv(output / "results.csv", figures, args.pixels)
    draw_rate_distortion(output / "rate_distortion.png", figures)
    if args.grid_images >= 2:
        save_grid(
            output / "worst_median.png",
            worst_median_grid(vae, rows, folder, {n: scores[0] for n, scores in first_pair.items()}, args, device),
            3,
        )
    if pictures:
        save_grid(output / "grid.png", torch.stack([image for row in pictures.values() for image in row]), columns=3)
    if bad:
        logger.warning("%d of %d chosen images could not be read and were left out", len(bad), len(chosen))
    print(table(figures))
    print(
        f"rFID, IS: not computed ({no_rfid})"
        if no_rfid
        else f"rFID over {len(done)} images"
        + (
            f"; fewer than {FEW_IMAGES}, so too high: compare rows with each other, not with published numbers"
            if len(done) < FEW_IMAGES
            else ""
        )
    )
    if args.fid_stats and not no_rfid:
        print(
            f"FID against {args.fid_stats}: not computed ({no_fid})"
            if no_fid
            else f"FID against {args.fid_stats}, pixels: {args.pixels}"
        )
    logger.info(
        "wrote %s and, with columns original | VAE alone | %s, %s",
        output / "results.json",
        rows[1].name,
        output / "grid.png",
    )


@flag_names(build_parser(), quant_min="range")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run. Raises ValueError or OSError for bad input."""
    args, _ = parse(build_parser(), argv)
    check_arguments(args)
    fill_in_defaults(args)
    try:
        run(args, dist.init(args.device, args.dist_url))
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
