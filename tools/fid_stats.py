"""Make a reference for --fid_stats from images: Inception statistics, and features for precision, recall and KID.

  python -m tools.fid_stats --data_path DIR/train --img_size 64 --out fid_stats/mine_64.npz
  torchrun --nproc_per_node=8 -m tools.fid_stats --data_path images.npz --img_size 256 --crop none \\
      --out fid_stats/mine_256.npz

--data_path is a folder with images below it, or an .npz of images (arr_0, uint8 (N, S, S, 3)).
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.image_source import CROPS, open_images
from evaluation.inception import InceptionFeatures
from evaluation.reference import KEEP_FEATURES, make_reference, save_reference
from util import dist
from util.cli import add_process_flags, check_writable, make_parser, parse, run_cli
from util.files import file_sha256, refuse_existing
from util.log import doing, get_logger
from util.options import ArgumentError, add_options, check_options, flag_names, option, read_options

logger = get_logger()


@dataclass(frozen=True)
class FidStatsOptions:
    """What the statistics are of."""

    img_size: int | None = option(None, "side of the images; default: that of the first image", lowest=1, highest=2**14)
    crop: str = option("adm", "adm: resize and crop as training does; none: images have the size", choices=CROPS)
    num_images: int | None = option(None, "only so many images, evenly spaced in the list sorted by class", lowest=2)
    keep_features: int = option(
        KEEP_FEATURES, "features of so many images for precision, recall and KID (8 KiB each)", lowest=0
    )
    batch_size: int = option(64, "images per process at a time", lowest=1)
    inception_weights: str | None = option(None, "torch-fidelity's Inception weights; default: its download")

    def __post_init__(self) -> None:
        check_options(self)


def build_parser() -> argparse.ArgumentParser:
    """The flags of python -m tools.fid_stats."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", required=True, help="folder with images below it, or an npz with arr_0")
    parser.add_argument("--out", required=True, help="the .npz to write")
    add_options(parser, FidStatsOptions)
    add_process_flags(parser, seed=0)
    return parser


def check_paths(args: argparse.Namespace) -> None:
    """ArgumentError for a source or a target that is refused before anything is loaded."""
    if not args.out.endswith(".npz"):
        raise ArgumentError("out", f"{args.out} must end with .npz")
    refuse_existing(args.out, "--out")
    if not Path(args.data_path).exists():
        raise ArgumentError("data_path", f"no {args.data_path}")
    if Path(args.data_path).is_file() and not zipfile.is_zipfile(args.data_path):
        raise ArgumentError("data_path", f"{args.data_path} is neither a folder nor an npz of images")


@flag_names(build_parser())
@doing("computing the statistics")
def main(argv: Sequence[str] | None = None) -> None:
    """Make a file of statistics. ValueError or OSError for bad input."""
    args, _ = parse(build_parser(), argv)
    options = read_options(FidStatsOptions, args)
    check_paths(args)
    try:
        device = dist.init(args.device, args.dist_url)
        check_writable(Path(args.out).parent, "--out")
        opening = dict(img_size=options.img_size, crop=options.crop, num_images=options.num_images)
        images = open_images(args.data_path, **opening)  # before the Inception weights are asked for
        reference = make_reference(
            images,
            InceptionFeatures(options.inception_weights, device),
            keep_features=options.keep_features,
            batch_size=options.batch_size,
            num_workers=args.num_workers,
        )
        if dist.is_main():
            save_reference(args.out, reference)
            count, size = reference.num_images, reference.img_size
            logger.info("wrote %s: %d images of %d px, sha256 %s", args.out, count, size, file_sha256(args.out))
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
