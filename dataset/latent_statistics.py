"""What a VAE's latents look like, and what TokenBridge should use for them: scale, channel order, bits and range (SPEC 3, 6).

  python -m tools.vae_stats --vae_path VAE --data_path DIR --img_size 256 --output_dir OUT                   measure, suggest, plot
  python -m tools.vae_stats ... --install                              write the suggestion beside the VAE's weights, where every script finds it
  python -m tools.vae_stats ... --quantizer lloyd                      also fit the levels, to OUT/quantizer.json (--quantizer_tables of the others)

Images are DIR/train/<class>/<image>. Writes OUT/description.json (models/latent_space.py), OUT/stats.json with every figure, and
OUT/vae_stats.png. Rate and distortion: for each number of bits the range whose quantizer has the least mean square error on the scaled latents;
of these the fewest bits whose decoded images lose at most --tolerance dB of PSNR against the VAE alone.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from checkpoints import download
from dataset.images import to_uint8
from dataset.loader import BAD_IMAGE_CHOICES, ImageFolderDataset
from evaluation.metrics import psnr
from util import dist
from util.cli import add_process_flags, at_least, check_writable, make_parser, parse
from util.files import replacing, write_json
from util.log import get_logger, run_cli

if TYPE_CHECKING:
    from models.latent_space import VaeDescription
    from models.quantizer import TableQuantizer
    from models.vae import AutoencoderKL

logger = get_logger()

RANGES = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0)
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- figures of latents


def latent_scale(latents: Tensor) -> float:
    """1/std over all entries of raw latents (N, C, h, w): the factor that brings them to unit variance."""
    return float(1 / latents.double().std())


def low_frequency_share(latents: Tensor) -> Tensor:
    """Share of each channel's FFT energy (mean removed) within half the Nyquist frequency: latents (N, C, h, w) -> (C,).

    A channel whose energy varies slowly over the grid describes layout; one with energy at high frequencies describes detail.
    """
    x = latents.double()
    x = x - x.mean(dim=(0, 2, 3), keepdim=True)
    energy = torch.fft.fft2(x).abs().square().mean(0)  # (C, h, w)
    frequency = [torch.fft.fftfreq(n, dtype=torch.float64) for n in x.shape[-2:]]
    radius = (frequency[0][:, None] ** 2 + frequency[1][None, :] ** 2).sqrt()  # (h, w), cycles per position
    return (energy * (radius <= 0.25)).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-30)


def frequency_order(latents: Tensor) -> list[int]:
    """Channels from the most to the least low-frequency energy: the order in which the head predicts them (SPEC 6)."""
    return low_frequency_share(latents).argsort(descending=True, stable=True).tolist()


def channel_moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of latents (N, C, h, w): (C,) each, float64."""
    x = latents.double()
    return x.mean((0, 2, 3)), x.std((0, 2, 3))


def normal_distance(latents: Tensor) -> Tensor:
    """How far each channel is from a normal of its own mean and spread: excess kurtosis, (C,); 0 for a normal, larger for heavy tails."""
    x = latents.double()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return x.pow(4).mean((0, 2, 3)) - 3


def entropy_bits(indices: Tensor, levels: int) -> float:
    """Entropy of the indices (any shape), bits per latent scalar: the rate that an ideal code would need."""
    share = torch.bincount(indices.flatten(), minlength=levels).double() / indices.numel()
    return float(-(share[share > 0] * share[share > 0].log2()).sum())


def rate_distortion(
    latents: Tensor, build: Callable[[int, float], "TableQuantizer"], bits: Sequence[int], ranges: Sequence[float]
) -> list[dict]:
    """Every pair of bits and half range on scaled latents: {bits, range, mse, rate (entropy, bits), clamped (share)}.

    build(bits, half range) -> quantizer.
    """
    points = []
    for b in bits:
        for half in ranges:
            quantizer = build(b, half)
            indices = quantizer.quantize(latents)
            error = (quantizer.dequantize(indices) - latents).double().square().mean()
            points.append(
                {
                    "bits": b,
                    "range": half,
                    "mse": float(error),
                    "rate": entropy_bits(indices, 2**b),
                    "clamped": float((latents.abs() > half).double().mean()),
                }
            )
    return points


def best_ranges(points: Sequence[dict]) -> list[dict]:
    """Of each number of bits the point with the least error."""
    return [
        min((p for p in points if p["bits"] == b), key=lambda p: p["mse"])
        for b in dict.fromkeys(p["bits"] for p in points)
    ]


# ------------------------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    from models.quantizer import MAX_BITS, QUANTIZERS

    parser = make_parser(__doc__)
    parser.add_argument(
        "--vae_path", default="pretrained_models/vae/kl16.ckpt", help="VAE checkpoint, or a folder of diffusers"
    )
    parser.add_argument("--data_path", default="./data/imagenet", help="folder with train/<class>/<image>")
    parser.add_argument("--img_size", type=int, default=256, help="side of the images, pixels")
    parser.add_argument(
        "--num_images",
        type=int,
        default=2048,
        help="at most so many, spread evenly over the classes, for the latents' figures",
    )
    parser.add_argument("--decoded_images", type=int, default=64, help="of these so many are decoded for the PSNR")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[3, 4, 5, 6, 7, 8], help=f"numbers of bits to try, 1 to {MAX_BITS}"
    )
    parser.add_argument("--range", type=float, nargs="+", default=list(RANGES), help="half ranges to try")
    parser.add_argument(
        "--quantizer",
        default="gaussian",
        choices=QUANTIZERS,
        help="which kind the bits and ranges are tried with; lloyd is fitted",
    )
    parser.add_argument("--tolerance", type=float, default=0.1, help="PSNR that the suggested quantizer may cost, dB")
    parser.add_argument(
        "--per_channel",
        action="store_true",
        help="suggest shift and scale per channel (mean, 1/std) instead of one scale",
    )
    parser.add_argument(
        "--output_dir", default="vae_stats", help="where description.json, stats.json, vae_stats.png go"
    )
    parser.add_argument("--install", action="store_true", help="write the description beside --vae_path too")
    parser.add_argument("--on_bad_image", default="error", choices=BAD_IMAGE_CHOICES)
    add_process_flags(parser, seed=0)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused without reading a file."""
    from models.quantizer import MAX_BITS

    at_least(args, img_size=1, num_images=2, decoded_images=1, batch_size=1, tolerance=0, seed=0)
    if not all(1 <= b <= MAX_BITS for b in args.bits):
        raise ValueError(f"--bits must be from 1 to {MAX_BITS}, got {args.bits}")
    if not all(math.isfinite(r) and r > 0 for r in args.range):
        raise ValueError(f"--range must be finite and greater than 0, got {args.range}")
    args.bits, args.range = sorted(set(args.bits)), sorted(set(args.range))


# ------------------------------------------------------------------------------------------------------------- measuring


def batches(args: argparse.Namespace, folder: ImageFolderDataset, count: int, device: torch.device) -> Iterator[Tensor]:
    """Images (B, 3, S, S), evenly spread over the folder's order."""
    count = min(count, len(folder))
    chosen = Subset(folder, [i * len(folder) // count for i in range(count)])
    for images, _ in DataLoader(chosen, args.batch_size, num_workers=args.num_workers):
        yield images.to(device)


@torch.no_grad()
def encode(
    vae: "AutoencoderKL", args: argparse.Namespace, folder: ImageFolderDataset, device: torch.device
) -> tuple[Tensor, Tensor]:
    """One posterior sample (N, C, h, w) of each image and its moments (N, 2C, h, w), raw, on the CPU."""
    generator, samples, moments = torch.Generator(device).manual_seed(args.seed), [], []
    for images in batches(args, folder, args.num_images, device):
        posterior = vae.encode(images)
        samples.append(posterior.sample(generator).float().cpu())
        moments.append(posterior.parameters.float().cpu())
    latents = torch.cat(samples)
    if not torch.isfinite(latents).all():
        raise ValueError(f"{args.vae_path} (--vae_path): its latents are NaN or infinite")
    return latents, torch.cat(moments)


def suggest_scale(latents: Tensor, per_channel: bool) -> tuple[float | list[float], float | list[float]]:
    """scale_factor and shift that bring raw latents to unit variance: one factor and no shift (SPEC 2), or mean and 1/std of each channel."""
    if not per_channel:
        return latent_scale(latents), 0.0
    mean, std = channel_moments(latents)
    return (1 / std.clamp_min(1e-12)).tolist(), mean.tolist()


@torch.no_grad()
def decoded_psnr(
    vae: "AutoencoderKL", images: Sequence[Tensor], latents: Tensor, change: Callable[[Tensor], Tensor]
) -> float:
    """Mean PSNR (dB, uint8) of images against their raw latents (N, C, h, w) decoded after `change` of the scaled ones."""
    values, first = [], 0
    for batch in images:
        part = latents[first : first + len(batch)].to(batch.device)
        values.append(psnr(to_uint8(vae.decode(vae.unscale(change(vae.scale(part))))), to_uint8(batch)).cpu())
        first += len(batch)
    return float(torch.cat(values).mean())


def measure(
    vae: "AutoencoderKL", args: argparse.Namespace, folder: ImageFolderDataset, device: torch.device
) -> tuple[dict, "VaeDescription", "TableQuantizer"]:
    """All figures, the description that they suggest, and the suggested quantizer; sets the VAE's scale to the suggested one."""
    from models.latent_space import VaeDescription
    from models.quantizer import build_quantizer

    latents, moments = encode(vae, args, folder, device)
    mean, std = channel_moments(latents)
    scale, shift = suggest_scale(latents, args.per_channel)
    order = frequency_order(latents)
    vae.set_description(VaeDescription(vae.embed_dim, vae.stride, scale, shift, order))
    scaled = vae.scale(latents)

    def build(bits: int, half: float) -> "TableQuantizer":
        return build_quantizer(
            args.quantizer, bits, -half, half, latents=scaled.numpy() if args.quantizer == "lloyd" else None
        )

    points = rate_distortion(scaled, build, args.bits, args.range)
    count = min(args.decoded_images, len(latents))
    images, shown = [], [i * len(latents) // count for i in range(count)]
    numbers = [i * len(folder) // len(latents) for i in shown]  # the folder's numbers of the decoded images
    for part in range(0, count, args.batch_size):
        images.append(torch.stack([folder[n][0] for n in numbers[part : part + args.batch_size]]).to(device))
    alone, best = decoded_psnr(vae, images, latents[shown], lambda x: x), best_ranges(points)
    for point in best:
        point["psnr"] = decoded_psnr(vae, images, latents[shown], build(point["bits"], point["range"]).to(device))
    good = [point for point in best if point["psnr"] >= alone - args.tolerance]
    chosen = good[0] if good else max(best, key=lambda p: p["psnr"])
    if not good:
        logger.warning(
            "no number of bits (--bits) is within %g dB of the VAE alone (--tolerance): the best is suggested",
            args.tolerance,
        )
    found = {
        "images": len(latents),
        "img_size": args.img_size,
        "quantizer": args.quantizer,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "excess_kurtosis": normal_distance(latents).tolist(),
        "low_frequency_share": low_frequency_share(latents).tolist(),
        "channel_order": order,
        "psnr_vae_alone": alone,
        "points": points,
        "best": best,
        "suggested": chosen,
        "stored_moments": stored_moments(vae, moments, images, build(chosen["bits"], chosen["range"]), shown),
    }
    description = VaeDescription(
        vae.embed_dim, vae.stride, scale, shift, order, chosen["bits"], -chosen["range"], chosen["range"]
    )
    return found, description, build(chosen["bits"], chosen["range"])


def stored_moments(
    vae: "AutoencoderKL", moments: Tensor, images: Sequence[Tensor], quantizer: "TableQuantizer", shown: Sequence[int]
) -> dict:
    """What half-precision caches cost: for each dtype the moments' largest error, the share of the means' indices that change, decoded PSNR."""
    device = images[0].device
    mean, figures = moments[shown].chunk(2, 1)[0], {}
    full = quantizer.quantize(vae.scale(moments.chunk(2, 1)[0]))
    figures["float32"] = {
        "largest_error": 0.0,
        "indices_changed": 0.0,
        "psnr": decoded_psnr(vae, images, mean, quantizer.to(device)),
    }
    for name, dtype in STORED.items():
        kept = moments.to(dtype).float()
        changed = (quantizer.cpu().quantize(vae.scale(kept.chunk(2, 1)[0])) != full).double().mean()
        figures[name] = {
            "largest_error": float((kept - moments).abs().max()),
            "indices_changed": float(changed),
            "psnr": decoded_psnr(vae, images, kept[shown].chunk(2, 1)[0], quantizer.to(device)),
        }
    return figures


# ------------------------------------------------------------------------------------------------------------- output


def plot(found: dict, path: Path) -> None:
    """Four panels: mean and spread by channel, share of low frequencies in the suggested order, error by bits and range, PSNR by bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    channels = np.arange(len(found["mean"]))
    axes[0, 0].errorbar(channels, found["mean"], yerr=found["std"], fmt="o", capsize=3)
    axes[0, 0].set_xticks(channels, [str(c) for c in channels], fontsize=7)
    axes[0, 0].set(title="raw latents: mean and standard deviation", xlabel="channel")
    order = found["channel_order"]
    axes[0, 1].bar(channels, [found["low_frequency_share"][c] for c in order])
    axes[0, 1].set(title="share of low frequencies, channels in the suggested order", xlabel="channel", ylim=(0, 1))
    axes[0, 1].set_xticks(channels, [str(c) for c in order], fontsize=7)
    for bits in dict.fromkeys(p["bits"] for p in found["points"]):
        line = [p for p in found["points"] if p["bits"] == bits]
        axes[1, 0].plot([p["range"] for p in line], [p["mse"] for p in line], marker=".", label=f"{bits} bits")
    axes[1, 0].set(
        title=f"{found['quantizer']} quantizer: mean square error of scaled latents", xlabel="half range", yscale="log"
    )
    axes[1, 0].legend()
    best, chosen = found["best"], found["suggested"]
    axes[1, 1].plot([p["rate"] for p in best], [p["psnr"] for p in best], marker="o", label="best range of each")
    axes[1, 1].axhline(found["psnr_vae_alone"], color="gray", linestyle=":", label="VAE alone")
    axes[1, 1].plot(
        chosen["rate"],
        chosen["psnr"],
        "s",
        color="crimson",
        label=f"suggested: {chosen['bits']} bits, ±{chosen['range']:g}",
    )
    axes[1, 1].set(title="decoded images", xlabel="entropy of the indices, bits per scalar", ylabel="PSNR, dB")
    axes[1, 1].legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def report(found: dict, description: "VaeDescription") -> str:
    """The figures as text."""
    lines = [f"{'channel':>8}{'mean':>10}{'std':>10}{'kurtosis':>10}{'low freq.':>10}"]
    rows = zip(found["mean"], found["std"], found["excess_kurtosis"], found["low_frequency_share"], strict=True)
    lines += [
        f"{c:>8}{mean:>10.4f}{std:>10.4f}{tails:>10.2f}{low:>10.3f}" for c, (mean, std, tails, low) in enumerate(rows)
    ]
    lines += ["", f"{'bits':>8}{'range':>10}{'MSE':>12}{'entropy':>10}{'clamped':>10}{'PSNR':>10}"]
    lines += [
        f"{p['bits']:>8}{p['range']:>10g}{p['mse']:>12.3g}{p['rate']:>10.3f}{p['clamped']:>10.2%}{p['psnr']:>10.3f}"
        for p in found["best"]
    ]
    lines += [f"{'VAE alone':>10}{'':>40}{found['psnr_vae_alone']:>10.3f}", ""]
    lines += [f"{'moments stored as':>18}{'largest error':>16}{'indices changed':>18}{'PSNR':>10}"]
    lines += [
        f"{name:>18}{f['largest_error']:>16.3g}{f['indices_changed']:>18.3%}{f['psnr']:>10.3f}"
        for name, f in found["stored_moments"].items()
    ]
    return "\n".join(
        [*lines, "", "suggested: " + json.dumps({key: value for key, value in asdict(description).items()})]
    )


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Measure and write. Raises ValueError or OSError for bad input."""
    from models.latent_space import description_path
    from models.vae import load_vae

    args.vae_path = download.local_path(args.vae_path, "--vae_path")
    vae = load_vae(args.vae_path)
    if args.img_size % vae.stride:
        raise ValueError(
            f"--img_size {args.img_size} is not a multiple of the stride {vae.stride} of {args.vae_path} (--vae_path)"
        )
    folder = ImageFolderDataset(Path(args.data_path) / "train", args.img_size, False, args.on_bad_image)
    if len(folder) < 2:
        raise ValueError(f"{args.data_path} (--data_path) holds {len(folder)} image; at least two are needed")
    output = check_writable(args.output_dir, "--output_dir")
    found, description, quantizer = measure(vae.to(device), args, folder, device)
    print(report(found, description))
    write_json(output / "stats.json", found)
    write_json(output / "description.json", asdict(description))
    write_json(output / "quantizer.json", quantizer.cpu().description())
    plot(found, output / "vae_stats.png")
    logger.info("wrote stats.json, description.json, quantizer.json and vae_stats.png to %s", output)
    if args.install:
        write_json(description_path(args.vae_path), asdict(description))
        logger.info(
            "wrote %s: every script takes scale, order, bits and range from it", description_path(args.vae_path)
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, measure. Raises ValueError or OSError for bad input."""
    args, _ = parse(build_parser(), argv)
    check_arguments(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("dataset.latent_statistics runs as one process; start it without torchrun")
    run(args, dist.init(args.device, args.dist_url))


if __name__ == "__main__":
    sys.exit(run_cli(main))
