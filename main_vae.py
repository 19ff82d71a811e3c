"""Train a KL autoencoder for your own images; its file is what --vae_path of the other scripts takes.

  python main_vae.py --data_path DIR --img_size 256 --output_dir OUT --resume OUT
  torchrun --nproc_per_node=8 main_vae.py --data_path DIR --img_size 256 --output_dir OUT --resume OUT

DIR/train/<class>/<image> are the images. OUT/vae.pth, written at the end, holds the weights, the VAE's config (shape,
measured scale of its latents, frequency order of its channels) and, if DIR/val exists, the PSNR of reconstructions.
OUT/vae_state.pth is for --resume. The loss is mean |x - x'| + kl_weight * KL + perceptual_weight * edges
(training/vae.py).
"""

import util.start  # noqa: F401  (first: see there)

# isort: split

import argparse
import sys
from collections.abc import Sequence

from evaluation.image_metrics import psnr
from training.vae import VaeSettings
from training.vae_run import build_vae, read_state, train
from util import dist
from util.cli import add_process_flags, make_parser, own_folder, parse, run_cli
from util.heap import keep_freed_memory
from util.log import doing
from util.options import add_options, flag_names, read_options


def build_parser() -> argparse.ArgumentParser:
    """All flags: those of `VaeSettings`, and of the processes."""
    parser = make_parser(__doc__)
    add_options(parser, VaeSettings, "data, VAE, training and files")
    add_process_flags(parser, seed=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, train. Raises ValueError or OSError for bad input."""
    parser = build_parser()
    with flag_names(parser):
        args, given = parse(parser, argv)
        process = {"seed": args.seed, "num_workers": args.num_workers, "pin_memory": args.pin_mem}
        settings = read_options(VaeSettings, args, **process)
        try:
            device = dist.init(args.device, args.dist_url)
            if device.type == "cpu":
                keep_freed_memory()
            with dist.on_main(own_folder(settings.output_dir, "--output_dir")), doing("training the VAE"):
                source, content = read_state(settings)
                vae, settings = build_vae(settings, given, content, source)
                train(settings, vae, content, source, device, psnr)
        finally:
            dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
