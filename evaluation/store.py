"""What an evaluation keeps on the disk, batch by batch, so that a killed one resumes: features, and images if asked.

The unit is a batch of images: the same images are always generated together, whichever process does it, so its features
are equal bit for bit on one process or eight. Its shard is written last, under a temporary name; a batch that has a
shard is done.

Letters: B images of a batch, N of all, S their side in pixels.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.images import save_png
from util.files import plain_reason, replacing
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()
SAVE_IMAGES = ("none", "png", "npz")
NEAR_CONSTANT = 2.0  # grey levels of standard deviation below which an image shows nothing
SATURATED_SHARE = 0.9  # of an image's values at 0 or 255


def batches_of(num_images: int, batch_size: int) -> list[range]:
    """Image numbers in batches, the last one shorter."""
    return [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]


def image_flaws(images: Tensor) -> dict[str, Tensor]:
    """uint8 (B, 3, S, S) -> bool (B,): "near_constant" (one colour), "saturated" (nearly all values at 0 or 255)."""
    x = images.flatten(1)
    return {
        "near_constant": x.float().std(1, correction=0) < NEAR_CONSTANT,
        "saturated": ((x == 0) | (x == 255)).float().mean(1) > SATURATED_SHARE,
    }


class EvalStore:
    """Folder/features/NNNNNN.npz per batch, and Folder/images/NNNNNN.png per image, or Folder/samples.npz.

    A shard holds one array (B, ...) per kind of features, whatever kinds there are. save_images: "none", "png", or
    "npz", the format of ADM's evaluator: arr_0 uint8 (N, S, S, 3), with the labels as arr_1.
    """

    def __init__(self, folder: Path, save_images: str):
        self.folder, self.save_images = folder, save_images
        self.archive = folder / "samples.npz"

    def shard(self, first: int) -> Path:
        """The file with the features of the batch that begins with image number `first`."""
        return self.folder / "features" / f"{first:06d}.npz"

    def picture(self, number: int) -> Path:
        """The PNG of an image."""
        return self.folder / "images" / f"{number:06d}.png"

    def _batch_file(self, first: int) -> Path:
        return self.folder / "images" / f"{first:06d}.npy"

    def read(self, numbers: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor] | None:
        """The arrays of a batch's shard; None if the shard or images are missing or broken, or one of `keys` is."""
        path = self.shard(numbers[0])
        if not path.is_file() or not self._has_images(numbers):
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {key: torch.from_numpy(arrays[key]) for key in keys}
            images = [*found.values()]
            if self.save_images == "npz" and not self.archive.is_file():  # else it is read at the very end
                path = self._batch_file(numbers[0])
                images.append(np.load(path, mmap_mode="r", allow_pickle=False))
            if any(len(value) != len(numbers) for value in images):
                raise ValueError("it holds another number of images")
            return found
        except Exception as error:  # zipfile, zlib, numpy and the disk each have their own
            logger.warning("%s cannot be used (%s): its images are generated again", path, plain_reason(error))
            return None

    def _has_images(self, numbers: Sequence[int]) -> bool:
        if self.save_images == "png":
            pictures = map(self.picture, numbers)
            return all(picture.is_file() and picture.stat().st_size for picture in pictures)
        return self.save_images == "none" or self.archive.is_file() or self._batch_file(numbers[0]).is_file()

    def write(self, numbers: Sequence[int], images: Tensor, found: dict[str, Tensor]) -> None:
        """Images (B, 3, S, S) uint8 first, then the shard."""
        if self.save_images == "png":
            for number, image in zip(numbers, images, strict=True):
                save_png(self.picture(number), image)
        elif self.save_images == "npz" and not self.archive.is_file():
            with replacing(self._batch_file(numbers[0])) as file:
                np.save(file, images.permute(0, 2, 3, 1).cpu().numpy())
        with replacing(self.shard(numbers[0])) as file:
            np.savez(file, **{key: value.cpu().numpy() for key, value in found.items()})

    def write_archive(self, labels: Sequence[int], batch_size: int) -> None:
        """samples.npz from the batches' files, streamed: memory is that of a batch.

        ArgumentError if some of them are on another machine's disk.
        """
        if self.save_images != "npz" or self.archive.is_file():
            return
        files = [self._batch_file(batch[0]) for batch in batches_of(len(labels), batch_size)]
        missing = [file for file in files if not file.is_file()]
        if missing:
            message = f"npz: {missing[0]} and {len(missing) - 1} more batches are not on this machine"
            raise ArgumentError("save_images", f"{message}; with several machines output_dir must be on a shared disk")
        size = np.load(files[0], mmap_mode="r", allow_pickle=False).shape[1]
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), size, size, 3)}
        with replacing(self.archive) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for file in files:
                    array.write(np.load(file, allow_pickle=False).tobytes())
            with archive.open("arr_1.npy", "w") as array:
                np.save(array, np.asarray(labels, dtype=np.int64))
        for file in files:
            file.unlink()
        (self.folder / "images").rmdir()
