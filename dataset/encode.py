"""Encoding a data set into a cache of latents: what is still missing, the loop, and the two kinds of files (main_cache.py has the flags).

The unit of work is a batch: a fixed run of images, the same whatever the number of processes and whatever is there already. Images of a batch
that are not needed or cannot be read are zeros in the VAE's input. So each image meets the encoder in the same place of the same batch, and
the files of an interrupted job are byte for byte those of one run.
"""

import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.crop import center_crop_adm, random_crop
from dataset.images import read_image, to_tensor
from dataset.latents import CachedLatents
from dataset.loader import ImageFolderDataset
from dataset.shards import RecordSpec, Shard, ShardWriter, make_layout, shard_name
from models.quantizer import TableQuantizer
from models.vae import DiagonalGaussian, posterior_from_moments
from util import dist
from util.files import replacing
from util.log import get_logger
from util.seeds import mixed_seed

logger = get_logger()

SYNC_EVERY = 8  # batches between messages among the processes: progress, and whether one of them has failed
LOG_SECONDS = 5  # between progress lines
WRITERS = 8  # threads that write .npz files while the next batch is encoded
# image number, its pictures or moments unless there is no need, why it cannot be read
Item = tuple[int, Tensor | None, str | None]


# ------------------------------------------------------------------------------------------------------------- where images come from


class ImageSource(Dataset):
    """Image number -> Item with (crops, 3, S, S) in [-1, 1]: the ADM centre crop, then random crops drawn from (seed, number, crop).

    is_there(number): whether the image's latents are complete, so that it need not be read.
    """

    def __init__(
        self, images: ImageFolderDataset, crops: int, seed: int, is_there: Callable[[int], bool] = lambda number: False
    ):
        self.root, self.samples, self.size = Path(images.folder.root), images.samples, images.img_size
        self.crops, self.seed, self.is_there = crops, seed, is_there
        self.paths = [Path(path).relative_to(self.root).as_posix() for path, _ in self.samples]
        self.labels, self.classes = images.labels, images.classes

    def load(self, number: int) -> Tensor:
        """The image's crops; ValueError naming the file if it is corrupt."""
        image = read_image(self.samples[number][0])
        more = [
            random_crop(image, self.size, np.random.default_rng([self.seed, number, crop]))
            for crop in range(1, self.crops)
        ]
        return torch.stack([to_tensor(crop) for crop in (center_crop_adm(image, self.size), *more)])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Item:
        if self.is_there(number):
            return number, None, None
        try:
            return number, self.load(number), None
        except ValueError as error:
            return number, None, str(error)


class MomentsSource(ImageSource):
    """As ImageSource, from a published cache: Item with the image's (2, 2C, h, w) float32 moments, plain and mirrored (--convert)."""

    def __init__(self, latents: CachedLatents):
        self.root, self.samples = Path(latents.folder.root), latents.samples
        self.paths = [Path(path).relative_to(self.root).as_posix().removesuffix(".npz") for path, _ in self.samples]
        self.labels, self.classes, self.shape = latents.labels, latents.classes, latents.shape
        self.is_there = lambda number: False

    def load(self, number: int) -> Tensor:
        path = self.samples[number][0]
        arrays = read_moments(path)
        if arrays is None or arrays[0].shape != self.shape:
            raise ValueError(
                f"cached latents {path} (--convert) are cut short, damaged, not finite or of another shape than {self.shape}; "
                "mend or remove the file, or pass --on_bad_image skip"
            )
        return torch.from_numpy(np.stack(arrays))


def read_moments(path: str | Path) -> tuple[np.ndarray, np.ndarray] | None:
    """`moments` and `moments_flip` (2C, h, w) of a whole .npz, float32, finite and of one shape; None if it is anything else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip checksums are verified
            found = arrays["moments"], arrays["moments_flip"]
    except (OSError, ValueError, KeyError, EOFError, IndexError, TypeError, zipfile.BadZipFile):
        return None
    good = all(
        a.dtype == np.float32 and a.shape == found[0].shape and a.ndim == 3 and bool(np.isfinite(a).all())
        for a in found
    )
    return found if good else None


# ------------------------------------------------------------------------------------------------------------- from images to records


class Encoder:
    """Pictures (b, crops, 3, S, S), or moments (b, V, 2C, h, w) of a cache that is converted (vae None) -> records (b, V, *shape)."""

    def __init__(
        self,
        vae,
        spec: RecordSpec,
        flips: bool,
        device: torch.device,
        precision: str = "fp32",
        quantizer: TableQuantizer | None = None,  # noqa: ANN001
        scale: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ):
        self.vae, self.spec, self.flips, self.device, self.precision = vae, spec, flips, device, precision
        self.quantizer, self.scale, self.seed = quantizer, scale, seed

    @torch.no_grad()
    def __call__(self, batch: Tensor, numbers: Sequence[int]) -> Tensor:
        batch = batch.to(self.device, non_blocking=True)
        if self.vae is None:
            views = [posterior_from_moments(view) for view in batch.unbind(1)]
        else:
            pictures = [x for crop in batch.unbind(1) for x in ((crop, crop.flip(-1)) if self.flips else (crop,))]
            views = [self.posterior(x) for x in pictures]
        return torch.stack([self.record(view, numbers, v) for v, view in enumerate(views)], 1).cpu()

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images (b, 3, S, S) -> posterior, float32 whatever the arithmetic was."""
        with dist.autocast(self.device, self.precision):
            moments = self.vae.encode(images).parameters
        if not torch.isfinite(moments).all():
            raise ValueError(
                f"the VAE's latents of an image are NaN or infinite under --precision {self.precision}; use fp32 or bf16 or check --vae_path"
            )
        return posterior_from_moments(moments.float())

    def record(self, posterior: DiagonalGaussian, numbers: Sequence[int], view: int) -> Tensor:
        """What is stored of one view: moments (b, 2C, h, w), mean (b, C, h, w), or the indices (b, C, h, w) of one posterior sample."""
        if self.spec.mode == "moments":
            return posterior.parameters
        if self.spec.mode == "mean":
            return posterior.mean
        noise = torch.stack(
            [
                torch.randn(
                    self.spec.shape, generator=torch.Generator("cpu").manual_seed(mixed_seed(self.seed, n, view))
                )
                for n in numbers
            ]
        )
        return self.quantizer.quantize(self.scale(posterior.sample(noise=noise.to(self.device)))).to(torch.int16)


# ------------------------------------------------------------------------------------------------------------- what is missing


@dataclass
class Work:
    """One batch: all its images, and which of them are to be read."""

    numbers: list[int]
    wanted: list[int]
    shard: int = 0
    batch: int = 0


@dataclass
class Counts:
    """Images encoded, kept from before and corrupt (their numbers), by this process."""

    encoded: int = 0
    kept: int = 0
    corrupt: set[int] = field(default_factory=set)
    waited: float = 0.0  # share of the loop's time in which the encoder had nothing to do

    def as_array(self) -> np.ndarray:
        return np.array([self.encoded, self.kept, len(self.corrupt)])


class BackgroundWrites:
    """Writes that go on in `threads` threads while the next batch is encoded."""

    def __init__(self, threads: int):
        self.pool, self.pending = ThreadPoolExecutor(threads), list[Future]()

    def wait(self) -> None:
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()  # OSError if a write failed

    def close(self) -> None:
        self.pool.shutdown()


class NpzFiles(BackgroundWrites):
    """The published format: one .npz for each image, cache/<class>/<image file name>.npz, `moments` and `moments_flip` float32."""

    def __init__(self, cache: Path, source: ImageSource, spec: RecordSpec, batch_size: int):
        self.cache, self.source, self.spec, self.batch_size = cache, source, spec, batch_size
        super().__init__(WRITERS)
        source.is_there = self.is_there  # asked by the loader's processes, as it reads the file

    def target(self, number: int) -> Path:
        path = self.cache / self.source.paths[number]
        return path.with_name(f"{path.name}.npz")

    def is_there(self, number: int) -> bool:
        arrays = read_moments(self.target(number))
        return arrays is not None and arrays[0].shape == self.spec.shape

    def plan(self, counts: Counts) -> list[Work]:
        """This process's batches: every world-size-th."""
        runs = [
            list(range(first, min(first + self.batch_size, len(self.source))))
            for first in range(0, len(self.source), self.batch_size)
        ]
        return [Work(run, run) for run in runs[dist.rank() :: dist.world_size()]]

    def bytes_needed(self) -> int:
        return 0  # what is there is known only when it is read

    def write(self, work: Work, values: Tensor, present: np.ndarray) -> None:
        """Files of the images that are present (b,), written while the next batch is encoded. OSError if a write of the last batch failed."""
        self.wait()
        arrays = values.float().numpy()  # (b, 2, 2C, h, w)
        self.pending = [
            self.pool.submit(write_moments, self.target(n), *arrays[i])
            for i, n in enumerate(work.numbers)
            if present[i]
        ]


def write_moments(path: Path, moments: np.ndarray, moments_flip: np.ndarray) -> None:
    """One .npz, under a temporary name first."""
    with replacing(path) as file:
        np.savez(file, moments=moments, moments_flip=moments_flip)


class ShardFiles(BackgroundWrites):
    """Shards of `shard_size` consecutive images (dataset/shards.py); each process writes every world-size-th of those that are not finished."""

    def __init__(self, cache: Path, source: ImageSource, spec: RecordSpec, batch_size: int, shard_size: int, key: str):
        self.cache, self.source, self.spec, self.batch_size, self.shard_size, self.key = (
            cache,
            source,
            spec,
            batch_size,
            shard_size,
            key,
        )
        self.total = -(-len(source) // shard_size)
        super().__init__(1)  # one thread: a shard's end comes after its batches
        self.writers: dict[int, ShardWriter] = {}

    def numbers(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))

    def writer(self, shard: int) -> ShardWriter:
        part = self.numbers(shard)
        paths, labels = self.source.paths[part.start : part.stop], self.source.labels[part.start : part.stop]
        return ShardWriter(self.cache, shard, make_layout(self.spec, paths), labels, self.batch_size, self.key)

    def finished(self, shard: int) -> Shard | None:
        """The shard if it is whole; one that is damaged is named, and written anew."""
        path = self.cache / shard_name(shard)
        if not path.exists():
            return None
        try:
            found = Shard(path)
        except ValueError as error:
            logger.warning("%s; it is encoded anew", str(error).split(". Delete")[0])
            return None
        part = self.numbers(shard)
        return found if found.spec == self.spec and found.paths == self.source.paths[part.start : part.stop] else None

    def plan(self, counts: Counts) -> list[Work]:
        """Batches of this process that are missing, shard by shard. Images that could not be read before are tried again."""
        found = {shard: self.finished(shard) for shard in range(self.total)}
        dist.barrier()  # from here on a process may finish a shard
        work, mine = [], range(dist.rank(), self.total, dist.world_size())
        for shard in (shard for shard in mine if found[shard] is not None):
            work += self.tried_again(shard, found[shard], counts)
        todo = [shard for shard in range(self.total) if found[shard] is None]
        for shard in todo[dist.rank() :: dist.world_size()]:
            writer = self.writer(shard)
            if writer.journal.exists():
                writer.open()
                for batch in writer.done:
                    labels, first = (
                        writer.labels[writer.slots(batch)],
                        self.numbers(shard).start + writer.slots(batch).start,
                    )
                    counts.kept += int((labels >= 0).sum())
                    counts.corrupt |= {first + slot for slot in np.flatnonzero(labels < 0).tolist()}
            work += self.batches(shard, writer)
        return work

    def tried_again(self, shard: int, found: Shard, counts: Counts) -> list[Work]:
        """The batches of a finished shard with an image that could not be read then and can now; none, as a rule."""
        writer, again = self.writer(shard), set()
        for stale in (writer.partial, writer.journal):
            stale.unlink(missing_ok=True)
        for slot in np.flatnonzero(~found.present).tolist():
            number = self.numbers(shard).start + slot
            if self.source[number][1] is not None:
                again.add(slot // self.batch_size)
            else:
                counts.corrupt.add(number)
        counts.kept += int(found.present.sum()) - sum(int(found.present[writer.slots(batch)].sum()) for batch in again)
        if not again:
            return []
        writer.reopen(found, again)
        return self.batches(shard, writer)

    def batches(self, shard: int, writer: ShardWriter) -> list[Work]:
        self.writers[shard] = writer
        first, missing = self.numbers(shard).start, [b for b in range(writer.num_batches) if b not in writer.done]
        if not missing:
            writer.finish()
        slots = [writer.slots(b) for b in missing]
        numbers = [list(range(first + part.start, first + part.stop)) for part in slots]
        return [Work(n, n, shard, b) for n, b in zip(numbers, missing, strict=True)]

    def bytes_needed(self) -> int:
        """Of the shards that this process has not begun."""
        return sum(
            writer.layout.total_bytes
            for writer in self.writers.values()
            if not writer.partial.exists() and not writer.path.exists()
        )

    def write(self, work: Work, values: Tensor, present: np.ndarray) -> None:
        """The batch's records; after a shard's last batch the shard itself. Done while the next batch is encoded."""
        self.wait()
        values[torch.from_numpy(~present)] = 0
        self.pending = [self.pool.submit(self._write, work, self.spec.to_bytes(values), present)]

    def _write(self, work: Work, records: np.ndarray, present: np.ndarray) -> None:
        writer = self.writers[work.shard]
        if not writer.is_open:
            writer.open()
        writer.write(work.batch, records, present)
        if len(writer.done) == writer.num_batches:
            writer.finish()

    def close(self) -> None:
        super().close()
        for writer in self.writers.values():
            writer.close()

    def listing(self) -> list[dict]:
        """Of all shards, for cache.json: name, images that could be read, checksum. ValueError if one is absent or damaged."""
        shards = [Shard(self.cache / shard_name(number)) for number in range(self.total)]
        return [{"name": s.path.name, "images": int(s.present.sum()), "sha256": s.sha256} for s in shards]


# ------------------------------------------------------------------------------------------------------------- the loop


class Progress:
    """Counts of all processes, and how long this one has waited for its files."""

    def __init__(self, total: int):
        self.total, self.started, self.logged, self.waited = total, time.perf_counter(), time.perf_counter(), 0.0

    def log(self, counts: np.ndarray, last: bool) -> None:
        now = time.perf_counter()
        if now - self.logged < LOG_SECONDS and not last:
            return
        self.logged, seconds = now, max(now - self.started, 1e-9)
        logger.info(
            "%d/%d images: %d encoded, %d were there, %d corrupt  %.1f images/s  waiting for files %.1f%%  ETA %.0f s",
            counts.sum(),
            self.total,
            *counts,
            counts[0] / seconds,
            100 * self.waited / seconds,
            seconds * (self.total - counts.sum()) / max(counts[0], 1),
        )


def encode_all(
    files: NpzFiles | ShardFiles,
    source: ImageSource,
    encoder: Encoder,
    plan: Sequence[Work],
    counts: Counts,
    *,
    num_workers: int,
    pin_memory: bool,
) -> np.ndarray:
    """Work through this process's plan; returns the counts of all processes together (3,). An error in one stops all at the next message."""
    rounds = max(dist.gather_objects(len(plan)))
    progress, batches, error = Progress(len(source)), load(source, plan, num_workers), None
    total = np.sum(dist.gather_objects(counts.as_array()), axis=0)
    for k in range(rounds):
        try:
            if error is None and k < len(plan):
                waiting = time.perf_counter()
                items = next(batches)
                if k:
                    progress.waited += time.perf_counter() - waiting  # the first wait is the loader's start
                encode_batch(files, source, encoder, plan[k], items, counts, pin_memory)
            if error is None and k == rounds - 1:
                files.wait()
        except ValueError as problem:
            error = problem
        except OSError as problem:
            error = OSError(
                f"cannot write to {files.cache} (--cached_path): {problem.strerror or problem}. What is finished stays valid; make room or "
                "mend the disk, then run the same command again"
            )
        if (k + 1) % SYNC_EVERY == 0 or k == rounds - 1 or dist.world_size() == 1:
            dist.agree(error)
            total = np.sum(dist.gather_objects(counts.as_array()), axis=0)
            progress.log(total, k == rounds - 1)
    counts.waited = progress.waited / max(time.perf_counter() - progress.started, 1e-9)
    return total


def load(source: ImageSource, plan: Sequence[Work], num_workers: int) -> Iterator[list[Item]]:
    loader = DataLoader(
        source,
        batch_sampler=[work.wanted for work in plan],
        num_workers=num_workers,
        collate_fn=list,
        prefetch_factor=4 if num_workers else None,
    )
    return iter(loader)


def encode_batch(
    files: NpzFiles | ShardFiles,
    source: ImageSource,
    encoder: Encoder,
    work: Work,
    items: Sequence[Item],
    counts: Counts,
    pin_memory: bool,
) -> None:
    """One batch from its Items to the files."""
    pictures = {number: x for number, x, _ in items if x is not None}
    for number, x, problem in items:
        if problem is not None and number not in counts.corrupt:
            counts.corrupt.add(number)
            logger.warning("corrupt image %d: %s", len(counts.corrupt), problem)
        counts.kept += x is None and problem is None
    present = np.array([number in pictures for number in work.numbers])
    if not pictures:
        if isinstance(files, ShardFiles):
            files.write(work, torch.zeros(len(present), encoder.spec.views, *encoder.spec.shape), present)
        return
    blank = torch.zeros_like(next(iter(pictures.values())))
    batch = torch.stack([pictures.get(number, blank) for number in work.numbers])  # (b, crops, 3, S, S)
    values = encoder(batch.pin_memory() if pin_memory and encoder.device.type == "cuda" else batch, work.numbers)
    files.write(work, values, present)
    counts.encoded += len(pictures)


def check_room(files: NpzFiles | ShardFiles, cache: Path) -> None:
    """ValueError on every process if the disk has not enough room for the shards that are not begun."""
    needed = sum(dist.gather_objects(files.bytes_needed()))
    free, problem = shutil.disk_usage(cache).free, None
    if needed > free:
        problem = ValueError(
            f"{cache} (--cached_path) has {free / 2**30:.1f} GiB of free disk space, the missing shards need {needed / 2**30:.1f} GiB; "
            "free some, choose another folder, or store less (--dtype float16, --mode mean or indices, --no_flip)"
        )
    dist.agree(problem)
