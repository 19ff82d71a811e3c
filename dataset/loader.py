"""The order of training samples, which does not depend on the number of processes, and the loader of their batches."""

import math
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue

import numpy as np
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from util.options import ArgumentError

Index = int | tuple[int, int]  # a sample's number, or (number, seed of its random draws)


def split_index(index: Index) -> tuple[int, int | None]:
    """(sample number, seed of its draws or None)."""
    return index if isinstance(index, tuple) else (index, None)


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (sample number, seed) for one rank; the global batch of a step is the same for any number of ranks.

    An epoch is a permutation drawn from (seed, epoch). Global batch k is its k-th slice of batch_size * world_size, of
    which rank r takes the r-th part; an incomplete last batch is dropped. A sample's seed depends on (seed, epoch,
    position in the epoch).
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.global_batch = batch_size * world_size
        if batch_size < 1:
            raise ArgumentError("batch_size", f"batch_size must be at least 1, got {batch_size}")
        if num_samples < self.global_batch:
            raise ArgumentError(
                "batch_size",
                f"the data set has {num_samples} samples, fewer than one global batch of {batch_size} x {world_size} "
                "processes; lower batch_size",
            )
        self.num_samples, self.batch_size, self.rank, self.seed = num_samples, batch_size, rank, seed
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and its first batch, which is not 0 where an interrupted run continues."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_samples // self.global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(self.num_samples)
        seeds = np.random.default_rng([self.seed, self.epoch, 1]).integers(2**62, size=self.num_samples)
        for k in range(self.start, len(self)):
            first = k * self.global_batch + self.rank * self.batch_size
            part = slice(first, first + self.batch_size)
            yield list(zip(order[part].tolist(), seeds[part].tolist(), strict=True))


class Batches(Dataset):
    """A data set with `read_batch`, indexed by whole batches: the sampler's list of indices is one index."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, indices: list[Index]) -> tuple[Tensor, Tensor]:
        return self.dataset.read_batch(indices)


def shared_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros; in a loader's process directly in the memory that it shares with its parent, which saves a copy.

    RuntimeError there if that memory is full: it is raised here and not later, by the thread that sends the batch.
    """
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=dtype)
    count = math.prod(shape) * dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(count, device="cpu"), 0, shape)


def send_errors_of_the_queue(_: int) -> None:
    """In a loader's process: if a batch cannot be sent, its error is, so that the parent does not wait for ever.

    Python's queue prints such an error and drops the batch.
    """

    def send(queue: Queue, error: Exception, item: tuple) -> None:
        if not isinstance(item, tuple) or isinstance(item[1], ExceptionWrapper):
            os._exit(1)  # the parent notices that
        where = f"in DataLoader worker process {get_worker_info().id}"
        queue.put((item[0], ExceptionWrapper((type(error), error, error.__traceback__), where)))

    Queue._on_queue_feeder_error = send


OF_THE_SYSTEM = re.compile(
    "DataLoader worker .*(killed|exited)|shared memory|ancdata|Too many open files|Pin memory thread exited|torch_shm|"
    "Bus error|Cannot allocate memory|Resource temporarily unavailable"
)


def loader_error(error: Exception, num_workers: int) -> ArgumentError | None:
    """What to say of an error of a loader with processes if the machine's limits are its reason, else None."""
    signalled = error.__cause__  # which says by which signal a process ended, if that is known
    error = signalled if OF_THE_SYSTEM.search(str(signalled)) else error
    if not isinstance(error, EOFError | ConnectionError) and not OF_THE_SYSTEM.search(str(error)):
        return None
    place = "/dev/shm"
    memory = shutil.disk_usage(place).total / 2**20 if os.path.isdir(place) else 0
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix("RuntimeError: ")
    return ArgumentError(
        "num_workers",
        f"num_workers {num_workers}: a loader process failed ({reason}). Use fewer (0 loads in the main process), more "
        f"shared memory ({place} has {memory:.0f} MiB; docker run --shm-size 8g or --ipc host), more file descriptors "
        f"(ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}) or more memory",
    )


class Loader(DataLoader):
    """A DataLoader whose processes never leave it waiting, and whose errors say which limit was reached."""

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except (RuntimeError, OSError, EOFError) as error:
            if self.num_workers and (limit := loader_error(error, self.num_workers)):
                raise limit from error
            raise


def build_loader(
    dataset: Dataset, sampler: Sampler, num_workers: int, pin_memory: bool, collate: Callable | None = None
) -> Loader:
    """Loader over a batch sampler; its workers live for all epochs. Data sets with `read_batch` collate."""
    batched = hasattr(dataset, "read_batch")
    batches = {"sampler": sampler, "batch_size": None} if batched else {"batch_sampler": sampler}
    return Loader(
        Batches(dataset) if batched else dataset,
        **batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=send_errors_of_the_queue,
    )
