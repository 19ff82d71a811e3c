"""The files of a cache while it is filled: which batches are missing, and their records on the disk."""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from dataset.encoder_inputs import Source
from dataset.npz import SOURCE, VIEWS, as_stamp, read_arrays, stack_views, write_views
from dataset.shards import RecordSpec, Shard, shard_name, write_shard
from dataset.source import unchanged
from util import dist
from util.log import get_logger

logger = get_logger()
NPZ_WRITERS = 8  # threads that write .npz files while the next batch is encoded


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
    """The files of a cache, written by `threads` threads while the next batch is encoded.

    A format adds `plan(counts)`, the batches that are missing, and `write`, which starts to write a batch.
    """

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
