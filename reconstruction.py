"""What the quantizer costs: images through VAE and quantizer; PSNR, SSIM, rate and, with weights, rFID, IS and LPIPS.

  one setting   python reconstruction.py --bits 6 --range 5.0 --image_dir DIR          (if DIR holds train/: DIR/train)
  a sweep       python reconstruction.py --bits 3 4 5 6 --range 2 3 4 5 --image_dir DIR          (all pairs)
  many GPUs     torchrun --nproc_per_node=8 reconstruction.py --bits 6 --range 5.0 --image_dir DIR

DIR holds <class>/<image>, training or validation images alike; the first --images_per_class images of each class are
used, or all, ADM-cropped.

FID is computed against two references. "FID" is against --fid_stats, at 256 px by default ADM's ImageNet statistics,
beside the published 1.11: that of 50 training images of each class, whose pixels the published script truncates, as
--pixels does here by default where published figures stand beside. "rFID" is against the images' own originals, beside
the published 0.53 of the VAE alone on the validation images.

Each image is encoded once; every pair and "VAE alone" decode the same latents. Prints a table and writes to OUT:
results.json, results.csv, rate_distortion.png, grid.png and worst_median.png (the images that the first pair, the first
of --bits with the first of --range, harms most, and those in the middle). The columns of both grids are original | VAE
alone | quantized with the first pair.

The rate is given twice: "bits/image" as stored (bits x dimensions x tokens), and the entropy of the indices, each
dimension coded by itself.
"""

import util.start  # noqa: F401  (first: see there)

# isort: split

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from checkpoints import download, hub
from dataset.folders import spread_evenly
from dataset.image_folder import ImageFolderDataset
from dataset.images import save_grid
from evaluation import reconstruction_report as report
from evaluation.reconstruction import (
    Codec,
    Outcome,
    Variant,
    decode_variants,
    first_of_each_class,
    gathered,
    latents_to_fit,
    reconstruct,
    several,
    summarise,
)
from evaluation.reconstruction_options import Measures, ReconstructionOptions
from generation.sample import claim_folder
from models.vae_loading import load_vae
from util import dist
from util.cli import add_process_flags, check_writable, make_parser, parse, run_cli
from util.files import write_json
from util.log import doing, get_logger
from util.options import ArgumentError, add_options, flag_names, read_options

logger = get_logger()
FEW_IMAGES = 10_000  # with fewer, FID's bias is larger than the differences between the rows


def build_parser() -> argparse.ArgumentParser:
    """The published flags with their meaning and defaults (docs/spec.md 10), and ours."""
    parser = make_parser(__doc__)
    add_options(parser, ReconstructionOptions)
    add_process_flags(parser, seed=0)
    return parser


def read_arguments(args: argparse.Namespace) -> ReconstructionOptions:
    """The options, checked, with their defaults filled in."""
    more = {name: getattr(args, name) for name in ("seed", "num_workers", "pin_mem")}
    return read_options(ReconstructionOptions, args, **more).resolved()


def load_inputs(options: ReconstructionOptions, device: torch.device) -> Codec:
    """The VAE and the folder of images. ValueError or OSError for what does not fit."""
    download.provide(options.vae_path, "--vae_path", options.no_download)
    vae = load_vae(options.vae_path, options.vae_embed_dim).to(device)
    if options.img_size % vae.stride:
        stride = f"{vae.stride}, the stride of {options.vae_path}"
        raise ArgumentError("img_size", f"img_size {options.img_size} is not a multiple of {stride}")
    reading = dict(flip=False, on_bad_image=options.on_bad_image, argument="image_dir")
    return Codec(vae, ImageFolderDataset(options.image_dir, options.img_size, **reading), options, device)


def log_start(codec: Codec, num_images: int, measures: Measures) -> None:
    """The run's settings, and what is not computed."""
    options, vae = codec.options, codec.vae
    logger.info(
        "%d images of %d classes from %s, %d px; VAE %s, scale %s; %s; %s; pixels: %s",
        *(num_images, len(codec.folder.classes), options.image_dir, options.img_size, options.vae_path),
        *(vae.scale_factor, "posterior mean" if options.mode else "posterior samples", options.precision),
        options.pixels,
    )
    if not dist.is_main():
        return
    missing = measures.missing
    if "rfid" in missing:
        logger.warning("rFID and Inception Score are not computed: %s", missing["rfid"])
    elif "fid" in missing and options.fid_stats:
        logger.warning("the FID against %s is not computed: %s", options.fid_stats, missing["fid"])
    if "lpips" in missing:
        logger.info("LPIPS is not computed: %s", missing["lpips"])


def run_record(codec: Codec, settings: dict, measures: Measures) -> dict:
    """What results.json says of the run besides images and figures."""
    options, vae = codec.options, codec.vae
    about_vae = {name: getattr(vae, name) for name in ("scale_factor", "shift", "stride")}
    return {
        "settings": settings,
        "world_size": dist.world_size(),
        "vae": {"path": str(options.vae_path)} | about_vae | {"fingerprint": vae.latent_fingerprint()},
        "fid_stats": options.fid_stats,
        "pixels": options.pixels,
        "published_is_about": report.PUBLISHED_IS_ABOUT if options.beside_published else None,
        "inception_sha256": None if measures.extractor is None else measures.extractor.sha256,
    } | {f"{name}_not_computed": measures.missing.get(name) for name in ("rfid", "fid", "lpips")}


def closing_lines(options: ReconstructionOptions, measures: Measures, num_images: int) -> list[str]:
    """What the table's FIDs are about, or why they are missing."""
    missing = measures.missing
    if "rfid" in missing:
        return [f"rFID, IS: not computed ({missing['rfid']})"]
    few = f"; fewer than {FEW_IMAGES}, so too high: compare rows with each other, not with published numbers"
    lines = [f"rFID over {num_images} images{few if num_images < FEW_IMAGES else ''}"]
    if options.fid_stats:
        state = f": not computed ({missing['fid']})" if "fid" in missing else f", pixels: {options.pixels}"
        lines.append(f"FID against {options.fid_stats}{state}")
    return lines


def all_numbers(own: Sequence[int]) -> list[int]:
    """The image numbers of all processes, sorted."""
    return sorted(number for part in dist.gather_objects(own) for number in part)


@doing("measuring reconstructions")
def run(options: ReconstructionOptions, settings: dict, device: torch.device) -> None:
    """Check and load everything, reconstruct, write and print (rank 0). ValueError or OSError for bad input."""
    codec = load_inputs(options, device)
    chosen = first_of_each_class(codec.folder.labels, options.images_per_class, options.num_images)
    measures = Measures.load(options, device)
    output = check_writable(options.output_dir, "--output_dir")
    if options.save_images:
        claim_folder(output, settings, "images.json", re.compile("images"))
    fit = "lloyd" in several(options.quantizer)
    variants = decode_variants(options, device, latents_to_fit(codec, chosen) if fit else None)
    log_start(codec, len(chosen), measures)
    out, error = Outcome(), None
    try:
        out = reconstruct(codec, variants, chosen, measures)
    except (ValueError, OSError) as caught:
        error = caught
    dist.agree(error)
    done, bad = all_numbers(out.done), all_numbers(out.bad)
    if not done:
        raise ArgumentError("image_dir", f"{options.image_dir}: not one of the {len(bad)} chosen images can be read")
    if measures.extractor is not None and len(done) < 2:
        measures.missing |= dict.fromkeys(("rfid", "fid"), f"it needs at least two images, there is {len(done)}")
    originals = None if "rfid" in measures.missing else out.originals.merge().pool.as_dict()
    rows = [summarise(variant, codec, len(done), originals, measures.reference) for variant in variants]
    first_scores = gathered(variants[1].scores)
    if not dist.is_main():
        return
    images = {"num_images": len(done), "num_classes": len({codec.folder.labels[n] for n in done})}
    images |= {"bad_images": [codec.folder.samples[n][0] for n in bad], "device": str(device)}
    write_json(output / "results.json", run_record(codec, settings, measures) | images | {"rows": rows})
    report.write_reconstruction_csv(output / "results.csv", rows, options.pixels)
    report.draw_rate_distortion(output / "rate_distortion.png", rows)
    write_grids(codec, variants[1], {number: scores[0] for number, scores in first_scores.items()}, output)
    if bad:
        logger.warning("%d of %d chosen images could not be read and were left out", len(bad), len(chosen))
    print("\n".join([report.reconstruction_table(rows), *closing_lines(options, measures, len(done))]))


def write_grids(codec: Codec, first: Variant, psnr_of: dict[int, float], output: Path) -> None:
    """grid.png and worst_median.png: original | VAE alone | first pair. psnr_of: that pair's, by image number."""
    count = codec.options.grid_images
    worst, median = report.worst_and_median(psnr_of, count // 2)
    for name, numbers in (("grid.png", spread_evenly(list(psnr_of), count)), ("worst_median.png", worst + median)):
        if numbers:
            save_grid(output / name, codec.pictures(first.quantizer, numbers), columns=3)
    columns = f"original | VAE alone | {first.name}"
    logger.info("wrote %s and, with columns %s, %s", output / "results.json", columns, output / "grid.png")


@flag_names(build_parser(), quant_min="range")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run. Raises ValueError or OSError for bad input."""
    args, _ = parse(build_parser(), argv)
    options = read_arguments(args)
    try:
        device = dist.init(args.device, args.dist_url)
        options = replace(options, vae_path=hub.local_path(options.vae_path, "--vae_path"))
        chosen = {name: value for name, value in asdict(options).items() if name != "fid_stats_given"}
        run(options, vars(args) | chosen, device)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
