"""One .npz per image, the published cache: `moments` and `moments_flip` (docs/spec.md 8), and what this code adds.

Letters: C latent channels, h and w latent grid, V views: 2, or 1 without mirrored images.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.folders import LeftOut, scan
from dataset.source import UNKNOWN, is_stamp
from util.files import plain_reason, replacing

VIEWS = ("moments", "moments_flip")  # of the image, and of its mirror image
SOURCE = "source"  # the image's stamp (dataset/source.py), which published readers ignore


def read_arrays(path: str | Path, names: Sequence[str]) -> list[np.ndarray | None]:
    """The arrays of a file, None for those that it lacks. ValueError, without the path, if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip checksums are verified
            return [arrays.get(name) for name in names]
    except Exception as error:  # zipfile, zlib, numpy and the disk each have their own
        raise ValueError(f"cannot be read ({plain_reason(error)})") from error


def stack_views(
    views: Sequence[np.ndarray | None], names: Sequence[str] = VIEWS, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Arrays called `names`, of any floating type, as (V, 2C, h, w) float32.

    ValueError, without the path, that says why they cannot be used: absent, of another type or shape, NaN.
    """
    for name, view in zip(names, views, strict=True):
        if view is None:
            raise ValueError(f"have no array {name}")
        if view.dtype.kind != "f":
            raise ValueError(f"are {view.dtype}, not floating-point numbers")
        if view.ndim != 3 or shape not in (None, view.shape):
            raise ValueError(f"have shape {view.shape}, expected {shape or '(2C, h, w)'}")
    if len({view.shape for view in views}) > 1:
        raise ValueError(f"have shapes {' and '.join(str(view.shape) for view in views)}")
    with np.errstate(over="ignore"):
        found = np.stack(views).astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("hold NaN or infinite values")
    return found


def read_views(path: str | Path, names: Sequence[str] = VIEWS, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """`stack_views` of a file's arrays."""
    return stack_views(read_arrays(path, names), names, shape)


def has_flip(path: str | Path) -> bool:
    """Whether a file that can be read holds the mirrored image too."""
    try:
        return read_arrays(path, VIEWS[1:])[0] is not None
    except ValueError:
        return True  # reading it says what is wrong


def as_stamp(array: np.ndarray | None) -> np.ndarray:
    """The stamp that a file holds under SOURCE, (3,) int64; UNKNOWN if it has none (published, or earlier)."""
    return array if array is not None and is_stamp(array, 1) else UNKNOWN


def read_stamp(path: str | Path) -> np.ndarray:
    """The stamp of the image that a file was made of; UNKNOWN too if the file cannot be read."""
    try:
        return as_stamp(read_arrays(path, [SOURCE])[0])
    except ValueError:
        return UNKNOWN


def same_stamp(path: str | Path, stamp: np.ndarray) -> bool:
    """Whether a file is of the image with this stamp; True if that is not known."""
    own = read_stamp(path)
    return not own.any() or not stamp.any() or np.array_equal(own, stamp)


def write_views(path: Path, views: np.ndarray, stamp: np.ndarray) -> None:
    """One file with the views (2, 2C, h, w) of the image with this stamp; under a temporary name first."""
    with replacing(path) as file:
        np.savez(file, **dict(zip(VIEWS, views, strict=True)), **{SOURCE: stamp})


def tree_files(cache: Path) -> list[Path]:
    """The .npz files below the class folders that training lists, sorted."""
    folders, _ = scan(cache, (".npz",), LeftOut())
    return [Path(*file) for files in folders.values() for file in files]
