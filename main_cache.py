"""Encode a data set once, so that training need not run the VAE's encoder (main_tokenbridge.py --use_cached --cached_path DIR).

  encode    torchrun --nproc_per_node=8 main_cache.py --img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 \\
                --batch_size 128 --data_path DIR --cached_path CACHE
  look      python main_cache.py --info --cached_path CACHE
  check     python main_cache.py --verify --cached_path CACHE           (all checksums; also caches of the published scripts)
  convert   python main_cache.py --convert OLD NEW                      (a tree of .npz files, as MAR's and the published script write, to shards)

For DIR/train/<class>/<image> it keeps mean and log-variance of the centre crop's latents and of its mirror image's: --format shards in few large
files (dataset/shards.py), --format npz in one file per image, CACHE/<class>/<image>.npz, the published layout (SPEC 8). CACHE/cache.json says what the
cache was made with, CACHE/bad_images.txt lists images that could not be read. After a kill run the same command again, on any number of
processes: only what is missing is encoded, and the files become those of an uninterrupted run. One job at a time may write to a cache.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoints import download
from dataset.encode import (
    Counts,
    Encoder,
    ImageSource,
    MomentsSource,
    NpzFiles,
    ShardFiles,
    check_room,
    encode_all,
    read_moments,
)
from dataset.latents import RECORD, CachedLatents, read_record
from dataset.loader import BAD_IMAGE_CHOICES, ImageFolderDataset
from dataset.shards import DTYPES, MODES, NAME, RecordSpec, Shard
from models.quantizer import MAX_BITS, QUANTIZERS, TableQuantizer, build_quantizer, check_range
from models.vae import AutoencoderKL, load_vae
from util import dist
from util.cli import add_process_flags, at_least, check_writable, make_parser, parse
from util.files import replacing, write_json
from util.log import get_logger, run_cli

logger = get_logger()

FORMATS = ("shards", "npz")
BAD_LIST = "bad_images.txt"
# What two runs into one cache must agree on, by the key in cache.json; the flag that says it.
AGREE = {
    "format": "--format",
    "img_size": "--img_size",
    "latent_fingerprint": "--vae_path (encoder weights)",
    "precision": "--precision",
    "mode": "--mode",
    "dtype": "--dtype",
    "flips": "--no_flip",
    "crops": "--crops",
    "seed": "--seed",
    "shard_size": "--shard_size",
    "scale_factor": "scale factor of --vae_path",
    "shift": "shift of --vae_path",
    "quantizer": "--quantizer, --quant_bits, --quant_min, --quant_max",
    "class_list": "class folders of --data_path",
    "image_list": "images of --data_path",
}


def build_parser() -> argparse.ArgumentParser:
    """The published flags with their meanings and defaults (SPEC 10; --device defaults to auto), and ours."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to do (default: encode)")
    group.add_argument("--info", action="store_true", help="print what --cached_path holds")
    group.add_argument(
        "--verify", action="store_true", help="read all of --cached_path and compare it with its checksums"
    )
    group.add_argument(
        "--convert",
        nargs=2,
        default=None,
        metavar=("OLD", "NEW"),
        help="turn a tree of .npz files into shards; with --vae_path its VAE is recorded, and may not contradict OLD's record",
    )

    group = parser.add_argument_group("images and VAE")
    group.add_argument("--batch_size", type=int, default=128, help="images per process encoded together")
    group.add_argument(
        "--img_size", type=int, default=256, help="side of the images, pixels; a multiple of the VAE's stride"
    )
    group.add_argument(
        "--vae_path",
        default="pretrained_models/vae/kl16.ckpt",
        help='VAE checkpoint (weights under "model"), or a folder of diffusers',
    )
    group.add_argument(
        "--vae_embed_dim", type=int, default=16, help="latent channels; taken from the VAE's file if it says so"
    )
    group.add_argument("--data_path", default="./data/imagenet", help="folder with train/<class>/<image>")
    group.add_argument(
        "--on_bad_image",
        default="error",
        choices=BAD_IMAGE_CHOICES,
        help="corrupt images are left out and listed in bad_images.txt; error: and the cache does not count as complete",
    )
    group.add_argument("--precision", default="fp32", choices=dist.PRECISIONS, help="of the encoder's arithmetic")

    group = parser.add_argument_group("cache")
    group.add_argument("--cached_path", default="", help="folder of the cache; needed")
    group.add_argument(
        "--format", default="shards", choices=FORMATS, help="npz is the published layout, float32 with both flips"
    )
    group.add_argument(
        "--mode",
        default="moments",
        choices=MODES,
        help="moments: the posterior, sampled anew in every epoch; mean: its mean; indices: bits of one posterior sample, quantized",
    )
    group.add_argument(
        "--dtype",
        default=None,
        choices=list(DTYPES),
        help="of moments and mean; default: float16 in shards, float32 in npz",
    )
    group.add_argument(
        "--no_flip",
        action="store_true",
        help="no mirrored images (for digits, text): half the size; training needs --no_flip too",
    )
    group.add_argument(
        "--crops",
        type=int,
        default=1,
        help="crops of each image: the centre, then random ones of 0.8 to 1 times the short side",
    )
    group.add_argument("--shard_size", type=int, default=1024, help="images per shard")
    group.add_argument(
        "--quantizer", default="gaussian", choices=QUANTIZERS, help="--mode indices: where the levels come from"
    )
    group.add_argument(
        "--quantizer_tables",
        default="",
        help="--quantizer lloyd: file with its levels (python -m tools.vae_stats writes it)",
    )
    group.add_argument(
        "--quant_bits", type=int, default=6, help=f"--mode indices: bits per latent dimension, 1 to {MAX_BITS}"
    )
    group.add_argument(
        "--quant_min", type=float, default=-5.0, help="--mode indices: lowest latent value of the quantizer"
    )
    group.add_argument(
        "--quant_max", type=float, default=5.0, help="--mode indices: highest latent value of the quantizer"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="delete what is cached of these images first, whatever VAE made it"
    )
    add_process_flags(parser, seed=0)
    return parser


def check_arguments(args: argparse.Namespace, given: set[str]) -> None:
    """Everything that can be refused without reading a file; fills in --dtype and, for --convert, --cached_path."""
    at_least(args, batch_size=1, img_size=1, crops=1, shard_size=1, seed=0)
    if sum([args.info, args.verify, args.convert is not None]) > 1:
        raise ValueError("--info, --verify and --convert are different things; choose one")
    if args.convert is not None:
        if "cached_path" in given:
            raise ValueError("--convert OLD NEW names both folders; leave --cached_path out")
        args.cached_path = args.convert[1]
        for name in ("data_path", "crops", "no_flip", "precision"):
            if name in given:
                raise ValueError(f"--{name} does not go with --convert, which takes the latents of OLD as they are")
    if not args.cached_path:
        raise ValueError("--cached_path is empty: give the folder that the latents go to")
    if args.format == "npz":
        wrong = {
            "mode": args.mode != "moments",
            "dtype": args.dtype not in (None, "float32"),
            "crops": args.crops != 1,
            "no_flip": args.no_flip,
            "shard_size": "shard_size" in given,
            "convert": args.convert is not None,
        }
        for name in (name for name, refused in wrong.items() if refused):
            raise ValueError(
                f"--{name} does not go with --format npz, the published layout: float32 moments of the centre crop and its mirror image"
            )
    if args.mode != "indices":
        for name in ("quantizer", "quantizer_tables", "quant_bits", "quant_min", "quant_max"):
            if name in given:
                raise ValueError(f"--{name} changes --mode indices only; give that too, or leave it out")
    elif args.dtype is not None:
        raise ValueError("--dtype does not go with --mode indices, which stores bits")
    if not 1 <= args.quant_bits <= MAX_BITS:
        raise ValueError(f"--quant_bits must be from 1 to {MAX_BITS}, got {args.quant_bits}")
    check_range(args.quant_min, args.quant_max)
    args.dtype = args.dtype or ("float32" if args.format == "npz" else "uint8" if args.mode == "indices" else "float16")


# ------------------------------------------------------------------------------------------------------------- what the cache was made with


def vae_sha256(path: str | Path) -> str:
    """SHA-256 of a VAE's file, or of all weight files of its folder."""
    digest, path = hashlib.sha256(), Path(path)
    for part in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with part.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def digest_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(lines).encode(errors="surrogateescape")).hexdigest()


def describe(args: argparse.Namespace, spec: RecordSpec, source: ImageSource, quantizer: TableQuantizer | None) -> dict:
    """The content of cache.json before anything is encoded, but for what the VAE says."""
    record = {
        "format": args.format,
        "complete": False,
        "img_size": args.img_size,
        "crop": "ADM centre crop",
        "crops": args.crops,
        "flips": not args.no_flip,
        "mode": args.mode,
        "dtype": args.dtype,
        "record_shape": list(spec.shape),
        "views": spec.views,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "classes": source.classes,
        "class_list": digest_of(source.classes),
        "images": len(source),
        "corrupt": 0,
    }
    if args.crops > 1 or args.mode == "indices":
        record["seed"] = args.seed
    if quantizer is not None:
        record["quantizer"] = quantizer.description()
    if args.format == "shards":
        record |= {"shard_size": args.shard_size, "image_list": digest_of(source.paths), "shards": []}
    return record


def describe_vae(args: argparse.Namespace, vae: AutoencoderKL) -> dict:
    """The part of cache.json that says which VAE made the latents."""
    return {
        "vae": vae.config,
        "scale_factor": vae.config["scale_factor"],
        "shift": vae.config["shift"],
        "latent_fingerprint": vae.latent_fingerprint(),
        "vae_file": Path(args.vae_path).name,
        "vae_sha256": vae_sha256(args.vae_path),
    }


def check_agreement(args: argparse.Namespace, record: dict) -> None:
    """ValueError naming the flag if --cached_path holds a cache that was begun with another setting, or files without a record."""
    cache, found = Path(args.cached_path), read_record(args.cached_path)
    if found is None:
        if args.format == "shards" and any(cache.glob("*/*.npz")):
            raise ValueError(
                f"{cache} (--cached_path) holds .npz latents without a {RECORD}, as the published scripts write them. Train from it as it "
                f"is, continue it with --format npz, or turn it into shards with --convert {cache} NEW"
            )
        if args.format == "shards" and any(NAME.fullmatch(path.name) for path in cache.glob("shard-*")):
            raise ValueError(
                f"{cache} (--cached_path) holds shards but no {RECORD}, which says what made them; choose another folder, or --overwrite"
            )
        return
    found = {
        "format": "npz",
        "mode": "moments",
        "dtype": "float32",
        "flips": True,
        "crops": 1,
        "shift": record.get("shift"),
    } | found
    keys = [key for key in AGREE if key in record and (key in found or key not in ("class_list", "scale_factor"))]
    if args.mode != "indices":
        keys = [key for key in keys if key not in ("scale_factor", "shift")]  # moments are kept unscaled
    differs = {key: (found.get(key), record[key]) for key in keys if found.get(key) != record[key]}
    if "class_list" in differs:
        differs.pop("image_list", None)
    if differs:
        what = "; ".join(
            f"{AGREE[key]} was {str(old)[:16]}, now {str(new)[:16]}" for key, (old, new) in differs.items()
        )
        raise ValueError(
            f"{cache / RECORD} (--cached_path) says that the latents there were made with another setting: {what}. Choose another folder, "
            "or --overwrite to replace them"
        )
    if args.format == "shards" and found.get("batch_size") != args.batch_size:
        logger.warning(
            "--batch_size was %s, is %s: the rest of the cache may differ from one run's in the last bits",
            found.get("batch_size"),
            args.batch_size,
        )


def check_folders(cache: Path, classes: Sequence[str]) -> None:
    """ValueError if the cache holds folders that are no class of the data: a tree of .npz files numbers its classes by all folders in it."""
    foreign = (
        sorted(entry.name for entry in cache.iterdir() if entry.is_dir() and entry.name not in classes)
        if cache.is_dir()
        else []
    )
    if foreign:
        raise ValueError(
            f"{cache} (--cached_path) holds {len(foreign)} folders that are no class of --data_path, first: {foreign[0]}; training "
            "would count them as classes. Choose another folder, or remove them"
        )


# ------------------------------------------------------------------------------------------------------------- encode, convert


def prepare(args: argparse.Namespace, record: dict, files: NpzFiles | ShardFiles) -> None:
    """The cache's folders and its record; with --overwrite the old files are deleted first, and the old record after the last of them.

    npz: every class gets a folder, also one without a readable image, so that training numbers the classes as the data does.
    """
    cache = Path(args.cached_path)
    if args.overwrite and isinstance(files, NpzFiles):
        for number in range(dist.rank(), len(files.source), dist.world_size()):
            files.target(number).unlink(missing_ok=True)
    if args.overwrite and dist.is_main():
        for path in [*cache.glob("shard-*.safetensors"), *cache.glob(".shard-*.safetensors.*")]:
            path.unlink(missing_ok=True)
    dist.barrier()
    if dist.is_main():
        if isinstance(files, NpzFiles):
            for name in files.source.classes:
                (cache / name).mkdir(exist_ok=True)
            if not (cache / RECORD).exists() and any(cache.glob("*/*.npz")):
                logger.warning(
                    "%s holds latents but no %s: complete files of the right shape are kept, whatever VAE made them; "
                    "--overwrite replaces them",
                    cache,
                    RECORD,
                )
        write_json(cache / RECORD, record)
    dist.barrier()


def fill(args: argparse.Namespace, record: dict, source: ImageSource, encoder: Encoder) -> None:
    """Bring the cache to its end: check, prepare, encode what is missing, write the record. Raises on all processes together."""
    cache = Path(args.cached_path)
    problem = None
    try:
        if args.format == "npz":
            check_folders(cache, source.classes)
        if not args.overwrite:
            check_agreement(args, record)
        check_writable(cache, "--cached_path")
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)
    key = json.dumps([record.get(name) for name in AGREE])
    files = (
        NpzFiles(cache, source, encoder.spec, args.batch_size)
        if args.format == "npz"
        else ShardFiles(cache, source, encoder.spec, args.batch_size, args.shard_size, key)
    )
    counts = Counts()
    try:
        prepare(args, record, files)
        plan = files.plan(counts)
        dist.barrier()  # before a shard can be finished by another
        check_room(files, cache)
        encoded, kept, corrupt = (
            int(n)
            for n in encode_all(
                files, source, encoder, plan, counts, num_workers=args.num_workers, pin_memory=args.pin_mem
            )
        )
    finally:
        files.close()
    bad = sorted(number for part in dist.gather_objects(counts.corrupt) for number in part)
    if dist.is_main():
        write_bad_list(cache, [source.paths[number] for number in bad])
    if encoded + kept == 0:
        raise ValueError(f"{source.root} (--data_path): not one of its {len(source)} images can be read")
    if bad and args.on_bad_image == "error":
        first = next(problem for n in bad if (problem := source[n][2]) is not None)
        raise ValueError(
            f"{len(bad)} of {len(source)} images are corrupt and listed in {cache / BAD_LIST}; all others are cached. First: {first}"
        )
    if dist.is_main():
        done = record | {"images": encoded + kept, "corrupt": corrupt, "complete": True}
        if isinstance(files, ShardFiles):
            done["shards"] = files.listing()
        elif (stale := sum(1 for _ in cache.rglob("*.npz")) - encoded - kept) > 0:
            logger.warning(
                "%s holds %d latents of other images than those of %s; training would use them",
                cache,
                stale,
                source.root,
            )
        write_json(cache / RECORD, done)
        logger.info("%s is complete: %d images encoded, %d were there, %d corrupt", cache, encoded, kept, corrupt)


def write_bad_list(cache: Path, paths: Sequence[str]) -> None:
    """bad_images.txt: one path below the data folder per line; no file if there is none to name."""
    if not paths:
        (cache / BAD_LIST).unlink(missing_ok=True)
        return
    with replacing(cache / BAD_LIST) as file:
        file.write("".join(f"{path}\n" for path in paths).encode(errors="surrogateescape"))


def make_quantizer(args: argparse.Namespace, given: set[str], vae: AutoencoderKL) -> TableQuantizer | None:
    """The quantizer of --mode indices; range and bits are the VAE's own unless said otherwise."""
    if args.mode != "indices":
        return None
    vae.fill_in_range(args, given)
    return build_quantizer(args.quantizer, args.quant_bits, args.quant_min, args.quant_max, args.quantizer_tables)


def encode(args: argparse.Namespace, given: set[str], device: torch.device) -> None:
    """Images -> cache."""
    args.vae_path = download.local_path(args.vae_path, "--vae_path")
    vae = load_vae(args.vae_path, args.vae_embed_dim if "vae_embed_dim" in given else None)
    if args.img_size % vae.stride:
        raise ValueError(
            f"--img_size {args.img_size} is not a multiple of the stride {vae.stride} of {args.vae_path} (--vae_path)"
        )
    if vae.deterministic and args.mode == "moments" and args.format == "shards":
        raise ValueError(
            f"{args.vae_path} (--vae_path) gives one latent and no posterior: store it with --mode mean (or indices)"
        )
    quantizer = make_quantizer(args, given, vae)
    images = ImageFolderDataset(Path(args.data_path) / "train", args.img_size, False, args.on_bad_image)
    source, side = ImageSource(images, args.crops, args.seed), args.img_size // vae.stride
    spec = RecordSpec(
        args.mode,
        args.dtype,
        (vae.embed_dim * (2 if args.mode == "moments" else 1), side, side),
        args.crops * (1 if args.no_flip else 2),
        args.quant_bits if args.mode == "indices" else 0,
    )
    record = describe(args, spec, source, quantizer) | describe_vae(args, vae)
    logger.info(
        "VAE %s: %d px -> %s %s, %d views, %s, %.1f KiB per image as %s; %d images in %d classes; %s on %s",
        args.vae_path,
        args.img_size,
        args.mode,
        spec.shape,
        spec.views,
        args.dtype,
        spec.nbytes * spec.views / 1024,
        args.format,
        len(images),
        len(images.classes),
        args.precision,
        device,
    )
    vae = vae.to(device)
    fill(
        args,
        record,
        source,
        Encoder(
            vae,
            spec,
            not args.no_flip,
            device,
            args.precision,
            quantizer and quantizer.to(device),
            vae.scale,
            args.seed,
        ),
    )


def convert(args: argparse.Namespace, given: set[str], device: torch.device) -> None:
    """A tree of .npz files -> shards. What made them is taken from OLD's record, or from --vae_path and --img_size if given."""
    old, new = (Path(path) for path in args.convert)
    if old.resolve() == new.resolve() or old.resolve() in new.resolve().parents:
        raise ValueError(f"--convert {old} {new}: NEW must be another folder, outside OLD")
    before = read_record(old, "--convert")
    if before is not None and before.get("format", "npz") != "npz":
        raise ValueError(f"{old} (--convert) holds {before['format']} already; it takes a tree of .npz files")
    latents = CachedLatents(old, flag="--convert")
    args.vae_path = download.local_path(args.vae_path, "--vae_path")
    vae = load_vae(args.vae_path) if "vae_path" in given or args.mode == "indices" else None
    made_by = {
        key: before[key]
        for key in ("vae", "scale_factor", "shift", "latent_fingerprint", "vae_file", "vae_sha256")
        if before and key in before
    }
    if vae is not None:
        found = describe_vae(args, vae)
        if made_by and made_by.get("latent_fingerprint") != found["latent_fingerprint"]:
            raise ValueError(
                f"{old} (--convert) was made with another VAE ({made_by.get('vae_file')}) than {args.vae_path} (--vae_path)"
            )
        made_by = found
    channels, side = latents.shape[0] // 2, latents.shape[-1]
    if vae is not None and (vae.embed_dim != channels or "img_size" in given and args.img_size != side * vae.stride):
        raise ValueError(
            f"{old} (--convert) holds moments of {latents.shape}, which are not those of {args.vae_path} (--vae_path, --img_size)"
        )
    if before is not None and "img_size" in given and args.img_size != before["img_size"]:
        raise ValueError(f"--img_size {args.img_size} contradicts {old / RECORD}, which says {before['img_size']}")
    args.img_size = (
        before["img_size"] if before else side * vae.stride if vae else args.img_size if "img_size" in given else None
    )
    quantizer = make_quantizer(args, given, vae)
    source = MomentsSource(latents)
    spec = RecordSpec(
        args.mode,
        args.dtype,
        (channels * (2 if args.mode == "moments" else 1), side, side),
        2,
        args.quant_bits if args.mode == "indices" else 0,
    )
    if before is not None:
        args.precision = before.get("precision", "fp32")
    record = describe(args, spec, source, quantizer) | {"latent_fingerprint": None, "converted": True} | made_by
    if not made_by:
        logger.warning(
            "%s does not say which VAE made it, and neither does --vae_path: training will take it on trust", old
        )
    logger.info(
        "%d files in %d classes -> %s %s, %s, %.1f KiB per image",
        len(source),
        len(source.classes),
        args.mode,
        spec.shape,
        args.dtype,
        spec.nbytes * 2 / 1024,
    )
    fill(
        args,
        record,
        source,
        Encoder(None, spec, True, device, quantizer=quantizer, scale=vae and vae.scale, seed=args.seed),
    )


# ------------------------------------------------------------------------------------------------------------- look, check


def cache_of(args: argparse.Namespace) -> tuple[Path, dict | None]:
    """An existing cache and its record. FileNotFoundError if there is none."""
    cache = Path(args.cached_path)
    if not cache.is_dir():
        raise FileNotFoundError(f"no folder {cache} (--cached_path)")
    record = read_record(cache)
    if record is None and not any(cache.glob("*/*.npz")):
        raise FileNotFoundError(
            f"{cache} (--cached_path) is no cache: it holds neither a {RECORD} nor <class>/<image>.npz"
        )
    return cache, record


def info(args: argparse.Namespace) -> None:
    """Print what a cache is, a line for each fact."""
    cache, record = cache_of(args)
    sizes = [
        path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix in (".npz", ".safetensors")
    ]
    state = (
        f"no {RECORD}, so a tree of .npz files as published"
        if record is None
        else "complete"
        if record["complete"]
        else "NOT finished"
    )
    print(f"{cache}: {state}")
    about = (
        {}
        if record is None
        else record
        | {"classes": len(record["classes"]) if isinstance(record.get("classes"), list) else record.get("classes")}
    )
    if isinstance(about.get("quantizer"), dict):
        about["quantizer"] = {key: about["quantizer"][key] for key in ("kind", "bits", "min", "max")}
    for key, value in about.items():
        if key not in ("shards", "complete", "class_list", "image_list", "vae"):
            print(f"  {key:<20} {value}")
    images = len(sizes) if record is None else record["images"]
    print(
        f"  {'files':<20} {len(sizes)}, {sum(sizes) / 2**20:.1f} MiB, {sum(sizes) / max(images, 1):.0f} bytes per image"
    )


def verify(args: argparse.Namespace) -> None:
    """Read everything; ValueError that names every damaged file (the first ten) if there is one."""
    cache, record = cache_of(args)
    problems, images = [], 0
    if record is not None and record.get("format") == "shards":
        if not record["complete"]:
            logger.warning("%s is not finished; its finished shards are checked", cache)
        listed = {entry["name"]: entry["sha256"] for entry in record["shards"]} or {
            path.name: None for path in sorted(cache.glob("shard-*.safetensors"))
        }
        for name, sha256 in listed.items():
            try:
                shard = Shard(cache / name)
            except ValueError as error:
                problems.append(str(error))
                continue
            images += int(shard.present.sum())
            if sha256 not in (None, shard.sha256):
                problems.append(f"{shard.path}: its head is not the one that {RECORD} lists")
            problems += [f"{shard.path}: the checksum of {path} is wrong" for path in shard.wrong_records()]
        if record["complete"] and not problems and images != record["images"]:
            problems.append(f"{cache / RECORD} says {record['images']} images, the shards hold {images}")
    else:
        paths = sorted(cache.rglob("*.npz"))
        shapes: dict[tuple, Path] = {}
        for path in paths:
            arrays = read_moments(path)
            if arrays is None:
                problems.append(f"{path} is cut short, damaged or not finite")
            else:
                shapes.setdefault(arrays[0].shape, path)
        problems += [f"{path} has moments of {shape}, others have not" for shape, path in list(shapes.items())[1:]]
        images = len(paths)
    if problems:
        raise ValueError(f"{cache} (--cached_path): {len(problems)} problems. " + "; ".join(problems[:10]))
    print(f"{cache}: {images} images, every checksum is right")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, then encode, convert, verify or print. Raises ValueError or OSError for bad input."""
    args, given = parse(build_parser(), argv)
    check_arguments(args, given)
    if args.info or args.verify:
        (info if args.info else verify)(args)
        return
    try:
        device = dist.init(args.device, args.dist_url)
        dist.same_bits_every_time()
        (encode if args.convert is None else convert)(args, given, device)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
