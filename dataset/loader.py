"""The order of training samples, which does not depend on the number of processes, and the loader of their batches."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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

    def __init__(
        self, num_samples: int, batch_size: int, rank: int, world_size: int, seed: int, flag: str = "--batch_size"
    ):
        self.global_batch = batch_size * world_size
        if batch_size < 1:
            raise ValueError(f"{flag} must be at least 1, got {batch_size}")
        if num_samples < self.global_batch:
            raise ValueError(
                f"the data set has {num_samples} samples, fewer than one global batch of {batch_size} x {world_size} "
                f"processes; lower {flag}"
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


def build_loader(dataset: Dataset, sampler: Sampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """DataLoader over a batch sampler; its workers live for all epochs. Data sets with `read_batch` collate."""
    batched = hasattr(dataset, "read_batch")
    batches = {"sampler": sampler, "batch_size": None} if batched else {"batch_sampler": sampler}
    return DataLoader(
        Batches(dataset) if batched else dataset,
        **batches,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
    )
