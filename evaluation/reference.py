"""References: what generated images are compared with. Making, saving and loading them.

A reference is ADM's .npz (mu, sigma, and mu_s, sigma_s for sFID), an .npz of images (arr_0, uint8 (N, S, S, 3), as
ADM's reference batches, which hold both), a folder with images below it, or a file of python -m tools.fid_stats, which
also records size, crop and Inception weights, and features of some images: precision, recall and KID need those.

Letters: B images of a batch, N of all, S their side in pixels.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from checkpoints.download import PUBLISHED_SIZE
from dataset.folders import spread_evenly
from evaluation.feature_sums import FeatureSums
from evaluation.image_source import CROPS, ImageSource, npz_shape, open_images
from evaluation.inception import FEATURE_DIM, SPATIAL_DIM, InceptionFeatures
from evaluation.metrics import FEWEST_FOR_PRC, Reference
from util import dist
from util.files import plain_reason, replacing
from util.json_reader import check_schema
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()
KEEP_FEATURES = 10_000  # as many images as ADM's reference batches have
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features")
# what a file of ours records of its images
ABOUT = dict(img_size=int, crop=str, num_images=int, inception_sha256=str, num_available=int, selection=str)
SELECTION = "evenly spaced"  # num_images of the num_available images, sorted by class and path, and features of these
TOOL = "python -m tools.fid_stats"


@torch.no_grad()
def make_reference(
    source: str | Path | ImageSource,
    extractor: InceptionFeatures,
    *,
    keep_features: int = KEEP_FEATURES,
    batch_size: int = 32,
    num_workers: int = 0,
    **opening: object,
) -> Reference:
    """Statistics of images; every process calls it and reads its share of batches.

    source, opening: as `open_images`, or its result. The result is the same for any number of processes, on each of
    them. Features are kept of `keep_features` images, evenly spaced, so that each class has its share.
    """
    images = source if isinstance(source, ImageSource) else open_images(source, **opening)
    sums = FeatureSums(FEATURE_DIM, spatial=True, keep=set(spread_evenly(range(images.total), keep_features)))
    (count, stream), error = images.batches(batch_size, num_workers), None
    try:
        for done, (batch, pixels) in enumerate(stream, 1):
            sums.add(batch, extractor(pixels))
            if done % 50 == 0 or done == count:
                logger.info("features of %d of %d batches of %s", done, count, images.path)
    except (ValueError, OSError) as caught:
        error = caught
    dist.agree(error)
    pool, spatial = sums.merge(features_everywhere=True).pool, sums.spatial
    about = (images.size, images.crop, images.total, extractor.sha256, images.available, SELECTION)
    return Reference(pool.mu, pool.sigma, spatial.mu, spatial.sigma, sums.features, *about)


def save_reference(path: str | Path, reference: Reference) -> None:
    """An .npz with ADM's keys and ours."""
    arrays = {key: getattr(reference, key) for key in (*ARRAYS, *ABOUT)}
    arrays = {key: np.asarray(value) for key, value in arrays.items() if value is not None}
    with replacing(path, sync=True) as file:
        np.savez(file, **arrays)


def _read_arrays(path: Path) -> dict[str, object]:
    """Fields of a Reference from an .npz. ValueError, or whatever zipfile and numpy raise, for another content."""
    with np.load(path, allow_pickle=False) as arrays:
        missing = [key for key in ("mu", "sigma") if key not in arrays]
        if missing:
            raise ValueError(f"it has no array {' or '.join(missing)}, only {', '.join(arrays.files[:6])}")
        if ("mu_s" in arrays) != ("sigma_s" in arrays):
            raise ValueError("it has only one of mu_s and sigma_s")
        found = {key: arrays[key] for key in ARRAYS if key in arrays}
        for key, values in found.items():
            if values.dtype.kind not in "fiu":
                raise ValueError(f"{key} holds {values.dtype} instead of real numbers")
            found[key] = values.astype(np.float32 if key == "features" else np.float64)
        if "features" in found:
            found["features"] = torch.from_numpy(found["features"])
        about = {key: arrays[key].item() for key in ABOUT if key in arrays}
        check_schema(about, {f"{key}?": kind for key, kind in ABOUT.items()})
        return found | about


def load_reference_stats(
    path: str | Path, flag: str = "--fid_stats", dim: int = FEATURE_DIM, spatial_dim: int = SPATIAL_DIM
) -> Reference:
    """The statistics in an .npz with mu and sigma; errors name file and flag. Code in it is never run."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no FID reference statistics at {path} ({flag}); python -m tools.download stats fetches "
            f"adm_in256_stats.npz, adm_batch VIRTUAL_imagenet256_labeled.npz; {TOOL} makes a file of your own images"
        )
    try:
        reference = Reference(**_read_arrays(path))
    except Exception as error:
        raise ValueError(f"{path} ({flag}) is not a file of FID statistics: {plain_reason(error)}") from error
    for mu, sigma, size in (("mu", "sigma", dim), ("mu_s", "sigma_s", spatial_dim)):
        mean, covariance = getattr(reference, mu), getattr(reference, sigma)
        if mean is None:
            continue
        if mean.shape != (size,) or covariance.shape != (size, size):
            shapes = f"{mu} {mean.shape}, {sigma} {covariance.shape}"
            raise ValueError(f"{path} ({flag}): {shapes}; expected ({size},) and ({size}, {size})")
    features = reference.features
    if features is not None and (features.ndim != 2 or features.shape[1] != dim):
        raise ValueError(f"{path} ({flag}): features {tuple(features.shape)}, expected (N, {dim})")
    for name in ARRAYS:
        if getattr(reference, name) is not None and not np.isfinite(np.asarray(getattr(reference, name))).all():
            raise ValueError(f"{path} ({flag}): {name} holds NaN or infinite values")
    return reference


def check_published(name: str, path: Path) -> None:
    """ValueError unless the file can be the published one of that name, "stats" or "adm_batch", by its content."""
    reference = load_reference_stats(path, name)
    if name == "adm_batch" and (npz_shape(path, name)[1] != PUBLISHED_SIZE or reference.spatial is None):
        expected = f"expected mu_s, sigma_s and images of {PUBLISHED_SIZE} pixels"
        raise ValueError(f"{path} is not ADM's reference batch: {expected}")


def _check_fits(reference: Reference, path: Path, extractor: InceptionFeatures, img_size: int, flag: str) -> None:
    """ValueError if the file says that it is of another size or crop, or made with other Inception weights."""
    size = reference.img_size or (PUBLISHED_SIZE if "in256" in path.name else None)
    if size not in (None, img_size):
        sizes = f"was made from images of {size} pixels, the model makes {img_size}"
        raise ValueError(f"{path} ({flag}) {sizes}: make another with {TOOL} --img_size {img_size}")
    if reference.crop not in (None, *CROPS):
        raise ValueError(f"{path} ({flag}) was made with the crop {reference.crop!r}, which this code does not know")
    if reference.inception_sha256 not in (None, extractor.sha256):
        message = f"{path} ({flag}) was made with other Inception weights; make it again with these"
        raise ArgumentError("inception_weights", message)
    if reference.img_size is None:
        logger.info("%s does not record the size of its images: %d pixels are assumed", path, img_size)


def load_reference(
    path: str | Path,
    extractor: InceptionFeatures,
    img_size: int,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    flag: str = "--fid_stats",
) -> Reference:
    """The reference for images of this size, whatever of the kinds above `path` is; every process calls it.

    ValueError if the file says that it was made from another size, another crop or with other Inception weights.
    """
    path, arrays = Path(path), set()
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy") for name in archive.namelist()}
    if "arr_0" in arrays and (size := npz_shape(path, flag)[1]) != img_size:
        raise ValueError(f"{path} ({flag}) holds images of {size} pixels, the model makes {img_size}")
    settings = dict(img_size=img_size, batch_size=batch_size, num_workers=num_workers, flag=flag)
    if path.is_dir() or ("arr_0" in arrays and "mu" not in arrays):
        return make_reference(path, extractor, **settings)
    reference = load_reference_stats(path, flag)
    if "arr_0" in arrays:  # ADM's reference batch: statistics of the whole data set, and some of its images
        reference.features = make_reference(path, extractor, **settings).features
        reference.img_size = img_size
    _check_fits(reference, path, extractor, img_size, flag)
    return reference


def load_references(
    fid_stats: str | Path, pr_reference: str | Path | None, extractor: InceptionFeatures, img_size: int, **loading: int
) -> Reference:
    """The reference `fid_stats`, with the features for precision, recall and KID from `pr_reference` where given.

    Arguments and errors as `load_reference`; ValueError too if pr_reference holds statistics alone.
    """
    reference = load_reference(fid_stats, extractor, img_size, **loading)
    if pr_reference:
        other = load_reference(pr_reference, extractor, img_size, flag="--pr_reference", **loading)
        reference.features = other.features
    if reference.features is None or len(reference.features) < FEWEST_FOR_PRC:
        if pr_reference:
            raise ValueError(
                f"{pr_reference} (--pr_reference) holds neither images (arr_0) nor features of them, or fewer than "
                f"{FEWEST_FOR_PRC}; python -m tools.download adm_batch fetches ADM's reference batch of ImageNet 256"
            )
        reference.features = None
    return reference
