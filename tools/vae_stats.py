"""What a VAE's latents look like, and what TokenBridge should use for them: scale, channel order, bits and range.

  python -m tools.vae_stats --vae_path VAE --data_path DIR --img_size 256 --output_dir OUT     measure, suggest, plot
  python -m tools.vae_stats ... --install            write it beside the VAE's weights, where all scripts find it
  python -m tools.vae_stats ... --quantizer lloyd    also fit the levels: OUT/quantizer.json (for --quantizer_tables)

Images are DIR/train/<class>/<image>. Writes OUT/description.json (models/latent_space.py), OUT/stats.json with all
figures, and OUT/vae_stats.png. For each number of bits the range whose quantizer has the least mean square error on the
scaled latents is chosen; of these the fewest bits that cost at most --tolerance dB of PSNR against the VAE alone.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from checkpoints import hub
from dataset import latent_statistics as statistics
from dataset.folders import spread_evenly
from dataset.image_folder import BAD_IMAGE_CHOICES, ImageFolderDataset, readable_images
from dataset.images import to_uint8
from evaluation.image_metrics import psnr
from models.latent_space import VaeDescription, description_path
from models.quantizer import MAX_BITS, TableQuantizer
from models.quantizer_tables import QUANTIZERS, build_quantizer
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from util import dist
from util.cli import add_process_flags, check_writable, make_parser, parse, run_cli
from util.files import record_own, refuse_existing, refuse_others, replacing, write_json
from util.launcher import launched
from util.log import doing, get_logger
from util.options import ArgumentError, add_options, check_options, flag_names, option, read_options

logger = get_logger()

FILES = ("stats.json", "description.json", "quantizer.json", "vae_stats.png")
RANGES = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0)
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StatsOptions:
    """What is measured. ArgumentError for values that are out of range."""

    vae_path: str = option("pretrained_models/vae/kl16.ckpt", "VAE checkpoint, or a folder of diffusers")
    data_path: str = option("./data/imagenet", "folder with train/<class>/<image>")
    img_size: int = option(256, "side of the images, pixels", lowest=1, highest=2**14)
    num_images: int = option(2048, "encode at most so many images, spread evenly over the classes", lowest=2)
    decoded_images: int = option(64, "of these so many are decoded for the PSNR", lowest=1)
    batch_size: int = option(16, lowest=1)
    bits: tuple[int, ...] = option((3, 4, 5, 6, 7, 8), "bits to try", nargs="+", lowest=1, highest=MAX_BITS)
    range: tuple[float, ...] = option(RANGES, "half ranges to try", nargs="+", above=0, highest=1e4)
    quantizer: str = option("gaussian", "kind that is tried; lloyd is fitted to the latents", choices=QUANTIZERS)
    tolerance: float = option(0.1, "PSNR that the suggested quantizer may cost, dB", lowest=0)
    per_channel: bool = option(False, "suggest shift and scale per channel (mean, 1/std) instead of one scale")
    output_dir: str = option("vae_stats", "where description.json, stats.json, vae_stats.png go")
    install: bool = option(False, "write the description beside --vae_path too")
    on_bad_image: str = option("error", choices=BAD_IMAGE_CHOICES)
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = make_parser(__doc__)
    add_options(parser, StatsOptions)
    add_process_flags(parser, seed=0)
    return parser


@torch.no_grad()
def encode(
    vae: AutoencoderKL, batches: Iterable[tuple[Tensor, list[int]]], device: torch.device, seed: int
) -> tuple[Tensor, Tensor, list[int]]:
    """One posterior sample (N, C, h, w) of each image, its moments (N, 2C, h, w), raw, on the CPU, and its number."""
    generator, samples, moments, numbers = torch.Generator(device).manual_seed(seed), [], [], []
    for images, found in batches:
        numbers += found
        posterior = vae.encode(images.to(device))
        samples.append(posterior.sample(generator).float().cpu())
        moments.append(posterior.parameters.float().cpu())
    latents = torch.cat(samples)
    if not torch.isfinite(latents).all():
        raise ArgumentError("vae_path", "the latents of the VAE are NaN or infinite")
    return latents, torch.cat(moments), numbers


@torch.no_grad()
def decoded_psnr(vae: AutoencoderKL, images: Sequence[Tensor], latents: Tensor, quantizer: nn.Module) -> float:
    """Mean PSNR (dB, uint8) of batches of images against their raw latents (N, C, h, w), quantized and decoded."""
    values = []
    for batch, part in zip(images, latents.split([len(batch) for batch in images]), strict=True):
        quantized = quantizer.to(batch.device)(vae.scale(part.to(batch.device)))
        values.append(psnr(to_uint8(vae.decode(vae.unscale(quantized))), to_uint8(batch)).cpu())
    return float(torch.cat(values).mean())


def measure(
    vae: AutoencoderKL, options: StatsOptions, folder: ImageFolderDataset, device: torch.device, num_workers: int = 0
) -> tuple[dict, VaeDescription, TableQuantizer]:
    """All figures, the suggested description and the suggested quantizer; sets the VAE's scale to the suggested one."""
    chosen = spread_evenly(range(len(folder)), options.num_images)
    batches = readable_images(folder, chosen, options.batch_size, num_workers)
    latents, moments, encoded = encode(vae, batches, device, options.seed)
    if len(latents) < 2:
        raise ArgumentError("data_path", f"{options.data_path}: at least two readable images are needed")
    scale, shift = statistics.suggest_scale(latents, options.per_channel)
    order = statistics.frequency_order(latents)
    vae.set_description(VaeDescription(vae.embed_dim, vae.stride, scale, shift, order))
    scaled = vae.scale(latents)
    fitted_to = scaled.numpy() if options.quantizer == "lloyd" else None

    def build(bits: int, half: float) -> TableQuantizer:
        return build_quantizer(options.quantizer, bits, -half, half, latents=fitted_to)

    points = statistics.rate_distortion(scaled, build, options.bits, options.range)
    shown = spread_evenly(range(len(latents)), options.decoded_images)  # of the encoded images
    decoded = readable_images(folder, [encoded[i] for i in shown], options.batch_size)
    images = [batch.to(device) for batch, _ in decoded]
    alone, best = decoded_psnr(vae, images, latents[shown], nn.Identity()), statistics.best_ranges(points)
    for point in best:
        point["psnr"] = decoded_psnr(vae, images, latents[shown], build(point["bits"], point["range"]))
    best_point, good = statistics.suggest_point(best, alone, options.tolerance)
    if not good:
        logger.warning(
            "no --bits is within --tolerance (%g dB) of the VAE alone: the best is suggested", options.tolerance
        )
    half, quantizer = best_point["range"], build(best_point["bits"], best_point["range"])
    found = {"images": len(latents), "img_size": options.img_size, "quantizer": options.quantizer}
    found |= statistics.channel_figures(latents) | {"channel_order": order}
    found |= {"psnr_vae_alone": alone, "points": points, "best": best, "suggested": best_point}
    found["stored_moments"] = stored_moments(vae, moments, images, quantizer, shown)
    description = VaeDescription(vae.embed_dim, vae.stride, scale, shift, order, best_point["bits"], -half, half)
    return found, description, quantizer


def stored_moments(
    vae: AutoencoderKL, moments: Tensor, images: Sequence[Tensor], quantizer: TableQuantizer, shown: Sequence[int]
) -> dict:
    """The cost of each dtype of cached moments: largest error, share of indices of the means that change, PSNR."""
    full, figures = quantizer.cpu().quantize(vae.scale(moments.chunk(2, 1)[0])), {}
    for name, dtype in STORED.items():
        kept = moments.to(dtype).float()
        mean = kept.chunk(2, 1)[0]
        changed = (quantizer.cpu().quantize(vae.scale(mean)) != full).double().mean()
        figures[name] = {"largest_error": float((kept - moments).abs().max()), "indices_changed": float(changed)}
        figures[name]["psnr"] = decoded_psnr(vae, images, mean[shown], quantizer)
    return figures


def plot(found: dict, path: Path) -> None:
    """Four panels: mean and std by channel, low-frequency share in the suggested order, error by range, PSNR."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # after the backend is chosen

    figure, ((moments, shares), (errors, quality)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    order, best, chosen = found["channel_order"], found["best"], found["suggested"]
    channels = range(len(order))
    moments.errorbar(channels, found["mean"], yerr=found["std"], fmt="o", capsize=3)
    moments.set_xticks(channels, [str(c) for c in channels], fontsize=7)
    moments.set(title="raw latents: mean and standard deviation", xlabel="channel")
    shares.bar(channels, [found["low_frequency_share"][c] for c in order])
    shares.set(title="share of low frequencies, channels in the suggested order", xlabel="channel", ylim=(0, 1))
    shares.set_xticks(channels, [str(c) for c in order], fontsize=7)
    for bits in dict.fromkeys(p["bits"] for p in found["points"]):
        line = [p for p in found["points"] if p["bits"] == bits]
        errors.plot([p["range"] for p in line], [p["mse"] for p in line], marker=".", label=f"{bits} bits")
    title = f"{found['quantizer']} quantizer: mean square error of scaled latents"
    errors.set(title=title, xlabel="half range", yscale="log")
    quality.plot([p["rate"] for p in best], [p["psnr"] for p in best], marker="o", label="best range of each")
    quality.axhline(found["psnr_vae_alone"], color="gray", linestyle=":", label="VAE alone")
    label = f"suggested: {chosen['bits']} bits, ±{chosen['range']:g}"
    quality.plot(chosen["rate"], chosen["psnr"], "s", color="crimson", label=label)
    quality.set(title="decoded images", xlabel="entropy of the indices, bits per scalar", ylabel="PSNR, dB")
    errors.legend(), quality.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def report(found: dict, description: VaeDescription) -> str:
    """The figures as text."""
    lines = [f"{'channel':>8}{'mean':>10}{'std':>10}{'kurtosis':>10}{'low freq.':>10}"]
    rows = zip(*(found[key] for key in ("mean", "std", "excess_kurtosis", "low_frequency_share")), strict=True)
    for channel, (mean, std, kurtosis, low) in enumerate(rows):
        lines.append(f"{channel:>8}{mean:>10.4f}{std:>10.4f}{kurtosis:>10.2f}{low:>10.3f}")
    lines += ["", f"{'bits':>8}{'range':>10}{'MSE':>12}{'entropy':>10}{'clamped':>10}{'PSNR':>10}"]
    row = "{bits:>8}{range:>10g}{mse:>12.3g}{rate:>10.3f}{clamped:>10.2%}{psnr:>10.3f}"
    lines += [row.format(**point) for point in found["best"]]
    lines += [f"{'VAE alone':>10}{'':>40}{found['psnr_vae_alone']:>10.3f}", ""]
    lines += [f"{'moments stored as':>18}{'largest error':>16}{'indices changed':>18}{'PSNR':>10}"]
    row = "{name:>18}{largest_error:>16.3g}{indices_changed:>18.3%}{psnr:>10.3f}"
    lines += [row.format(name=name, **figures) for name, figures in found["stored_moments"].items()]
    return "\n".join([*lines, "", f"suggested: {json.dumps(asdict(description))}"])


@doing("measuring the latents")
def run(options: StatsOptions, device: torch.device, num_workers: int = 0) -> None:
    """Measure and write. Raises ValueError or OSError for bad input."""
    vae_path, size = hub.local_path(options.vae_path, "--vae_path"), options.img_size
    installed = description_path(vae_path)
    if options.install:
        refuse_existing(installed, "--install", "it may be hand-made; move it away first, or leave --install out")
    vae = load_vae(vae_path)
    if size % vae.stride:
        why = f"is not a multiple of the stride {vae.stride} of {vae_path} (--vae_path)"
        raise ArgumentError("img_size", f"img_size {size} {why}")
    folder = ImageFolderDataset(Path(options.data_path) / "train", size, False, options.on_bad_image)
    if len(folder) < 2:
        raise ValueError(f"{options.data_path} (--data_path) holds {len(folder)} image; at least two are needed")
    output = check_writable(options.output_dir, "--output_dir")
    written, record = [output / name for name in FILES], output / ".vae_stats.json"
    refuse_others(written, record, "--output_dir")
    found, description, quantizer = measure(vae.to(device), options, folder, device, num_workers)
    print(report(found, description))
    files = {"stats.json": found, "description.json": asdict(description)}
    for name, content in (files | {"quantizer.json": quantizer.cpu().description()}).items():
        write_json(output / name, content)
    plot(found, output / "vae_stats.png")
    record_own(written, record)
    logger.info("wrote stats.json, description.json, quantizer.json and vae_stats.png to %s", output)
    if options.install:
        write_json(installed, asdict(description))
        logger.info("wrote %s: every script takes scale, order, bits and range from it", installed)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, measure. Raises ValueError or OSError for bad input."""
    parser = build_parser()
    args, _ = parse(parser, argv)
    with flag_names(parser, quant_min="range"):
        args.bits, args.range = sorted(set(args.bits)), sorted(set(args.range))
        options = read_options(StatsOptions, args, seed=args.seed)
        if launched("WORLD_SIZE") > 1:
            raise ValueError("tools.vae_stats runs as one process; start it without torchrun")
        run(options, dist.init(args.device, args.dist_url), args.num_workers)


if __name__ == "__main__":
    sys.exit(run_cli(main))
