"""What an evaluation keeps on the disk, batch by batch, so that a killed one continues: features in shards, and the images if they are wanted.

A batch of images is the unit: it is always the same images generated together, whichever process does it, so its features are the same bit for
bit on one process or eight. Its shard is written last, under a temporary name; what has a shard is done.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.images import save_png
from util.files import replacing
from util.log import get_logger

logger = get_logger()
SAVE_IMAGES = ("none", "png", "npz")
SHARD_KEYS = ("2048", "spatial", "logits_unbiased", "near_constant", "saturated")


def batches_of(num_images: int, batch_size: int) -> list[range]:
    """Image numbers cut into batches, the last one shorter."""
    return [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]


class EvalStore:
    """Folder/features/NNNNNN.npz per batch, and Folder/images/NNNNNN.png per image, or Folder/samples.npz.

    save_images: "none", "png", or "npz", the format of ADM's evaluator: arr_0 uint8 (N, S, S, 3), with the labels as arr_1.
    """

    def __init__(self, folder: Path, save_images: str):
        self.folder, self.save_images = folder, save_images

    @property
    def archive(self) -> Path:
        return self.folder / "samples.npz"

    def shard(self, first: int) -> Path:
        return self.folder / "features" / f"{first:06d}.npz"

    def _batch_file(self, first: int) -> Path:
        return self.folder / "images" / f"{first:06d}.npy"

    def picture(self, number: int) -> Path:
        return self.folder / "images" / f"{number:06d}.png"

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor] | None:
        """The shard of a batch; None if the batch is yet to be done, or its shard or images are missing or broken."""
        path = self.shard(numbers[0])
        if not path.is_file() or not self._has_images(numbers):
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {key: torch.from_numpy(arrays[key]) for key in SHARD_KEYS}
            if any(len(value) != len(numbers) for value in found.values()):
                raise ValueError("it holds another number of images")
            return found
        except Exception as error:  # zipfile, zlib, numpy and the disk each have their own
            logger.warning("%s cannot be used (%s): its images are made again", path, error)
            return None

    def _has_images(self, numbers: Sequence[int]) -> bool:
        if self.save_images == "png":
            return all(self.picture(number).is_file() for number in numbers)
        return self.save_images == "none" or self.archive.is_file() or self._batch_file(numbers[0]).is_file()

    def write(self, numbers: Sequence[int], images: Tensor, found: dict[str, Tensor]) -> None:
        """Images (B, 3, S, S) uint8 first, then the shard."""
        if self.save_images == "png":
            for number, image in zip(numbers, images, strict=True):
                save_png(self.picture(number), image)
        elif self.save_images == "npz":
            with replacing(self._batch_file(numbers[0])) as file:
                np.save(file, images.permute(0, 2, 3, 1).cpu().numpy())
        with replacing(self.shard(numbers[0])) as file:
            np.savez(file, **{key: found[key].cpu().numpy() for key in SHARD_KEYS})

    def write_archive(self, labels: Sequence[int], batch_size: int) -> None:
        """samples.npz from the batches' files, streamed: memory is that of a batch. ValueError if some lie on another machine's disk."""
        batches = batches_of(len(labels), batch_size)
        if self.save_images != "npz" or self.archive.is_file():
            return
        lacking = [self._batch_file(b[0]) for b in batches if not self._batch_file(b[0]).is_file()]
        if lacking:
            raise ValueError(
                f"--save_images npz: {lacking[0]} and {len(lacking) - 1} more batches are not on this machine; "
                "with several machines --output_dir must be on a shared disk"
            )
        size = np.load(self._batch_file(0), mmap_mode="r", allow_pickle=False).shape[1]
        with (
            replacing(self.archive) as target,
            zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": (len(labels), size, size, 3)}
                )
                for batch in batches:
                    file.write(np.load(self._batch_file(batch[0]), allow_pickle=False).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, np.asarray(labels, dtype=np.int64))
        for batch in batches:
            self._batch_file(batch[0]).unlink()
        (self.folder / "images").rmdir()


# ------------------------------------------------------------------------------------------------------------- do the images look like images?

NEAR_CONSTANT = 2.0  # grey levels of standard deviation below which an image shows nothing
SATURATED_SHARE = 0.9  # of an image's values at 0 or 255
SUSPICIOUS_SHARE = 0.1  # of the images, before it is worth a warning


def image_flaws(images: Tensor) -> dict[str, Tensor]:
    """uint8 (B, 3, S, S) -> bool (B,) each: "near_constant" (black, grey, one colour) and "saturated" (nearly all values at 0 or 255)."""
    x = images.flatten(1)
    return {
        "near_constant": x.float().std(1, correction=0) < NEAR_CONSTANT,
        "saturated": ((x == 0) | (x == 255)).float().mean(1) > SATURATED_SHARE,
    }
