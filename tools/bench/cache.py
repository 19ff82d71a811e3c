"""`python -m tools.bench cache`: an epoch over cached latents, shards against .npz files; how long encoding waits.

The records are normal noise of the given shape, the same in every format: files are measured, not latents. `cold`: the
pages of all files are dropped from the system's cache first (posix_fadvise), as far as it allows that.
"""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

import main_cache
from dataset.cache_files import ShardFiles
from dataset.encode import encode_all
from dataset.encoder_inputs import Source, load_crops
from dataset.encoder_outputs import RecordMaker, encode_images
from dataset.folders import list_folder
from dataset.latents import open_cache
from dataset.loader import GlobalBatchSampler, build_loader
from dataset.record import RECORD, read_record
from dataset.shards import RecordSpec, Shard
from models.vae import AutoencoderKL
from tools.bench.counting import print_table
from util.cli import check_writable
from util.options import ArgumentError, check_options, option
from util.seeds import coin

CLASSES = 10
NPZ = "npz tree, float32 (published)"
# Name in the table -> flags of main_cache.py that convert the .npz files to it.
SHARDS = {
    "shards, float32": ["--dtype", "float32"],
    "shards, float16 (default)": [],
    "shards, mean, float16": ["--mode", "mean"],
    "shards, indices, 6 bits": ["--mode", "indices"],
}
LIBRARY = "the float16 shards by safetensors"


@dataclass
class Options:
    """Records to read, image files to encode, and where. ArgumentError for what can be refused before any work."""

    repeats: int = option(3, "epochs of each; the median counts", lowest=1)
    records: int = option(20_000, lowest=1)
    shape: tuple[int, int, int] = option(
        (32, 16, 16), "of one view's moments", nargs=3, metavar=("2C", "H", "W"), lowest=1
    )
    batch_size: int = option(64, lowest=1)
    num_workers: int = option(2, lowest=0)
    images: int = option(128, "image files for the encode loop; 0 leaves it out", lowest=0)
    width: int = option(16, "of its VAE, a multiple of 8; KL-16 has 128", lowest=8)
    folder: str = option("", "where the caches are made, and kept; default: a temporary folder")

    def __post_init__(self) -> None:
        check_options(self)
        if self.width % 8:
            raise ArgumentError("width", f"width must be a multiple of 8, got {self.width}")
        if self.shape[0] % 2:
            raise ArgumentError("shape", f"shape takes 2C h w, such as 32 16 16; got {self.shape}")
        if self.records < self.batch_size:
            raise ArgumentError("records", f"records {self.records} is less than one batch_size, {self.batch_size}")
        if self.folder:
            check_writable(self.folder, "--folder")
        needed = 5 * 2 * 4 * int(np.prod(self.shape)) * self.records / 2**30
        free = shutil.disk_usage(self.folder or tempfile.gettempdir()).free / 2**30
        if needed > free:
            need = f"records {self.records} needs up to {needed:.1f} GiB of disk, {free:.1f} GiB are free"
            raise ArgumentError("records", f"{need}; lower it, or name another --folder")


def write_caches(options: Options, folder: Path) -> dict[str, Path]:
    """Name in the table -> folder of each cache; those that are complete are kept."""
    tree, vae_path, channels = folder / "npz", folder / "vae.pth", options.shape[0] // 2
    if sum(1 for _ in tree.rglob("*.npz")) != options.records:
        for number in range(options.records):
            path = tree / f"class{number * CLASSES // options.records}" / f"{number:06d}.png.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            views = np.random.default_rng(number).standard_normal((2, *options.shape), dtype=np.float32)
            np.savez(path, moments=views[0], moments_flip=views[1])
    if not vae_path.exists():
        shape = dict(ch_mult=(1,), ch=8, num_res_blocks=1, norm_groups=4, channel_order=list(range(channels)))
        vae = AutoencoderKL(embed_dim=channels, **shape)
        torch.save({"model": vae.state_dict(), "config": vae.config}, vae_path)
    found = {NPZ: tree}
    for name, flags in SHARDS.items():
        found[name] = folder / name.replace(",", "").replace(" ", "-")
        process = ["--num_workers", str(options.num_workers), "--device", "cpu", "--batch_size", "500"]
        source = ["--convert", str(tree), str(found[name]), "--vae_path", str(vae_path)]
        main_cache.main([*source, *process, "--shard_size", "1000", *flags])
    return found


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
        part, slot = divmod(index[0], self.parts[0][1])
        if part not in self.open:
            self.open[part] = safe_open(self.parts[part][0], "pt").get_slice("moments")
        view = int(coin(index[1]))
        record = self.open[part][slot : slot + 1, view : view + 1]  # safetensors 0.4.0 takes no numbers
        return record[0, 0], int(self.labels[index[0]])


def rate(dataset: Dataset, options: Options, seed: int) -> float:
    """Samples per second of one shuffled epoch as training reads it, the loader's start included."""
    started = time.perf_counter()
    sampler = GlobalBatchSampler(len(dataset), options.batch_size, 0, 1, seed)
    loader = build_loader(dataset, sampler, options.num_workers, pin_memory=False)
    samples = sum(len(values) for values, _ in loader)
    return samples / (time.perf_counter() - started)


def bench_reading(options: Options, folder: Path) -> None:
    """Write every format, read an epoch of each in turn, print samples/s and bytes per image."""
    caches = write_caches(options, folder)
    names, rates = [*caches, LIBRARY], {}
    for repeat in range(options.repeats):
        for name in names:  # in turn, so that a slow moment affects all of them
            place = caches.get(name, caches["shards, float16 (default)"])
            for cold in (True, False):
                if cold:
                    drop_pages(place)
                dataset = LibrarySlices(place) if name == LIBRARY else open_cache(place)
                rates.setdefault((name, cold), []).append(rate(dataset, options, seed=repeat))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    rows = []
    for name in names:
        speeds = [medians[name, cold] for cold in (True, False)]
        ratios = [medians[name, cold] / medians[NPZ, cold] for cold in (True, False)]
        files = (path for path in caches[name].rglob("*.*") if path.name != RECORD) if name in caches else ()
        size = sum(path.stat().st_size for path in files) / options.records
        rows.append((name, [*(f"{x:.0f}" for x in speeds), *(f"{x:.1f}x" for x in ratios), f"{size:.0f}" * (size > 0)]))
    print_table(
        f"One shuffled epoch of {options.records} records {options.shape} with their mirror images; "
        f"{options.num_workers} workers, batches of {options.batch_size}; samples/s, median of {options.repeats}",
        ["cold", "warm", "cold ratio", "warm ratio", "bytes/image"],
        rows,
    )


def bench_encoding(options: Options, root: Path) -> None:
    """The encode loop on JPEG files with a small random VAE: images/s, and the share of time that the VAE waits."""
    rng = np.random.default_rng(0)
    (root / "data" / "class").mkdir(parents=True)
    for i in range(options.images):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        image = coarse.resize((500, 400), Image.Resampling.BICUBIC)
        image.save(root / "data" / "class" / f"{i:05d}.jpg", quality=90)
    torch.manual_seed(0)
    shape = dict(embed_dim=16, ch_mult=(1, 1, 2, 2, 4), channel_order=list(range(16)))
    vae = AutoencoderKL(ch=options.width, norm_groups=8, **shape).eval()
    source = Source(list_folder(root / "data"), partial(load_crops, size=256, crops=1, seed=0))
    spec, device, workers = RecordSpec("moments", "float16", (32, 16, 16), 2), torch.device("cpu"), options.num_workers
    files = ShardFiles(root, source, spec, 8, 1024)
    encode = partial(encode_images, vae=vae, make=RecordMaker(spec), flips=True, device=device)
    started = time.perf_counter()
    counts = encode_all(files, encode, num_workers=workers)
    seconds = time.perf_counter() - started
    files.pool.shutdown()
    vae_text = f"a random VAE of KL-16's shape, {options.width} wide, on the CPU"
    print_table(
        f"Encoding {options.images} JPEG files of 500 x 400 at 256 px, {vae_text}; {workers} workers",
        ["images/s", "VAE waits"],
        [("", [f"{options.images / seconds:.2f}", f"{counts.waited:.2%}"])],
    )


def run(options: Options) -> None:
    """Reading, then encoding."""
    with tempfile.TemporaryDirectory(prefix="cache_bench_") as temporary:
        bench_reading(options, Path(options.folder or temporary))
        if options.images:
            bench_encoding(options, Path(temporary) / "encoding")
