"""The images that a reference is made of: a folder's files, or an array in an .npz, read as a stream.

Letters: B images of a batch, N of all, S their side in pixels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.folders import list_folder, spread_evenly
from dataset.images import center_crop_adm, read_image
from dataset.loader import build_loader
from generation.sample import sampled_files
from util import dist
from util.options import ArgumentError

CROPS = ("adm", "none")


def open_images(
    source: str | Path,
    *,
    img_size: int | None,
    crop: str = "adm",
    num_images: int | None = None,
    flag: str = "--data_path",
) -> ImageSource:
    """The images of a folder or of an npz with arr_0; num_images of them are evenly spaced in the sorted list.

    Of a folder that --sample wrote, the images alone, without grid.png. ValueError or FileNotFoundError naming file and
    flag for what does not fit.
    """
    source, data = Path(source), None
    if source.is_dir():
        listed = sampled_files(source, flag)
        if listed is None:
            listed = [
                Path(path) for path, _ in list_folder(source, argument=flag.removeprefix("--"), allow_flat=True).samples
            ]
        available, data = len(listed), ImageFiles(spread_evenly(listed, num_images or len(listed)), img_size, crop)
        total, size = len(data), data.img_size
        data[0]  # a wrong size is reported before the loader starts
    else:
        available, size = npz_shape(source, flag)[:2]
        total, crop = min(available, num_images or available), "none"
        if img_size is not None and size != img_size:
            raise ArgumentError("img_size", f"{source} ({flag}) holds images of {size} pixels, expected {img_size}")
    if total < 2:
        raise ValueError(f"{source} ({flag}) holds {total} image, a covariance needs at least two")
    return ImageSource(source, data, size, crop, total, available)


@dataclass
class ImageSource:
    """Images to make a reference of, checked: a folder's files, or arr_0 of an npz (data None)."""

    path: Path
    data: ImageFiles | None
    size: int
    crop: str
    total: int  # of the `available` images
    available: int

    def batches(self, batch_size: int, num_workers: int) -> tuple[int, Iterator[tuple[range, Tensor]]]:
        """How many batches this process has, and these: image numbers, uint8 (B, 3, S, S)."""
        batches = [range(i, min(i + batch_size, self.total)) for i in range(0, self.total, batch_size)]
        own = batches[dist.rank() :: dist.world_size()]
        if self.data is not None:
            return len(own), zip(own, build_loader(self.data, own, num_workers, False), strict=True)
        numbers = spread_evenly(range(self.available), self.total)
        every = zip(batches, npz_batches(self.path, [numbers[b.start : b.stop] for b in batches]), strict=True)
        return len(own), (pair for i, pair in enumerate(every) if i % dist.world_size() == dist.rank())


class ImageFiles(Dataset):
    """Image files -> uint8 (3, S, S). crop "adm": resized and cropped as for training; "none": they have the size."""

    def __init__(self, files: Sequence[Path], img_size: int | None, crop: str):
        self.files, self.crop = files, crop
        self.img_size = img_size or min(read_image(files[0]).size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        image, size = read_image(self.files[i]), self.img_size
        if self.crop == "adm":
            image = center_crop_adm(image, size)
        if image.size != (size, size):
            sizes = f"{image.width} x {image.height} pixels, expected {size} x {size} as the others"
            raise ValueError(f"{self.files[i]} is {sizes}; mixed sizes need the crop adm")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def npz_shape(path: Path, flag: str) -> tuple[int, ...]:
    """Shape of arr_0. ValueError unless it is uint8 (N, S, S, 3) with N > 0."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _read_header(file)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} ({flag}) holds no array arr_0 of images: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not shape[0] or fortran:
        raise ValueError(f"{path} ({flag}): arr_0 is {dtype} {shape}, expected uint8 images (N, S, S, 3)")
    return shape


def npz_batches(path: Path, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """uint8 (B, 3, S, S) from arr_0 for each batch of image numbers, which increase; read as a stream.

    Memory is that of a batch. ValueError for a truncated file.
    """
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        image_shape = _read_header(file)[0][1:]
        image_bytes = int(np.prod(image_shape))
        position = 0
        for batch in batches:
            data = bytearray()
            for number in batch:
                while position <= number:  # those between are read and dropped
                    image, position = file.read(image_bytes), position + 1
                if len(image) < image_bytes:
                    raise ValueError(f"{path}: arr_0 is truncated after {number} images")
                data += image
            yield torch.frombuffer(data, dtype=torch.uint8).view(len(batch), *image_shape).permute(0, 3, 1, 2)
