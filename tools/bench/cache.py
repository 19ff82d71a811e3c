"""`python -m tools.bench cache`: an epoch over cached latents, shards against the published tree of .npz files; and the encode loop's wait.

The records are normal noise of the size asked for, the same in every format: what is measured is files, not latents. `cold`: the pages of all
files are dropped from the system's cache first (posix_fadvise), as far as the system lets an ordinary process do that.
"""

import argparse
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.encode import (
    NpzFiles,
    RecordMaker,
    ShardFiles,
    Source,
    convert_moments,
    encode_all,
    encode_images,
    load_crops,
)
from dataset.folders import list_folder
from dataset.latents import open_cache
from dataset.loader import GlobalBatchSampler, build_loader
from dataset.record import RECORD, CacheOptions, describe, read_record
from dataset.shards import RecordSpec, Shard
from models.quantizer import GaussianQuantizer
from models.vae import AutoencoderKL
from tools.bench.counting import print_table
from util.cli import at_least, check_writable
from util.files import write_json
from util.seeds import coin

CLASSES = 10
BATCH = 500  # records made and written together


class NoiseSource(Dataset):
    """Image number -> (number, (2, 2C, h, w) normal noise drawn from the number alone, no problem): stands in for pictures and VAE."""

    def __init__(self, count: int, shape: Sequence[int]):
        self.count, self.shape, self.root, self.classes = (
            count,
            tuple(shape),
            Path("."),
            [f"class{c}" for c in range(CLASSES)],
        )
        self.labels = sorted(i % CLASSES for i in range(count))
        self.paths = [f"{self.classes[label]}/{i:06d}.png" for i, label in enumerate(self.labels)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[int, Tensor, None]:
        return (
            number,
            torch.from_numpy(np.random.default_rng(number).standard_normal((2, *self.shape), dtype=np.float32)),
            None,
        )


def write_cache(folder: Path, source: NoiseSource, kind: str) -> None:
    """One cache of the bench: kind is npz, or mode-dtype of shards such as moments-float16, or indices."""
    folder.mkdir(parents=True, exist_ok=True)
    c, h, w = source.shape
    mode, dtype = ("moments", "float32") if kind == "npz" else (*kind.split("-"), None)[:2]
    form = "npz" if kind == "npz" else "shards"
    options = CacheOptions(format=form, img_size=16 * w, mode=mode, dtype=dtype, batch_size=BATCH, shard_size=1000)
    spec, quantizer = options.spec(c // 2, h), GaussianQuantizer()
    make = RecordMaker(spec, quantizer, lambda z: z)
    files = NpzFiles(folder, source, spec, BATCH) if form == "npz" else ShardFiles(folder, source, spec, BATCH, 1000)
    for name in source.classes if form == "npz" else ():
        (folder / name).mkdir(exist_ok=True)
    record = describe(options, spec, source.classes, source.paths, quantizer if mode == "indices" else None)
    encode_all(files, functools.partial(convert_moments, make=make, device=torch.device("cpu")))
    files.pool.shutdown()
    shards = {} if form == "npz" else {"shards": files.listing()}
    write_json(folder / RECORD, record | {"latent_fingerprint": None, "complete": True} | shards)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD)


def drop_pages(folder: Path) -> None:
    """Ask the system to forget what it holds of a folder's files, after they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class LibrarySlices(Dataset):
    """The same shards through the safetensors library: one slice per sample, no checksum. For comparison."""

    def __init__(self, folder: Path):
        self.parts = [(folder / entry["name"], entry["images"]) for entry in read_record(folder)["shards"]]
        self.open: dict[int, object] = {}
        self.labels = np.concatenate([Shard(path).labels for path, _ in self.parts])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        from safetensors import safe_open

        part, slot = divmod(index[0], self.parts[0][1])
        if part not in self.open:
            self.open[part] = safe_open(self.parts[part][0], "pt").get_slice("moments")
        flipped = int(coin(index[1]))
        # safetensors 0.4.0 takes no numbers
        return self.open[part][slot : slot + 1, flipped : flipped + 1][0, 0], int(self.labels[index[0]])


def epoch(dataset: Dataset, batch_size: int, num_workers: int, seed: int) -> Iterator[Tensor]:
    """All batches of one shuffled epoch, as training reads them."""
    sampler = GlobalBatchSampler(len(dataset), batch_size, 0, 1, seed)
    for values, _ in build_loader(dataset, sampler, num_workers, pin_memory=False):
        yield values


def rate(dataset: Dataset, args: argparse.Namespace, seed: int) -> float:
    """Samples per second of one epoch, the loader's start included."""
    started, samples = time.perf_counter(), 0
    for values in epoch(dataset, args.batch_size, args.num_workers, seed):
        samples += len(values)
    return samples / (time.perf_counter() - started)


def bench_cache(args: argparse.Namespace) -> None:
    """Write every format, read an epoch of each in turn, print samples/s and bytes per image."""
    folder = Path(args.folder or tempfile.mkdtemp(prefix="cache_bench_"))
    source = NoiseSource(args.records, args.shape)
    kinds = {
        "npz tree, float32 (published)": "npz",
        "shards, float32": "moments-float32",
        "shards, float16 (default)": "moments-float16",
        "shards, mean, float16": "mean-float16",
        "shards, indices, 6 bits": "indices",
    }
    try:
        for kind in kinds.values():
            if not (folder / kind / RECORD).exists():
                write_cache(folder / kind, source, kind)
        names = [*kinds, "the float16 shards by safetensors"]
        rates: dict[tuple[str, bool], list[float]] = {}
        for repeat in range(args.repeats):
            for name in names:  # in turn, so that a slow moment hits all of them
                place = folder / kinds.get(name, "moments-float16")
                for cold in (True, False):
                    if cold:
                        drop_pages(place)
                    dataset = open_cache(place) if name in kinds else LibrarySlices(place)
                    rates.setdefault((name, cold), []).append(rate(dataset, args, seed=repeat))
        found = {key: statistics.median(values) for key, values in rates.items()}
        base = {cold: found[names[0], cold] for cold in (True, False)}
        rows = [
            (
                name,
                [
                    f"{found[name, True]:.0f}",
                    f"{found[name, False]:.0f}",
                    f"{found[name, True] / base[True]:.1f}x",
                    f"{found[name, False] / base[False]:.1f}x",
                    f"{size_of(folder / kinds[name]) / args.records:.0f}" if name in kinds else "",
                ],
            )
            for name in names
        ]
        print_table(
            f"One shuffled epoch of {args.records} records {tuple(args.shape)} with their mirror images; {args.num_workers} workers, batches of "
            f"{args.batch_size}; samples/s, median of {args.repeats}",
            ["cold", "warm", "cold ratio", "warm ratio", "bytes/image"],
            rows,
        )
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


def bench_encoding(args: argparse.Namespace) -> None:
    """The encode loop on JPEG files with a small random VAE: images/s, and the share of the time in which the VAE waits for files."""
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="encode_bench_") as folder:
        rng, root = np.random.default_rng(0), Path(folder)
        (root / "data" / "class").mkdir(parents=True)
        for i in range(args.images):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
            coarse.resize((500, 400), Image.Resampling.BICUBIC).save(
                root / "data" / "class" / f"{i:05d}.jpg", quality=90
            )
        torch.manual_seed(0)
        vae = AutoencoderKL(
            embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ch=args.width, norm_groups=8, channel_order=list(range(16))
        ).eval()
        source = Source(list_folder(root / "data"), functools.partial(load_crops, size=256, crops=1, seed=0))
        spec = RecordSpec("moments", "float16", (32, 16, 16), 2)
        files, device = ShardFiles(root, source, spec, 8, 1024), torch.device("cpu")
        encode = functools.partial(encode_images, vae=vae, make=RecordMaker(spec), flips=True, device=device)
        started = time.perf_counter()
        counts = encode_all(files, encode, num_workers=args.num_workers)
        seconds = time.perf_counter() - started
        files.pool.shutdown()
    print_table(
        f"Encoding {args.images} JPEG files of 500 x 400 at 256 px, a random VAE of KL-16's shape, {args.width} wide, on the CPU; "
        f"{args.num_workers} workers",
        ["images/s", "VAE waits"],
        [("", [f"{args.images / seconds:.2f}", f"{counts.waited:.2%}"])],
    )


def bench(args: argparse.Namespace) -> None:
    """Reading, then encoding."""
    bench_cache(args)
    if args.images:
        bench_encoding(args)


def check(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    at_least(args, repeats=1, records=1, batch_size=1, num_workers=0, images=0, width=8)
    if args.width % 8:
        raise ValueError(f"--width must be a multiple of 8, got {args.width}")
    if len(args.shape) != 3 or min(args.shape) < 1 or args.shape[0] % 2:
        raise ValueError(f"--shape takes 2C h w, such as 32 16 16; got {args.shape}")
    if args.records < args.batch_size:
        raise ValueError(f"--records {args.records} is less than one --batch_size, {args.batch_size}")
    if args.folder:
        check_writable(args.folder, "--folder")
    needed, free = (
        5 * 2 * 4 * int(np.prod(args.shape)) * args.records,
        shutil.disk_usage(args.folder or tempfile.gettempdir()).free,
    )
    if needed > free:
        raise ValueError(
            f"--records {args.records} needs up to {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; lower it, or name "
            "another --folder"
        )


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    about = "an epoch over cached latents: shards against a tree of .npz files"
    sub = commands.add_parser(
        "cache",
        help=about,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.set_defaults(function=bench, check=check)
    sub.add_argument("--repeats", type=int, default=3, help="epochs of each; the median counts")
    sub.add_argument("--records", type=int, default=20_000)
    sub.add_argument(
        "--shape", type=int, nargs=3, default=[32, 16, 16], metavar=("2C", "H", "W"), help="of one view's moments"
    )
    sub.add_argument("--batch_size", type=int, default=64)
    sub.add_argument("--num_workers", type=int, default=2)
    sub.add_argument("--images", type=int, default=128, help="image files for the encode loop; 0 leaves it out")
    sub.add_argument("--width", type=int, default=16, help="of its VAE, a multiple of 8; KL-16 has 128")
    sub.add_argument("--folder", default="", help="where the caches are made, and kept; default: a temporary folder")
