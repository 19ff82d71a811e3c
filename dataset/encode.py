"""The loop that encodes a data set into a cache of latents, and the two kinds of files that it writes.

The unit of work is a batch: a fixed run of images, which depends neither on the number of processes nor on what is
cached already. Images that are not needed or cannot be read are zeros in the VAE's input, so that each image is encoded
at the same position of the same batch, and the files of an interrupted job equal those of one run, byte for byte.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.folders import ClassFolders
from dataset.images import center_crop_adm, of_the_machine, random_crop, read_image, to_tensor
from dataset.loader import build_loader, shared_zeros
from dataset.npz import SOURCE, VIEWS, as_stamp, read_arrays, read_views, stack_views, write_views
from dataset.shards import RecordSpec, Shard, shard_name, write_shard
from dataset.source import UNKNOWN, stamp_of, unchanged
from models.latent_space import DiagonalGaussian
from models.quantizer import TableQuantizer
from models.vae import AutoencoderKL
from util import dist
from util.files import os_reason
from util.log import first_line, get_logger
from util.seeds import mixed_seed

logger = get_logger()

SYNC_EVERY = 8  # batches between messages among the processes: progress, and whether one of them has failed
LOG_SECONDS = 5  # between progress lines
NPZ_WRITERS = 8  # threads that write .npz files while the next batch is encoded
Encode = Callable[
    [Tensor, Sequence[int]], Tensor
]  # inputs (b, ...), image numbers -> records (b, V, *shape) on the CPU


class Item(NamedTuple):
    """An image for the encoder, or why there is none."""

    number: int
    data: Tensor | None = None  # None if it is cached already, or cannot be read
    problem: str | None = None  # why it cannot be read
    stamp: np.ndarray = UNKNOWN  # of its file (dataset/source.py)
    changed: bool = False  # since it was cached


class Inputs(NamedTuple):
    """A batch of Items, stacked in the loader's process: few large pieces of shared memory instead of many."""

    data: Tensor | None  # (b, ...), zeros where an image is not needed or cannot be read; None if none is needed
    present: np.ndarray  # (b,) bool
    stamps: np.ndarray  # (b, 3)
    problems: dict[int, str]  # image number -> why it cannot be read
    changed: int


def stack_items(items: Sequence[Item]) -> Inputs:
    """The Inputs of a batch."""
    present, data = np.array([item.data is not None for item in items]), None
    if present.any():
        first = next(item.data for item in items if item.data is not None)
        data = shared_zeros((len(items), *first.shape), first.dtype)
        for row, item in zip(data, items, strict=True):
            if item.data is not None:
                row.copy_(item.data)
    problems = {item.number: item.problem for item in items if item.problem is not None}
    stamps, changed = np.stack([item.stamp for item in items]), sum(item.changed for item in items)
    return Inputs(data, present, stamps, problems, changed)


class Source(Dataset):
    """Image number -> Item with what `load(path, number)` returns; ValueError from it means a corrupt file.

    kept(path, file): True if an image need not be read, False if it changed since it was cached. For the files of
    another cache `suffix` is removed from the paths, and the stamps are read from the files (stamp, same).
    """

    def __init__(
        self,
        folder: ClassFolders,
        load: Callable[[str, int], Tensor],
        suffix: str = "",
        stamp: Callable[[str], np.ndarray] = stamp_of,
        same: Callable[[str, np.ndarray], bool] = unchanged,
    ):
        self.stamp, self.same = stamp, same
        self.root, self.classes, self.labels = folder.root, folder.classes, folder.labels
        self.files, self.load = [path for path, _ in folder.samples], load
        self.paths = [path.removesuffix(suffix) for path in folder.paths]
        self.kept: Callable[[str, str], bool | None] = lambda path, file: None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Item:
        file, kept = self.files[number], self.kept(self.paths[number], self.files[number])
        if kept:
            return Item(number)
        try:
            stamp = self.stamp(file)  # before it is decoded: if it changes meanwhile, the next run notices
            return Item(number, self.load(file, number), None, stamp, kept is False)
        except ValueError as error:
            return Item(number, problem=str(error))
        except OSError as error:
            if of_the_machine(error):
                raise
            return Item(number, problem=f"{file} cannot be read ({os_reason(error)}); mend or remove it")


def load_crops(path: str, number: int, *, size: int, crops: int, seed: int) -> Tensor:
    """(crops, 3, S, S) in [-1, 1]: the ADM centre crop, then random crops drawn from (seed, number, crop)."""
    image, images = read_image(path), []
    for crop in range(crops):
        rng = np.random.default_rng([seed, number, crop])
        images.append(random_crop(image, size, rng) if crop else center_crop_adm(image, size))
    return torch.stack([to_tensor(x) for x in images])


def load_moments(path: str, number: int, *, shape: tuple[int, ...], names: Sequence[str]) -> Tensor:
    """(V, 2C, h, w) float32: the views `names` of a file of the published cache."""
    try:
        return torch.from_numpy(read_views(path, names, shape))
    except ValueError as error:
        raise ValueError(f"cached latents {path} (convert) {error}; mend or remove the file") from error


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
                what = f"the VAE's latents of an image are NaN or infinite in {precision} (precision)"
                raise ValueError(f"{what}; use fp32 or bf16 or check the VAE (vae_path)")
            views.append(DiagonalGaussian(moments.float()))
    return make(views, numbers)


@torch.no_grad()
def convert_moments(moments: Tensor, numbers: Sequence[int], *, make: RecordMaker, device: torch.device) -> Tensor:
    """Moments (b, V, 2C, h, w) of the images `numbers` -> records (b, V, *shape)."""
    return make([DiagonalGaussian(view) for view in moments.to(device, non_blocking=True).unbind(1)], numbers)


@dataclass
class Counts:
    """Images encoded, kept from before, corrupt (their numbers) and so on; waited: share of the time without input."""

    encoded: int = 0
    kept: int = 0
    corrupt: set[int] = field(default_factory=set)
    changed: int = 0  # since they were cached: they are encoded again
    unstamped: int = 0  # kept from an earlier version, which did not record their files' size and time
    waited: float = 0.0

    def of_all(self) -> "Counts":
        """The counts of all processes together; `waited` of this one."""
        parts = dist.gather_objects(self)
        corrupt = set().union(*(part.corrupt for part in parts))
        names = ("encoded", "kept", "changed", "unstamped")
        sums = {name: sum(getattr(part, name) for part in parts) for name in names}
        return Counts(**sums, corrupt=corrupt, waited=self.waited)


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

    def discard(self, numbers: Iterable[int]) -> None:
        """Forget what was cached of images that changed and cannot be read any more."""

    def wait(self) -> None:
        """Wait for the writes in progress. OSError if one failed."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()


class NpzFiles(CacheFiles):
    """The published format: cache/<class>/<image file name>.npz for each image, with `moments` and `moments_flip`."""

    def __init__(self, cache: Path, source: Source, spec: RecordSpec, batch_size: int):
        super().__init__(cache, source, spec, batch_size, NPZ_WRITERS)
        source.kept = functools.partial(kept_npz, cache, spec.shape)  # called in the loader's processes

    def plan(self, counts: Counts) -> list[list[int]]:
        """This process's batches: every world-size-th."""
        return self.batches(0, len(self.source))[dist.rank() :: dist.world_size()]

    def discard(self, numbers: Iterable[int]) -> None:
        """As above."""
        for number in numbers:
            (self.cache / f"{self.source.paths[number]}.npz").unlink(missing_ok=True)

    def write(self, numbers: Sequence[int], values: Tensor, present: np.ndarray, stamps: np.ndarray) -> None:
        """Start to write the images that are present (b,); values and stamps of these: (n, 2, 2C, h, w), (n, 3)."""
        self.wait()
        paths = [self.cache / f"{self.source.paths[number]}.npz" for number in np.array(numbers)[present]]
        each = zip(paths, values.float().numpy(), stamps, strict=True)
        self.pending = [self.pool.submit(write_views, *arguments) for arguments in each]


def kept_npz(cache: Path, shape: tuple[int, ...], path: str, file: str) -> bool | None:
    """Whether an image's file is complete: None if there is no such file, False if the image changed since."""
    cached = cache / f"{path}.npz"
    try:
        *views, stamp = read_arrays(cached, (*VIEWS, SOURCE))
        stack_views(views, shape=shape)
    except ValueError:
        return None
    return unchanged(file, as_stamp(stamp))


class ShardFiles(CacheFiles):
    """Shards of `shard_size` consecutive images (dataset/shards.py). Each process writes a share of the missing ones.

    A shard is collected in memory and written when its last batch is there, so that a kill loses the shard in progress.
    """

    def __init__(self, cache: Path, source: Source, spec: RecordSpec, batch_size: int, shard_size: int):
        super().__init__(cache, source, spec, batch_size, 1)
        self.shard_size, self.total = shard_size, -(-len(source) // shard_size)
        self.records: np.ndarray | None = None  # (N, V, nbytes) uint8 of the shard in progress
        self.labels: np.ndarray | None = None  # (N,), -1 where not present
        self.sources: np.ndarray | None = None  # (N, 3) stamps

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
        """This process's batches. A shard with an image that changed, or that can be read only now, is redone."""
        found = [self.finished(shard) for shard in range(self.total)]
        dist.barrier()  # from here on a process may finish a shard
        shards = [number for number, shard in enumerate(found) if shard is None][dist.rank() :: dist.world_size()]
        for number in range(dist.rank(), self.total, dist.world_size()):
            if found[number] is not None and not self.keep(number, found[number], counts):
                shards.append(number)
        return [batch for number in shards for batch in self.batches(self.part(number).start, self.part(number).stop)]

    def keep(self, number: int, shard: Shard, counts: Counts) -> bool:
        """Count the images of a finished shard; True unless one changed, or a corrupt one can be read by now."""
        first, present = self.part(number).start, np.flatnonzero(shard.present).tolist()
        corrupt = [first + slot for slot in np.flatnonzero(~shard.present).tolist()]
        files, stamps = self.source.files[self.part(number)], shard.sources
        changed = sum(not self.source.same(files[slot], stamps[slot]) for slot in present)
        counts.changed += changed
        if changed or any(self.source[image].data is not None for image in corrupt):
            return False
        counts.unstamped += int((~stamps[present].any(1)).sum())
        counts.kept += len(present)
        counts.corrupt.update(corrupt)
        return True

    def bytes_needed(self, plan: Sequence[Sequence[int]]) -> int:
        """Size of the records."""
        return sum(map(len, plan)) * self.spec.views * self.spec.nbytes

    def write(self, numbers: Sequence[int], values: Tensor, present: np.ndarray, stamps: np.ndarray) -> None:
        """Add a batch; values (n, V, *shape) and stamps (n, 3) of the images that are present (b,).

        The shard's last batch starts its writing.
        """
        shard = numbers[0] // self.shard_size
        part = self.part(shard)
        if self.records is None:
            self.records = np.zeros((part.stop - part.start, self.spec.views, self.spec.nbytes), np.uint8)
            self.labels = np.full(part.stop - part.start, -1, np.int32)
            self.sources = np.zeros((part.stop - part.start, 3), np.int64)
        slots = (np.array(numbers) - part.start)[present]
        if len(slots):
            self.records[slots] = self.spec.to_bytes(values)
            self.labels[slots] = np.array(self.source.labels[part])[slots]
            self.sources[slots] = stamps
        if numbers[-1] + 1 == part.stop:
            self.wait()
            contents = self.source.paths[part], self.labels, self.records, self.sources
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
        advice = "free some, choose another folder, or store less (dtype float16, mode mean or indices, no_flip)"
        raise ValueError(f"{cache} (cached_path) has {sizes}; {advice}")


def encode_all(
    files: NpzFiles | ShardFiles, encode: Encode, *, num_workers: int = 0, pin_memory: bool = False
) -> Counts:
    """Encode what is missing; returns the counts of all processes. An error in one stops all at the next message."""
    counts, cache = Counts(), files.cache
    plan = files.plan(counts)
    needed, free = zip(*dist.gather_objects((files.bytes_needed(plan), shutil.disk_usage(cache).free)), strict=True)
    check_room(cache, sum(needed), min(free))
    batches = iter(build_loader(files.source, plan, num_workers, False, stack_items))
    rounds, error, waited = max(dist.gather_objects(len(plan))), None, 0.0
    started = logged = time.perf_counter()
    for k in range(rounds):
        try:
            if error is None and k < len(plan):
                waiting = time.perf_counter()
                inputs = next(batches)
                waited += time.perf_counter() - waiting if k else 0  # the first wait is the loader's start
                encode_batch(files, encode, plan[k], inputs, counts, pin_memory)
            if error is None and k == rounds - 1:
                files.wait()
        except ValueError as problem:
            error = problem
        except OSError as problem:
            advice = "What is finished stays valid; make room or mend the disk, then run the same command again"
            error = OSError(f"{first_line(problem)} in {cache} (cached_path). {advice}")
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
    files: CacheFiles, encode: Encode, numbers: Sequence[int], inputs: Inputs, counts: Counts, pin_memory: bool
) -> None:
    """One batch from its Inputs to the files."""
    for number, problem in inputs.problems.items():
        if number not in counts.corrupt:
            counts.corrupt.add(number)
            logger.warning("corrupt image %d: %s", len(counts.corrupt), problem)
    present, data, encoded = inputs.present, inputs.data, int(inputs.present.sum())
    values = torch.empty(0, files.spec.views, *files.spec.shape)
    if data is not None:  # (b, crops, 3, S, S) or (b, V, 2C, h, w)
        values = encode(data.pin_memory() if pin_memory else data, numbers)[torch.from_numpy(present)]
    files.discard(inputs.problems)
    files.write(numbers, values, present, inputs.stamps[present])
    counts.encoded += encoded
    counts.changed += inputs.changed
    counts.kept += len(numbers) - encoded - len(inputs.problems)
