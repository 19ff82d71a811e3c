"""Data sets of images, and an order of samples that no number of processes changes (SPEC 1). Cached latents: dataset/latents.py."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dataset.crop import center_crop_adm
from dataset.images import read_image, to_tensor
from util.log import get_logger

logger = get_logger()
Index = int | tuple[int, int]  # a sample's number, or (number, seed of its random draws)
BAD_IMAGE_CHOICES = ("error", "skip")


def list_folder(root: str | Path, extensions: tuple[str, ...], class_num: int | None, flag: str) -> DatasetFolder:
    """torchvision's listing of root/<class>/<file> with clear errors: absent, empty, or more classes than class_num."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} ({flag}); expected one sub-folder per class in it")
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise FileNotFoundError(f"{root} ({flag}) holds no class folders; expected {root}/<class>/<file>")
    try:
        folder = DatasetFolder(str(root), loader=read_image, extensions=extensions, allow_empty=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} ({flag}): {error}") from error
    if not folder.samples:
        raise FileNotFoundError(
            f"{root} ({flag}) holds class folders but no {'/'.join(e.lstrip('.') for e in extensions)} files"
        )
    if class_num is not None and len(folder.classes) > class_num:
        raise ValueError(f"{root} ({flag}) has {len(folder.classes)} class folders, more than --class_num {class_num}")
    return folder


class BadImages:
    """What to do about unreadable files: raise, or name each once and count it."""

    def __init__(self, policy: str):
        if policy not in BAD_IMAGE_CHOICES:
            raise ValueError(f"--on_bad_image {policy!r} is not one of {', '.join(BAD_IMAGE_CHOICES)}")
        self.skip, self.paths = policy == "skip", set()

    def report(self, error: ValueError, path: str) -> None:
        if not self.skip:
            raise error
        if path not in self.paths:
            self.paths.add(path)
            logger.warning("skipped bad image %d: %s", len(self.paths), error)


class ImageFolderDataset(Dataset):
    """root/<class>/<image> -> (image (3, S, S) float32 in [-1, 1], label), ADM-cropped to S = img_size.

    With index (i, seed) the image is mirrored with p = 0.5 if `flip`; with a bare i it never is. on_bad_image: "error", or "skip", which
    puts the next readable image in its place so that batches keep their size.
    """

    def __init__(
        self,
        root: str | Path,
        img_size: int,
        flip: bool = True,
        on_bad_image: str = "error",
        class_num: int | None = None,
        flag: str = "--data_path",
    ):
        self.folder = list_folder(root, IMG_EXTENSIONS, class_num, flag)
        self.img_size, self.flip, self.bad = img_size, flip, BadImages(on_bad_image)
        self.classes, self.labels, self.samples = self.folder.classes, self.folder.targets, self.folder.samples

    @property
    def bad_images(self) -> int:
        """Unreadable images met so far by this process."""
        return len(self.bad.paths)

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tensor:
        """The cropped image (3, S, S) as it is; ValueError naming the file if it is corrupt."""
        return to_tensor(center_crop_adm(read_image(self.samples[index][0]), self.img_size))

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        number, seed = split_index(index)
        for offset in range(len(self)):
            path, label = self.samples[(number + offset) % len(self)]
            try:
                image = self.load((number + offset) % len(self))
            except ValueError as error:
                self.bad.report(error, path)
                continue
            if self.flip and seed is not None and coin(seed):
                image = image.flip(-1)
            return image, label
        raise ValueError(f"{self.folder.root} (--data_path): not one image can be read")


def mix(seed: int) -> int:
    """64 well-mixed bits of a seed (the finalizer of SplitMix64, Steele et al. 2014): one per sample, so it must cost next to nothing."""
    x = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def coin(seed: int) -> bool:
    """A fair coin that depends on the seed alone."""
    return mix(seed) >> 63 == 1


def pick(seed: int, choices: int) -> int:
    """A number in [0, choices) that depends on the seed alone, and not on its `coin`."""
    return mix(mix(seed)) % choices


def split_index(index: Index) -> tuple[int, int | None]:
    """(sample number, seed of its draws or None)."""
    return index if isinstance(index, tuple) else (index, None)


class Batches(Dataset):
    """A data set with `read_batch` seen batch by batch: the sampler's list of indices is one index."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, indices: list[Index]) -> tuple[Tensor, Tensor]:
        return self.dataset.read_batch(indices)


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (sample number, seed) for one rank; what the job sees together at a step is the same for any number of ranks.

    An epoch is a permutation drawn from (seed, epoch). Global batch k is its k-th slice of batch_size * world_size, of which rank r takes the
    r-th part; the rest that fills no batch is dropped. A sample's seed depends on (seed, epoch, place in the epoch).
    """

    def __init__(
        self, num_samples: int, batch_size: int, rank: int, world_size: int, seed: int, flag: str = "--batch_size"
    ):
        self.global_batch = batch_size * world_size
        if batch_size < 1:
            raise ValueError(f"{flag} must be at least 1, got {batch_size}")
        if num_samples < self.global_batch:
            raise ValueError(
                f"the data set has {num_samples} samples, fewer than one global batch of {batch_size} x {world_size} processes; lower {flag}"
            )
        self.num_samples, self.batch_size, self.rank, self.seed = num_samples, batch_size, rank, seed
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its batches to leave out because an interrupted run has seen them."""
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


def build_loader(dataset: Dataset, sampler: Sampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """DataLoader over a batch sampler; workers stay alive between epochs. A data set with `read_batch` collates by itself."""
    batched = (
        {"batch_sampler": sampler} if not hasattr(dataset, "read_batch") else {"sampler": sampler, "batch_size": None}
    )
    return DataLoader(
        Batches(dataset) if "sampler" in batched else dataset,
        **batched,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
    )
