"""Stamps of source images: which content a cached latent was made of, (3,) int64: bytes, time in ns, CRC-32."""

import os
import zlib
from pathlib import Path

import numpy as np

BLOCK = 2**20


def crc32_of(path: str | Path) -> int:
    """CRC-32 of a file's content."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def stamp_of(path: str | Path) -> np.ndarray:
    """The stamp of a regular file. OSError if it cannot be read."""
    status = os.stat(path)
    return np.array([status.st_size, status.st_mtime_ns, crc32_of(path)], np.int64)


UNKNOWN = np.zeros(3, np.int64)  # the stamp of an image that nothing was recorded of


def is_stamp(array: np.ndarray, ndim: int) -> bool:
    """Whether an array of a file holds one stamp (3,), or one per image (N, 3) with ndim 2."""
    return array.dtype == np.int64 and array.ndim == ndim and array.shape[-1] == 3


def unchanged(path: str | Path, stamp: np.ndarray) -> bool:
    """Whether a file has the content that the stamp is of: equal size, and equal time or else equal checksum.

    A file that was copied or restored has another time; then it is read. True if nothing is known: UNKNOWN, or the file
    cannot be read.
    """
    size, time_ns, crc = map(int, stamp)
    try:
        status = os.stat(path)
        if not stamp.any() or (status.st_size, status.st_mtime_ns) == (size, time_ns):
            return True
        return status.st_size == size and crc32_of(path) == crc
    except OSError:
        return True
