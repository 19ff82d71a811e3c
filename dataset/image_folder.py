"""The data set of a folder's images, and what takes the place of images that cannot be read."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.folders import list_folder
from dataset.images import center_crop_adm, read_image, to_tensor
from dataset.loader import Index, build_loader, split_index
from util.log import get_logger
from util.options import ArgumentError
from util.seeds import coin, mix, pick

logger = get_logger()
BAD_IMAGE_CHOICES = ("error", "skip")


class ImageFolderDataset(Dataset):
    """root/<class>/<image> -> (image (3, S, S) float32 in [-1, 1], label), ADM-cropped to S = img_size.

    With index (i, seed) the image is mirrored with p = 0.5 if `flip`; with a bare i it never is. on_bad_image: "error",
    or "skip", which takes another image instead, so that batches keep their size. It is drawn from the whole set by the
    sample's seed (or, without one, by its number), so that no image has more than its share.
    """

    def __init__(
        self,
        root: str | Path,
        img_size: int,
        flip: bool = True,
        on_bad_image: str = "error",
        class_num: int | None = None,
        argument: str = "data_path",
    ):
        self.folder = list_folder(root, class_num=class_num, argument=argument)
        self.img_size, self.flip, self.bad, self.argument = img_size, flip, BadImages(on_bad_image), argument
        self.classes, self.labels, self.samples = self.folder.classes, self.folder.labels, self.folder.samples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tensor:
        """The cropped image (3, S, S), not mirrored; ValueError naming the file if it is corrupt."""
        return to_tensor(center_crop_adm(read_image(self.samples[index][0]), self.img_size))

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        first, seed = split_index(index)
        others = substitutes(mix(first) if seed is None else seed, len(self))
        for number in chain([first], others):
            path, label = self.samples[number]
            try:
                image = self.load(number)
            except ValueError as error:
                self.bad.report(error, path)
                continue
            mirrored = self.flip and seed is not None and coin(seed)
            return image.flip(-1) if mirrored else image, label
        raise ValueError(f"{self.folder.root} ({self.argument}): none of its images can be read")


def substitutes(seed: int, count: int) -> Iterator[int]:
    """Every number below `count` once, from a start and with a stride that are drawn from the seed."""
    start, stride = pick(seed, count), 1 + pick(mix(seed), count)
    while math.gcd(stride, count) > 1:
        stride += 1
    return ((start + i * stride) % count for i in range(count))


class BadImages:
    """The policy for unreadable images: "error" raises, "skip" logs each file once and counts it."""

    def __init__(self, policy: str):
        if policy not in BAD_IMAGE_CHOICES:
            choices = ", ".join(BAD_IMAGE_CHOICES)
            raise ArgumentError("on_bad_image", f"on_bad_image {policy!r} is not one of {choices}")
        self.skip, self.paths = policy == "skip", set()

    def report(self, error: ValueError, path: str) -> None:
        """Raise the error with the setting that skips it, or log it if the path is new."""
        if not self.skip:
            raise ValueError(f"{error}, or skip such images (on_bad_image)") from error
        if path not in self.paths:
            self.paths.add(path)
            logger.warning("skipped bad image %d: %s", len(self.paths), error)


def readable_images(
    folder: "ImageFolderDataset",
    numbers: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    bad: list[int] | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """The images with these numbers in batches, (B, 3, S, S), and their numbers, each image once, none mirrored.

    A bad image is an error or, with on_bad_image "skip", left out and added to `bad`: another in its place would count
    twice in a measurement. Without a list `bad`, ValueError if not one can be read.
    """
    batches, found = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)], 0
    for images, own, readable in build_loader(NumberedImages(folder), batches, num_workers, pin_memory):
        found += int(readable.sum())
        if bad is not None:
            bad += own[~readable].tolist()
        if readable.any():
            yield images[readable], own[readable].tolist()
    if not found and bad is None:
        raise ValueError(f"{folder.folder.root} ({folder.argument}): none of its images can be read")


class NumberedImages(Dataset):
    """An ImageFolderDataset's images by their number -> (image (3, S, S) in [-1, 1], number, readable)."""

    def __init__(self, folder: "ImageFolderDataset"):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, number: int) -> tuple[Tensor, int, bool]:
        try:
            return self.folder.load(number), number, True
        except ValueError as error:
            self.folder.bad.report(error, self.folder.samples[number][0])
            return torch.zeros(3, self.folder.img_size, self.folder.img_size), number, False
