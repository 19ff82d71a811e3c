"""One .npz per image, the published cache: `moments` and `moments_flip` (docs/spec.md 8), and what this code adds.

Letters: C latent channels, h and w latent grid, V views: 2, or 1 without mirrored images.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.source import UNKNOWN, is_stamp
from util.files import plain_reason, replacing

VIEWS = ("moments", "moments_flip")  # of the image, and of its mirror image
SOURCE = "source"  # the image's stamp (dataset/source.py), which published readers ignore


def read_views(path: str | Path, names: Sequence[str] = VIEWS, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The arrays `names` of a file, (V, 2C, h, w) float32, from any floating type.

    ValueError, without the path, that says why they cannot be used: absent, damaged, of another type or shape, NaN.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip checksums are verified
            absent = [name for name in names if name not in arrays]
            views = [arrays[name] for name in names if name in arrays]
    except Exception as error:  # zipfile, zlib, numpy and the disk each have their own
        raise ValueError(f"cannot be read ({plain_reason(error)})") from error
    if absent:
        raise ValueError(f"have no array {absent[0]}")
    for view in views:
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


def has_flip(path: str | Path) -> bool:
    """Whether a file that can be read holds the mirrored image too."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return VIEWS[1] in arrays
    except Exception:
        return True  # reading it says what is wrong


def read_stamp(path: str | Path) -> np.ndarray:
    """The stamp of the image that a file was made of, (3,) int64; UNKNOWN if it has none (published, or earlier)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stamp = arrays[SOURCE]
    except Exception:
        return UNKNOWN
    return stamp if is_stamp(stamp, 1) else UNKNOWN


def same_stamp(path: str | Path, stamp: np.ndarray) -> bool:
    """Whether a file is of the image with this stamp; True if that is not known."""
    own = read_stamp(path)
    return not own.any() or not stamp.any() or np.array_equal(own, stamp)


def write_views(path: Path, views: np.ndarray, stamp: np.ndarray) -> None:
    """One file with the views (2, 2C, h, w) of the image with this stamp; under a temporary name first."""
    with replacing(path) as file:
        np.savez(file, **dict(zip(VIEWS, views, strict=True)), **{SOURCE: stamp})
