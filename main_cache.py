"""Encode a data set once, so that training (main_tokenbridge.py --use_cached --cached_path DIR) need not encode images.

  encode    torchrun --nproc_per_node=8 main_cache.py --img_size 256 --vae_path pretrained_models/vae/kl16.ckpt \\
                --vae_embed_dim 16 --batch_size 128 --data_path DIR --cached_path CACHE
  look      python main_cache.py --info --cached_path CACHE
  check     python main_cache.py --verify --cached_path CACHE   (all checksums; also caches of the published scripts)
  convert   python main_cache.py --convert OLD NEW              (a tree of .npz files, as MAR's and the published script
                                                                write, to shards)

It stores mean and log-variance of the latents of each image DIR/train/<class>/<image>, centre crop and mirrored:
--format shards in few large files (dataset/shards.py), --format npz in one file per image, CACHE/<class>/<image>.npz,
the published layout (docs/spec.md 8). CACHE/cache.json records the settings, CACHE/bad_images.txt lists images that
cannot be read. After a kill run the same command again, on any number of processes: only missing shards or files are
encoded, and the result is that of an uninterrupted run. A cache that another job writes to is refused.
"""

import util.start  # noqa: F401  (first: see there)

# isort: split

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoints import hub
from dataset.cache import fill
from dataset.classes import misleading_numbers
from dataset.encoder_inputs import Source, load_crops, load_moments
from dataset.encoder_outputs import RecordMaker, convert_moments, encode_images
from dataset.folders import list_folder
from dataset.latents import CachedLatents
from dataset.npz import VIEWS, read_stamp, same_stamp
from dataset.record import CacheOptions, describe, describe_tree, describe_vae, read_record
from dataset.verify import info, verify
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from util import dist
from util.cli import add_process_flags, make_parser, parse, run_cli
from util.log import doing, get_logger
from util.options import add_options, flag_names, read_options

logger = get_logger()

FOR_INDICES = ("quantizer", "quantizer_tables", "quant_bits", "quant_min", "quant_max")


def build_parser() -> argparse.ArgumentParser:
    """The published flags with their meanings and defaults (docs/spec.md 10; --device defaults to auto), and ours."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to do (default: encode)")
    group.add_argument("--info", action="store_true", help="print what --cached_path holds")
    what = "read all of --cached_path: checksums, images, classes; with --data_path also whether its images changed"
    group.add_argument("--verify", action="store_true", help=what)
    what = "turn a tree of .npz files into shards; with --vae_path its VAE is recorded, unless OLD records another"
    group.add_argument("--convert", nargs=2, metavar=("OLD", "NEW"), help=what)
    add_options(parser, CacheOptions, "images, VAE and cache")
    add_process_flags(parser, seed=0)
    return parser


def refuse(given: set[str], names: Sequence[str], why: str) -> None:
    """ValueError for the first of the flags that was given."""
    for name in names:
        if name in given:
            raise ValueError(f"--{name} {why}")


def check_arguments(args: argparse.Namespace, given: set[str]) -> CacheOptions:
    """The options; everything that can be refused without reading a file is refused."""
    if sum([args.info, args.verify, args.convert is not None]) > 1:
        raise ValueError("--info, --verify and --convert are different things; choose one")
    if args.convert is not None:
        refuse(given, ["cached_path"], "does not go with --convert OLD NEW, which names both folders")
        args.cached_path = args.convert[1]
        kept = "does not go with --convert, which takes the latents of OLD as they are"
        refuse(given, ("data_path", "crops", "precision"), kept)
    if not args.cached_path:
        raise ValueError("--cached_path is empty: give the folder that the latents go to")
    if args.format == "npz":
        refuse(given, ("shard_size", "convert"), "does not go with --format npz, the published layout")
    if args.mode != "indices":
        refuse(given, FOR_INDICES, "changes --mode indices only; give that too, or leave it out")
    return read_options(CacheOptions, args, seed=args.seed)


def loading(args: argparse.Namespace, device: torch.device) -> dict:
    """How images are loaded."""
    return {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda"}


def read_vae(args: argparse.Namespace, given: set[str]) -> tuple[AutoencoderKL, CacheOptions]:
    """The VAE, and the options with the quantizer's range and bits of the VAE where the flags leave them open."""
    args.vae_path = hub.local_path(args.vae_path, "--vae_path")
    vae = load_vae(args.vae_path, args.vae_embed_dim if "vae_embed_dim" in given else None)
    vars(args).update({k: v for k, v in vae.quantizer_settings().items() if k not in given})
    return vae, read_options(CacheOptions, args, seed=args.seed)


@doing("encoding the images")
def encode(args: argparse.Namespace, given: set[str], device: torch.device) -> None:
    """Images -> cache."""
    vae, options = read_vae(args, given)
    if options.img_size % vae.stride:
        stride = f"the stride {vae.stride} of {args.vae_path} (--vae_path)"
        raise ValueError(f"--img_size {options.img_size} is not a multiple of {stride}")
    if vae.deterministic and options.mode == "moments" and options.format == "shards":
        advice = "store it with --mode mean (or indices)"
        raise ValueError(f"{args.vae_path} (--vae_path) gives one latent and no posterior: {advice}")
    quantizer, spec = options.build_quantizer(), options.spec(vae.embed_dim, options.img_size // vae.stride)
    crops = functools.partial(load_crops, size=options.img_size, crops=options.crops, seed=options.seed)
    source = Source(list_folder(Path(options.data_path) / "train"), crops)
    record = describe(options, spec, source.classes, source.paths, quantizer) | describe_vae(vae, args.vae_path)
    logger.info(
        "VAE %s: %d px; %d images in %d classes -> %s; %s on %s",
        *(args.vae_path, options.img_size, len(source), len(source.classes), spec, options.precision, device),
    )
    if warning := misleading_numbers(source.classes):
        logger.warning("%s", warning)
    make = RecordMaker(spec, quantizer and quantizer.to(device), vae.scale, options.seed)
    settings = dict(vae=vae.to(device), make=make, flips=not options.no_flip, precision=options.precision)
    to_records = functools.partial(encode_images, device=device, **settings)
    fill(options, record, source, to_records, spec, **loading(args, device))


@doing("converting the cache")
def convert(args: argparse.Namespace, given: set[str], device: torch.device) -> None:
    """A tree of .npz files -> shards. What made them is taken from OLD's record, or from --vae_path and --img_size."""
    old, new = (Path(path) for path in args.convert)
    if old.resolve() == new.resolve() or old.resolve() in new.resolve().parents:
        raise ValueError(f"--convert {old} {new}: NEW must be another folder, outside OLD")
    before = read_record(old, "convert")
    if before is not None and before.get("format", "npz") != "npz":
        raise ValueError(f"{old} (--convert) holds {before['format']} already; it takes a tree of .npz files")
    latents = CachedLatents(old, not args.no_flip, argument="convert", probed=1)
    vae, options = None, read_options(CacheOptions, args, seed=args.seed)
    if "vae_path" in given or args.mode == "indices":
        vae, options = read_vae(args, given - {"vae_embed_dim"})
    size = args.img_size if "img_size" in given else None
    origin = describe_tree(old, latents.shape, before, vae, args.vae_path, size)
    options = dataclasses.replace(options, img_size=origin.pop("img_size"), precision=origin.pop("precision"))
    quantizer, spec = options.build_quantizer(), options.spec(latents.shape[0] // 2, latents.shape[-1])
    load = functools.partial(load_moments, shape=latents.shape, names=VIEWS[: spec.views])
    source = Source(latents.folder, load, ".npz", read_stamp, same_stamp)
    record = describe(options, spec, source.classes, source.paths, quantizer)
    record |= {"latent_fingerprint": None, "converted": True} | origin
    if not origin:
        logger.warning("%s does not say which VAE made it, nor does --vae_path: training will not check it", old)
    logger.info("%d files in %d classes -> %s", len(source), len(source.classes), spec)
    make = RecordMaker(spec, quantizer and quantizer.to(device), vae and vae.scale, options.seed)
    to_records = functools.partial(convert_moments, make=make, device=device)
    fill(options, record, source, to_records, spec, **loading(args, device))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, then encode, convert, verify or print. Raises ValueError or OSError for bad input."""
    parser = build_parser()
    args, given = parse(parser, argv)
    with flag_names(parser, bits="quant_bits"):
        options = check_arguments(args, given)
        if args.info or args.verify:
            data = Path(args.data_path) / "train" if "data_path" in given else None
            print(info(options.cache) if args.info else verify(options.cache, data))
            return
        try:
            device = dist.init(args.device, args.dist_url)
            dist.same_bits_every_time()
            (encode if args.convert is None else convert)(args, given, device)
        finally:
            dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
