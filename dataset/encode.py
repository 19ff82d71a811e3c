"""The loop that encodes a data set into a cache of latents, and the two kinds of files that it writes.

The unit of work is a batch: a fixed run of images, which depends neither on the number of processes nor on what is
cached already. Images that are not needed or cannot be read are zeros in the VAE's input, so that each image is encoded
at the same position of the same batch, and the files of an interrupted job equal those of one run, byte for byte.
"""

import functools
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.folders import ClassFolders
from dataset.images import center_crop_adm, random_crop, read_image, to_tensor
from dataset.shards import RecordSpec, Shard, shard_name, write_shard
from models.latent_space import DiagonalGaussian
from models.quantizer import TableQuantizer
from models.vae import AutoencoderKL
from util import dist
from util.files import replacing
from util.log import first_line, get_logger
from util.seeds import mixed_seed

logger = get_logger()

SYNC_EVERY = 8  # batches between messages among the processes: progress, and whether one of them has failed
LOG_SECONDS = 5  # between progress lines
NPZ_WRITERS = 8  # threads that write .npz files while the next batch is encoded
Item = tuple[int, Tensor | None, str | None]  # image number; its input if it is needed; why it cannot be read
Encode = Callable[
    [Tensor, Sequence[int]], Tensor
]  # inputs (b, ...), image numbers -> records (b, V, *shape) on the CPU


class Source(Dataset):
    """Image number -> Item with what `load(path, number)` returns; ValueError from it means a corrupt file.

    suffix is removed from the paths. is_cached(path): whether an image need not be read.
    """

    def __init__(self, folder: ClassFolders, load: Callable[[str, int], Tensor], suffix: str = ""):
        self.root, self.classes, self.labels = folder.root, folder.classes, folder.labels
        self.files, self.load = [path for path, _ in folder.samples], load
        self.paths = [path.removesuffix(suffix) for path in folder.paths]
        self.is_cached: Callable[[str], bool] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Item:
        if self.is_cached is not None and self.is_cached(self.paths[number]):
            return number, None, None
        try:
            return number, self.load(self.files[number], number), None
        except ValueError as error:
            return number, None, str(error)


def load_crops(path: str, number: int, *, size: int, crops: int, seed: int) -> Tensor:
    """(crops, 3, S, S) in [-1, 1]: the ADM centre crop, then random crops drawn from (seed, number, crop)."""
    image, images = read_image(path), []
    for crop in range(crops):
        rng = np.random.default_rng([seed, number, crop])
        images.append(random_crop(image, size, rng) if crop else center_crop_adm(image, size))
    return torch.stack([to_tensor(x) for x in images])


def load_moments(path: str, number: int, *, shape: tuple[int, ...]) -> Tensor:
    """(2, 2C, h, w) float32 moments of a file of the published cache, plain and mirrored."""
    moments = read_moments(path, shape)
    if moments is None:
        what = f"are truncated, damaged, not finite or of another shape than {shape}"
        advice = "mend or remove the file"
        raise ValueError(f"cached latents {path} (--convert) {what}; {advice}")
    return torch.from_numpy(moments)


def read_moments(path: str | Path, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
    """`moments` and `moments_flip` of an .npz, (2, 2C, h, w): float32, finite, of that shape each; else None."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip checksums are verified
            moments = np.stack([arrays["moments"], arrays["moments_flip"]])
    except (OSError, ValueError, KeyError, EOFError, IndexError, TypeError, zipfile.BadZipFile):
        return None
    fits = moments.ndim == 4 and shape in (None, moments.shape[1:])
    return moments if fits and moments.dtype == np.float32 and np.isfinite(moments).all() else None


@dataclass(frozen=True)
class RecordMaker:
    """Posteriors -> what a cache stores of them. Indices need a quantizer and a scale; the noise is drawn from seed."""

    spec: RecordSpec
    quantizer: TableQuantizer | None = None
    scale: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __call__(self, views: Sequence[DiagonalGaussian], numbers: Sequence[int]) -> Tensor:
        """Posteriors of the V views of the images `numbers` -> records (b, V, *shape) on the CPU."""
        return torch.stack([self._record(view, numbers, v) for v, view in enumerate(views)], 1).cpu()

    def _record(self, posterior: DiagonalGaussian, numbers: Sequence[int], view: int) -> Tensor:
        if self.spec.mode == "moments":
            return posterior.parameters
        if self.spec.mode == "mean":
            return posterior.mean
        generators = [torch.Generator().manual_seed(mixed_seed(self.seed, number, view)) for number in numbers]
        noise = torch.stack([torch.randn(self.spec.shape, generator=g) for g in generators])  # (b, C, h, w)
        sample = posterior.sample(noise=noise.to(posterior.mean))
        return self.quantizer.quantize(self.scale(sample)).to(torch.int16)


@torch.no_grad()
def encode_images(
    crops: Tensor,
    numbers: Sequence[int],
    *,
    vae: AutoencoderKL,
    make: RecordMaker,
    flips: bool,
    device: torch.device,
    precision: str = "fp32",
) -> Tensor:
    """Crops (b, crops, 3, S, S) of the images `numbers` -> records (b, V, *shape). ValueError unless finite."""
    views = []
    for crop in crops.to(device, non_blocking=True).unbind(1):
        for images in (crop, crop.flip(-1)) if flips else (crop,):
            with dist.autocast(device, precision):
                moments = vae.encode(images).parameters
            if not torch.isfinite(moments).all():
                what = f"the VAE's latents of an image are NaN or infinite under --precision {precision}"
                raise ValueError(f"{what}; use fp32 or bf16 or check --vae_path")
            views.append(DiagonalGaussian(moments.float()))
    return make(views, numbers)


@torch.no_grad()
def convert_moments(moments: Tensor, numbers: Sequence[int], *, make: RecordMaker, device: torch.device) -> Tensor:
    """Moments (b, V, 2C, h, w) of the images `numbers` -> records (b, V, *shape)."""
    return make([DiagonalGaussian(view) for view in moments.to(device, non_blocking=True).unbind(1)], numbers)


@dataclass
class Counts:
    """Images encoded, kept from before and corrupt (their numbers); waited: share of the time without input."""

    encoded: int = 0
    kept: int = 0
    corrupt: set[int] = field(default_factory=set)
    waited: float = 0.0

    def of_all(self) -> "Counts":
        """The counts of all processes together; `waited` of this one."""
        parts = dist.gather_objects(self)
        corrupt = set().union(*(part.corrupt for part in parts))
        return Counts(sum(part.encoded for part in parts), sum(part.kept for part in parts), corrupt, self.waited)


class CacheFiles:
    """The files of a cache, written by `threads` threads while the next batch is encoded."""

    def __init__(self, cache: Path, source: Source, spec: RecordSpec, batch_size: int, threads: int):
        self.cache, self.source, self.spec, self.batch_size = cache, source, spec, batch_size
        self.pool, self.pending = ThreadPoolExecutor(threads), list[Future]()

    def batches(self, start: int, stop: int) -> list[list[int]]:
        """The image numbers from start to stop in batches."""
        return [list(range(i, min(i + self.batch_size, stop))) for i in range(start, stop, self.batch_size)]

    def bytes_needed(self, plan: Sequence[Sequence[int]]) -> int:
        """Disk space for the plan, as far as it is known."""
        return 0

    def wait(self) -> None:
        """Wait for the writes in progress. OSError if one failed."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()


class NpzFiles(CacheFiles):
    """The published format: cache/<class>/<image file name>.npz for each image, with `moments` and `moments_flip`."""

    def __init__(self, cache: Path, source: Source, spec: RecordSpec, batch_size: int):
        super().__init__(cache, source, spec, batch_size, NPZ_WRITERS)
        source.is_cached = functools.partial(has_moments, cache, spec.shape)  # called in the loader's processes

    def plan(self, counts: Counts) -> list[list[int]]:
        """This process's batches: every world-size-th."""
        return self.batches(0, len(self.source))[dist.rank() :: dist.world_size()]

    def write(self, numbers: Sequence[int], values: Tensor, present: np.ndarray) -> None:
        """Start to write the images that are present (b,); values (number of these, 2, 2C, h, w)."""
        self.wait()
        paths = [self.cache / f"{self.source.paths[number]}.npz" for number in np.array(numbers)[present]]
        pairs = zip(paths, values.float().numpy(), strict=True)
        self.pending = [self.pool.submit(write_moments, path, *arrays) for path, arrays in pairs]


def has_moments(cache: Path, shape: tuple[int, ...], path: str) -> bool:
    """Whether an image's file is complete."""
    return read_moments(cache / f"{path}.npz", shape) is not None


def write_moments(path: Path, moments: np.ndarray, moments_flip: np.ndarray) -> None:
    """One .npz, under a temporary name first."""
    with replacing(path) as file:
        np.savez(file, moments=moments, moments_flip=moments_flip)


class ShardFiles(CacheFiles):
    """Shards of `shard_size` consecutive images (dataset/shards.py). Each process writes a share of the missing ones.

    A shard is collected in memory and written when its last batch is there, so that a kill loses the shard in progress.
    """

    def __init__(self, cache: Path, source: Source, spec: RecordSpec, batch_size: int, shard_size: int):
        super().__init__(cache, source, spec, batch_size, 1)
        self.shard_size, self.total = shard_size, -(-len(source) // shard_size)
        self.records: np.ndarray | None = None  # (N, V, nbytes) uint8 of the shard in progress
        self.labels: np.ndarray | None = None  # (N,), -1 where not present

    def part(self, shard: int) -> slice:
        """The images of a shard."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))

    def finished(self, shard: int) -> Shard | None:
        """The shard if it is complete; a damaged one is logged, and will be replaced."""
        path = self.cache / shard_name(shard)
        try:
            found = Shard(path) if path.exists() else None
        except ValueError as error:
            logger.warning("%s; it is encoded again", str(error).split(". Delete")[0])
            return None
        same = found is not None and found.spec == self.spec and found.paths == self.source.paths[self.part(shard)]
        return found if same else None

    def plan(self, counts: Counts) -> list[list[int]]:
        """This process's batches. A shard with an image that can be read now, but could not before, is redone."""
        found = [self.finished(shard) for shard in range(self.total)]
        dist.barrier()  # from here on a process may finish a shard
        shards = [number for number, shard in enumerate(found) if shard is None][dist.rank() :: dist.world_size()]
        for number in range(dist.rank(), self.total, dist.world_size()):
            if found[number] is not None and not self.keep(number, found[number], counts):
                shards.append(number)
        return [batch for number in shards for batch in self.batches(self.part(number).start, self.part(number).stop)]

    def keep(self, number: int, shard: Shard, counts: Counts) -> bool:
        """Count the images of a finished shard and return True, unless one of the corrupt ones can be read by now."""
        corrupt = [self.part(number).start + slot for slot in np.flatnonzero(~shard.present).tolist()]
        if any(self.source[image][1] is not None for image in corrupt):
            return False
        counts.kept += shard.images - len(corrupt)
        counts.corrupt.update(corrupt)
        return True

    def bytes_needed(self, plan: Sequence[Sequence[int]]) -> int:
        """Size of the records."""
        return sum(map(len, plan)) * self.spec.views * self.spec.nbytes

    def write(self, numbers: Sequence[int], values: Tensor, present: np.ndarray) -> None:
        """Add a batch; values (images that are present (b,), V, *shape). The shard's last batch starts its writing."""
        shard = numbers[0] // self.shard_size
        part = self.part(shard)
        if self.records is None:
            self.records = np.zeros((part.stop - part.start, self.spec.views, self.spec.nbytes), np.uint8)
            self.labels = np.full(part.stop - part.start, -1, np.int32)
        slots = (np.array(numbers) - part.start)[present]
        if len(slots):
            self.records[slots] = self.spec.to_bytes(values)
            self.labels[slots] = np.array(self.source.labels[part])[slots]
        if numbers[-1] + 1 == part.stop:
            self.wait()
            contents = self.source.paths[part], self.labels, self.records
            self.pending = [self.pool.submit(write_shard, self.cache / shard_name(shard), self.spec, *contents)]
            self.records = None

    def listing(self) -> list[dict]:
        """Of all shards, for cache.json: name, readable images, checksum. ValueError if one is absent or damaged."""
        shards = [Shard(self.cache / shard_name(number)) for number in range(self.total)]
        return [{"name": s.path.name, "images": int(s.present.sum()), "sha256": s.sha256} for s in shards]


def check_room(cache: Path, needed: int, free: int) -> None:
    """ValueError if the disk has fewer than `needed` bytes."""
    if needed > free:
        sizes = f"{free / 2**30:.1f} GiB of free disk space, the missing shards need {needed / 2**30:.1f} GiB"
        advice = "free some, choose another folder, or store less (--dtype float16, --mode mean or indices, --no_flip)"
        raise ValueError(f"{cache} (--cached_path) has {sizes}; {advice}")


def encode_all(
    files: NpzFiles | ShardFiles, encode: Encode, *, num_workers: int = 0, pin_memory: bool = False
) -> Counts:
    """Encode what is missing; returns the counts of all processes. An error in one stops all at the next message."""
    counts, cache = Counts(), files.cache
    plan = files.plan(counts)
    needed, free = zip(*dist.gather_objects((files.bytes_needed(plan), shutil.disk_usage(cache).free)), strict=True)
    check_room(cache, sum(needed), min(free))
    settings = {"num_workers": num_workers, "prefetch_factor": 4 if num_workers else None, "collate_fn": list}
    inputs = iter(DataLoader(files.source, batch_sampler=plan, **settings))
    rounds, error, waited = max(dist.gather_objects(len(plan))), None, 0.0
    started = logged = time.perf_counter()
    for k in range(rounds):
        try:
            if error is None and k < len(plan):
                waiting = time.perf_counter()
                items = next(inputs)
                waited += time.perf_counter() - waiting if k else 0  # the first wait is the loader's start
                encode_batch(files, encode, plan[k], items, counts, pin_memory)
            if error is None and k == rounds - 1:
                files.wait()
        except ValueError as problem:
            error = problem
        except OSError as problem:
            advice = "What is finished stays valid; make room or mend the disk, then run the same command again"
            error = OSError(f"{first_line(problem)} ({cache}, --cached_path). {advice}")
        if (k + 1) % SYNC_EVERY == 0 or k == rounds - 1 or dist.world_size() == 1:
            dist.agree(error)
            counts.waited = waited / max(time.perf_counter() - started, 1e-9)
            everything = counts.of_all()
            if k == rounds - 1 or time.perf_counter() - logged >= LOG_SECONDS:
                logged = time.perf_counter()
                log_progress(everything, len(files.source), logged - started)
    return counts.of_all()


def log_progress(counts: Counts, total: int, seconds: float) -> None:
    """A line about the counts of all processes."""
    done = counts.encoded + counts.kept + len(counts.corrupt)
    logger.info(
        "%d/%d images: %d encoded, %d were there, %d corrupt  %.1f images/s  waiting for files %.1f%%  ETA %.0f s",
        *(done, total, counts.encoded, counts.kept, len(counts.corrupt)),
        *(counts.encoded / max(seconds, 1e-9), 100 * counts.waited, seconds * (total - done) / max(counts.encoded, 1)),
    )


def encode_batch(
    files: CacheFiles, encode: Encode, numbers: Sequence[int], items: Sequence[Item], counts: Counts, pin_memory: bool
) -> None:
    """One batch from its Items to the files."""
    inputs = {number: x for number, x, _ in items if x is not None}
    for number, x, problem in items:
        if problem is not None and number not in counts.corrupt:
            counts.corrupt.add(number)
            logger.warning("corrupt image %d: %s", len(counts.corrupt), problem)
        counts.kept += x is None and problem is None
    present = np.array([number in inputs for number in numbers])
    values = torch.empty(0, files.spec.views, *files.spec.shape)
    if inputs:
        blank = torch.zeros_like(next(iter(inputs.values())))
        batch = torch.stack([inputs.get(n, blank) for n in numbers])  # (b, crops, 3, S, S) or (b, V, 2C, h, w)
        values = encode(batch.pin_memory() if pin_memory else batch, numbers)[torch.from_numpy(present)]
    files.write(numbers, values, present)
    counts.encoded += len(inputs)
