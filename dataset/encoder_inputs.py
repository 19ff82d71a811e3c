"""The images, or the latents of another cache, that an encoder reads: from files to stacked batches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.folders import ClassFolders
from dataset.images import center_crop_adm, of_the_machine, random_crop, read_image, to_tensor
from dataset.loader import shared_zeros
from dataset.npz import read_views
from dataset.source import UNKNOWN, stamp_of, unchanged
from util.files import os_reason


class Item(NamedTuple):
    """An image for the encoder, or why there is none."""

    number: int
    data: Tensor | None = None  # None if it is cached already, or cannot be read
    problem: str | None = None  # why it cannot be read
    stamp: np.ndarray = UNKNOWN  # of its file (dataset/source.py)
    changed: bool = False  # since it was cached


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
