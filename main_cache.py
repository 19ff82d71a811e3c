"""Encode a data set once, so that training need not run the VAE's encoder (main_tokenbridge.py --use_cached --cached_path DIR).

  torchrun --nproc_per_node=8 main_cache.py --img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 --batch_size 128 \\
      --data_path DIR --cached_path CACHE

For each image DIR/train/<class>/<name> it writes CACHE/<class>/<name>.npz with `moments` and `moments_flip`, (2C, h, w) float32: mean and
log-variance of the centre crop and of its mirror image (SPEC 8, the published format). CACHE/cache.json says what the cache was made with.
After a kill, run the same command again: complete files are kept, all others are written. One job at a time may write to a cache.
"""

import argparse
import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.vae import AutoencoderKL, load_vae
from util import dist
from util.cli import add_process_flags, at_least, check_writable, make_parser, parse
from util.files import replacing, write_json
from util.loader import BAD_IMAGE_CHOICES, ImageFolderDataset
from util.log import get_logger, run_cli

logger = get_logger()

RECORD = "cache.json"
SYNC_EVERY = 8             # batches between messages among the processes: progress, and whether one of them has failed
LOG_SECONDS = 5            # between progress lines
WRITERS = 8                # threads that write files while the next batch is encoded


def build_parser() -> argparse.ArgumentParser:
    """The published flags with their meanings and defaults (SPEC 10; --device defaults to auto), and ours."""
    parser = make_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=128, help="images per process encoded together")
    parser.add_argument("--img_size", type=int, default=256, help="side of the images, pixels; a multiple of the VAE's stride")
    parser.add_argument("--vae_path", default="pretrained_models/vae/kl16.ckpt", help="VAE checkpoint (weights under \"model\")")
    parser.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels; taken from the VAE's file if it says so")
    parser.add_argument("--data_path", default="./data/imagenet", help="folder with train/<class>/<image>")
    parser.add_argument("--cached_path", default="", help="folder of the cache; needed")
    parser.add_argument("--on_bad_image", default="error", choices=BAD_IMAGE_CHOICES, help="skip leaves corrupt images out of the cache")
    parser.add_argument("--precision", default="fp32", choices=dist.PRECISIONS, help="of the encoder's arithmetic; files are float32 always")
    parser.add_argument("--overwrite", action="store_true", help="delete these images' cached latents first, whatever VAE made them")
    add_process_flags(parser, seed=0)
    return parser


# ------------------------------------------------------------------------------------------------------------- files

def is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether `path` is a whole .npz with finite float32 `moments` and `moments_flip` of `shape` (zip checksums are verified)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = [arrays[key] for key in ("moments", "moments_flip")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    return all(a.shape == shape and a.dtype == np.float32 and bool(np.isfinite(a).all()) for a in found)


def write_moments(path: Path, moments: np.ndarray, moments_flip: np.ndarray) -> None:
    """Write one .npz under a temporary name, then rename. The name is fixed, so that running again replaces what a kill left behind."""
    with replacing(path) as file:
        np.savez(file, moments=moments, moments_flip=moments_flip)


class ToEncode(Dataset):
    """Image number -> (number, image (3, S, S) or None, problem or None); the image is None if its latents are there or it is corrupt."""

    def __init__(self, images: ImageFolderDataset, cache: Path, shape: tuple[int, ...]):
        self.images, self.cache, self.shape = images, cache, shape
        self.root = Path(images.folder.root)

    def target(self, number: int) -> Path:
        """Where an image's latents go: CACHE/<class>/<image file name>.npz."""
        relative = Path(self.images.samples[number][0]).relative_to(self.root)
        return self.cache / relative.parent / f"{relative.name}.npz"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, Tensor | None, str | None]:
        if is_complete(self.target(number), self.shape):
            return number, None, None
        try:
            return number, self.images.load(number), None
        except ValueError as error:
            return number, None, str(error)


# ------------------------------------------------------------------------------------------------------------- what the cache was made with

def describe(args: argparse.Namespace, vae: AutoencoderKL, dataset: ImageFolderDataset) -> dict:
    """The content of cache.json before anything is encoded."""
    digest = hashlib.sha256()
    with Path(args.vae_path).open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"img_size": args.img_size, "precision": args.precision, "vae": vae.config, "scale_factor": vae.config["scale_factor"],
            "latent_fingerprint": vae.latent_fingerprint(), "vae_file": Path(args.vae_path).name, "vae_sha256": digest.hexdigest(),
            "classes": len(dataset.classes), "images": len(dataset), "complete": False}


def check_record(path: Path, record: dict) -> None:
    """ValueError naming `path`, an existing cache.json, if it was made with another VAE encoder, image size or precision."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
        differs = {key: (found[key], record[key]) for key in ("img_size", "latent_fingerprint", "precision") if found[key] != record[key]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} (--cached_path) is not a record of main_cache.py ({type(error).__name__}: {error}); choose another folder, "
                         "or --overwrite") from error
    if differs:
        names = {"img_size": "--img_size", "latent_fingerprint": "--vae_path (encoder weights)", "precision": "--precision"}
        what = "; ".join(f"{names[key]} was {str(old)[:16]}, now {str(new)[:16]}" for key, (old, new) in differs.items())
        raise ValueError(f"{path} (--cached_path) says that the latents there were made with another setting: {what}. Choose another folder, "
                         "or --overwrite to replace them")


def check_folders(cache: Path, classes: Sequence[str]) -> None:
    """ValueError if the cache holds folders that are no class of the data: training numbers its classes by all folders it finds."""
    foreign = sorted(entry.name for entry in cache.iterdir() if entry.is_dir() and entry.name not in classes) if cache.is_dir() else []
    if foreign:
        raise ValueError(f"{cache} (--cached_path) holds {len(foreign)} folders that are no class of --data_path, first: {foreign[0]}; training "
                         "would count them as classes. Choose another folder, or remove them")


# ------------------------------------------------------------------------------------------------------------- encoding

def batches_of(work: ToEncode, args: argparse.Namespace) -> Iterator[list]:
    """This process's batches: every world-size-th image, each exactly once, the last batch as short as it is."""
    mine = range(dist.rank(), len(work), dist.world_size())
    parts = [list(mine[first : first + args.batch_size]) for first in range(0, len(mine), args.batch_size)]
    return iter(DataLoader(work, batch_sampler=parts, num_workers=args.num_workers, pin_memory=False, collate_fn=list))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: torch.device, precision: str) -> Tensor:
    """Images (B, 3, S, S) -> moments (B, 2C, h, w) float32 on the CPU. ValueError if one is not finite."""
    with dist.autocast(device, precision):
        moments = vae.encode(images).parameters
    moments = moments.float().cpu()
    if not torch.isfinite(moments).all():
        raise ValueError(f"the VAE's latents of an image are NaN or infinite under --precision {precision}; use fp32 or bf16, or check --vae_path")
    return moments


class CacheWriter:
    """Encodes batches of `work` and writes their files while the next batch is encoded; counts what it did."""

    def __init__(self, vae: AutoencoderKL, work: ToEncode, device: torch.device, args: argparse.Namespace):
        self.vae, self.work, self.device, self.args = vae, work, device, args
        self.pool, self.pending = ThreadPoolExecutor(WRITERS), list[Future]()
        self.encoded = self.kept = 0

    def __call__(self, batch: list[tuple[int, Tensor | None, str | None]]) -> None:
        """Encode one batch of `ToEncode` items. ValueError for a corrupt image (unless skipped), OSError if a file cannot be written."""
        for number, _, problem in batch:
            if problem is not None:
                self.work.images.bad.report(ValueError(problem), self.work.images.samples[number][0])
        todo = [(number, image) for number, image, _ in batch if image is not None]
        self.kept += sum(image is None and problem is None for _, image, problem in batch)
        if not todo:
            return
        images = torch.stack([image for _, image in todo])
        images = (images.pin_memory() if self.args.pin_mem and self.device.type == "cuda" else images).to(self.device, non_blocking=True)
        plain, mirrored = (encode(self.vae, x, self.device, self.args.precision).numpy() for x in (images, images.flip(-1)))    # (B, 2C, h, w)
        self.finish_writing()
        self.pending = [self.pool.submit(write_moments, self.work.target(number), plain[i], mirrored[i]) for i, (number, _) in enumerate(todo)]
        self.encoded += len(todo)

    def finish_writing(self) -> None:
        """Wait for the files of the last batch; raises what writing one of them raised."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def counts(self) -> np.ndarray:
        """Images encoded, kept from before, and corrupt, by this process: (3,)."""
        return np.array([self.encoded, self.kept, self.work.images.bad_images])

    def close(self) -> None:
        self.pool.shutdown()


def run(writer: CacheWriter, work: ToEncode, args: argparse.Namespace) -> np.ndarray:
    """Encode this process's part; returns the counts of all processes together (3,). An error in one stops all at the next message."""
    total, world, started = len(work), dist.world_size(), time.perf_counter()
    logged = started
    rounds = -(-len(range(0, total, world)) // args.batch_size)            # batches of rank 0, which has the most
    batches, error, counts = batches_of(work, args), None, np.zeros(3, int)
    for k in range(rounds):
        try:
            if error is None:
                writer(next(batches, []))
                if k == rounds - 1:
                    writer.finish_writing()
        except (ValueError, OSError) as problem:
            error = problem
        if (k + 1) % SYNC_EVERY == 0 or k == rounds - 1 or world == 1:
            dist.agree(error)
            counts = np.sum(dist.gather_objects(writer.counts()), axis=0)
            seconds = time.perf_counter() - started
            if seconds + started - logged < LOG_SECONDS and k < rounds - 1:
                continue
            logged = seconds + started
            logger.info("%d/%d images: %d encoded, %d were there, %d corrupt  %.1f images/s  ETA %.0f s", counts.sum(), total, *counts,
                        counts[0] / seconds, seconds * (total - counts.sum()) / max(counts.sum(), 1))
    return counts


def prepare(args: argparse.Namespace, record: dict, work: ToEncode) -> None:
    """Make the cache's folders and its record; with --overwrite delete these images' old latents first.

    Every class gets a folder, also one without a readable image, so that training numbers the classes as the data does.
    """
    cache = Path(args.cached_path)
    if args.overwrite:
        for number in range(dist.rank(), len(work), dist.world_size()):
            work.target(number).unlink(missing_ok=True)
        dist.barrier()                     # the old record stays until the last of its files is gone, so that a kill leaves no wrong record
    if dist.is_main():
        for name in work.images.classes:
            (cache / name).mkdir(exist_ok=True)
        if not (cache / RECORD).exists() and any(cache.glob("*/*.npz")):
            logger.warning("%s holds latents but no %s: complete files of the right shape are kept, whatever VAE made them; "
                           "--overwrite replaces them", cache, RECORD)
        write_json(cache / RECORD, record)
    dist.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, load, encode. Raises ValueError or OSError for bad input."""
    args, given = parse(build_parser(), argv)
    at_least(args, batch_size=1, img_size=1)
    if not args.cached_path:
        raise ValueError("--cached_path is empty: give the folder that the latents go to")
    writer = None
    try:
        device = dist.init(args.device, args.dist_url)
        vae = load_vae(args.vae_path, args.vae_embed_dim if "vae_embed_dim" in given else None)
        if args.img_size % vae.stride:
            raise ValueError(f"--img_size {args.img_size} is not a multiple of the stride {vae.stride} of {args.vae_path} (--vae_path)")
        images = ImageFolderDataset(Path(args.data_path) / "train", args.img_size, False, args.on_bad_image)
        cache, side = Path(args.cached_path), args.img_size // vae.stride
        work = ToEncode(images, cache, (2 * vae.embed_dim, side, side))
        record = describe(args, vae, images)
        problem = None
        try:
            check_folders(cache, images.classes)
            if not args.overwrite:
                check_record(cache / RECORD, record)
            check_writable(cache, "--cached_path")
        except (ValueError, OSError) as error:
            problem = error
        dist.agree(problem)
        logger.info("VAE %s: %d px -> moments %s; %d images in %d classes; %s on %s", args.vae_path, args.img_size, work.shape, len(images),
                    len(images.classes), args.precision, device)
        prepare(args, record, work)
        writer = CacheWriter(vae.to(device), work, device, args)
        encoded, kept, corrupt = (int(n) for n in run(writer, work, args))
        if encoded + kept == 0:
            raise ValueError(f"{images.folder.root} (--data_path): not one of its {len(images)} images can be read")
        if dist.is_main():
            write_json(cache / RECORD, record | {"images": encoded + kept, "corrupt": corrupt, "complete": True})
            stale = sum(1 for _ in cache.rglob("*.npz")) - encoded - kept
            if stale > 0:
                logger.warning("%s holds %d latents of other images than those of %s; training would use them", cache, stale, images.folder.root)
            logger.info("%s is complete: %d images encoded, %d were there, %d corrupt", cache, encoded, kept, corrupt)
    finally:
        if writer is not None:
            writer.close()
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
