"""What generated images are compared with: reference statistics from a file, a folder or an archive of images, and how to make such a file.

  python -m tools.fid_stats --data_path DIR/train --img_size 64 --out fid_stats/mine_64.npz
  torchrun --nproc_per_node=8 -m tools.fid_stats --data_path images.npz --img_size 256 --crop none --out fid_stats/mine_256.npz

A reference is ADM's .npz (mu, sigma, and mu_s, sigma_s for sFID), an .npz of images (arr_0, uint8 (N, S, S, 3), as ADM's reference batches, which
hold both), a folder with images below it, or a file made here, which also remembers size, crop and Inception weights, and features of up to
--keep_features images: precision, recall and KID need those.

Letters: B images of a batch, N of all, S their side in pixels.
"""

import argparse
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.folders import list_images
from dataset.images import center_crop_adm, read_image
from dataset.loader import build_loader
from evaluation.metrics import FEATURE_DIM, SPATIAL_DIM, FeatureStatistics, InceptionFeatures, file_sha256
from util import dist
from util.cli import add_process_flags, at_least, check_writable, make_parser, parse
from util.files import replacing
from util.log import get_logger, run_cli

logger = get_logger()
CROPS = ("adm", "none")
KEEP_FEATURES = 10_000  # as many images as ADM's reference batches have


@dataclass
class Reference:
    """Statistics of the real images; arrays in float64, features in float32. What the source does not tell is None."""

    mu: np.ndarray  # (2048,)
    sigma: np.ndarray  # (2048, 2048)
    mu_s: np.ndarray | None = None  # (2023,) ADM's spatial features
    sigma_s: np.ndarray | None = None
    features: Tensor | None = None  # (N, 2048) of some of the images, for precision, recall, KID
    img_size: int | None = None
    crop: str | None = None
    num_images: int | None = None
    inception_sha256: str | None = None

    @property
    def pool(self) -> dict[str, np.ndarray]:
        return {"mu": self.mu, "sigma": self.sigma}

    @property
    def spatial(self) -> dict[str, np.ndarray] | None:
        return None if self.mu_s is None else {"mu": self.mu_s, "sigma": self.sigma_s}


# ------------------------------------------------------------------------------------------------------------- images


class UintImages(Dataset):
    """Image files -> uint8 (3, S, S). crop "adm": resized and cropped as for training; "none": they must have the size already."""

    def __init__(self, files: Sequence[Path], img_size: int | None, crop: str):
        self.files, self.img_size, self.crop = files, img_size, crop
        if img_size is None:
            self.img_size = min(read_image(files[0]).size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        image = read_image(self.files[i])
        if self.crop == "adm":
            image = center_crop_adm(image, self.img_size)
        if image.size != (self.img_size, self.img_size):
            raise ValueError(
                f"{self.files[i]} is {image.width} x {image.height} pixels, expected {self.img_size} x {self.img_size} as the others; "
                "mixed sizes need --crop adm"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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


def _read_header(file: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def npz_batches(path: Path, batch_size: int, limit: int) -> Iterator[Tensor]:
    """uint8 (B, 3, S, S) from arr_0, read as a stream: memory is that of a batch. ValueError if the file is cut short."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, _, _ = _read_header(file)
        for first in range(0, limit, batch_size):
            count = min(batch_size, limit - first)
            data = file.read(count * int(np.prod(shape[1:])))
            if len(data) < count * int(np.prod(shape[1:])):
                raise ValueError(f"{path}: arr_0 is cut short after {first} images")
            yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *shape[1:]).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------- making


@torch.no_grad()
def make_reference(
    source: str | Path,
    extractor: InceptionFeatures,
    *,
    img_size: int | None,
    crop: str = "adm",
    num_images: int | None = None,
    keep_features: int = KEEP_FEATURES,
    batch_size: int = 32,
    num_workers: int = 0,
    flag: str = "--data_path",
) -> Reference:
    """Statistics of a folder of images or of an npz with arr_0; every process calls it, each reads its share of the batches.

    The result is the same for any number of processes, on each of them. features: of the first `keep_features` images.
    ValueError or FileNotFoundError naming file and flag for what does not fit.
    """
    source = Path(source)
    if source.is_dir():
        files = list_images(source, flag)[:num_images]
        data = UintImages(files, img_size, crop)
        total, size = len(files), data.img_size
        data[0]  # a wrong size is told before the loader starts
    else:
        shape = npz_shape(source, flag)
        total, size, crop = min(shape[0], num_images or shape[0]), shape[1], "none"
        if img_size is not None and size != img_size:
            raise ValueError(f"{source} ({flag}) holds images of {size} pixels, {img_size} are wanted (--img_size)")
    if total < 2:
        raise ValueError(f"{source} ({flag}) holds {total} image, a covariance needs at least two")
    batches = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]
    mine = batches[dist.rank() :: dist.world_size()]
    if source.is_dir():
        stream = zip(mine, build_loader(data, mine, num_workers, False), strict=True)
    else:
        stream = (
            (batch, images)
            for i, (batch, images) in enumerate(zip(batches, npz_batches(source, batch_size, total), strict=True))
            if i % dist.world_size() == dist.rank()
        )
    pool, spatial, kept = FeatureStatistics(FEATURE_DIM), FeatureStatistics(SPATIAL_DIM), {}
    error = None
    try:
        for done, (batch, images) in enumerate(stream, 1):
            found = extractor(images)
            pool.update(found["2048"])
            spatial.update(found["spatial"])
            if batch[0] < keep_features:
                kept[batch[0]] = found["2048"].cpu()
            if done % 50 == 0 or done == len(mine):
                logger.info("features of %d of %d batches of %s", done, len(mine), source)
    except (ValueError, OSError) as caught:
        error = caught
    dist.agree(error)
    pool.merge(), spatial.merge()
    features = None
    if keep_features:
        everything = {first: part for one in dist.gather_objects(kept) for first, part in one.items()}
        features = torch.cat([everything[first] for first in sorted(everything)])[:keep_features]
    return Reference(pool.mu, pool.sigma, spatial.mu, spatial.sigma, features, size, crop, total, extractor.sha256)


def save_reference(path: str | Path, reference: Reference) -> None:
    """An .npz with ADM's keys and ours."""
    extra = {} if reference.features is None else {"features": reference.features.numpy()}
    with replacing(path, sync=True) as file:
        np.savez(
            file,
            mu=reference.mu,
            sigma=reference.sigma,
            mu_s=reference.mu_s,
            sigma_s=reference.sigma_s,
            img_size=reference.img_size,
            crop=reference.crop,
            num_images=reference.num_images,
            inception_sha256=reference.inception_sha256,
            **extra,
        )


# ------------------------------------------------------------------------------------------------------------- loading


def load_reference_stats(
    path: str | Path, flag: str = "--fid_stats", dim: int = FEATURE_DIM, spatial_dim: int = SPATIAL_DIM
) -> Reference:
    """The statistics in an .npz with mu and sigma; clear errors naming the file. Code in it is never run."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no FID reference statistics at {path} ({flag}); python -m tools.download stats fetches "
            "adm_in256_stats.npz, adm_batch VIRTUAL_imagenet256_labeled.npz; python -m tools.fid_stats makes a file of images of yours"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in ("mu", "sigma") if key not in arrays]
            if missing:
                raise ValueError(f"it has no array {' or '.join(missing)}, only {', '.join(arrays.files[:6])}")
            if ("mu_s" in arrays) != ("sigma_s" in arrays):
                raise ValueError("it has only one of mu_s and sigma_s")
            stats = {
                key: np.asarray(arrays[key], dtype=np.float64)
                for key in ("mu", "sigma", "mu_s", "sigma_s")
                if key in arrays
            }
            features = (
                torch.from_numpy(np.asarray(arrays["features"], dtype=np.float32)) if "features" in arrays else None
            )
            known = {
                key: arrays[key].item()
                for key in ("img_size", "crop", "num_images", "inception_sha256")
                if key in arrays
            }
    except Exception as error:
        raise ValueError(f"{path} ({flag}) is not a file of FID statistics: {error}") from error
    for mu, sigma, size in (("mu", "sigma", dim), ("mu_s", "sigma_s", spatial_dim)):
        if mu in stats and (stats[mu].shape != (size,) or stats[sigma].shape != (size, size)):
            raise ValueError(
                f"{path} ({flag}): {mu} {stats[mu].shape}, {sigma} {stats[sigma].shape}; expected ({size},) and ({size}, {size})"
            )
    if features is not None and (features.ndim != 2 or features.shape[1] != dim):
        raise ValueError(f"{path} ({flag}): features {tuple(features.shape)}, expected (N, {dim})")
    bad = [key for key, value in stats.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"{path} ({flag}): {bad[0]} holds NaN or infinite values")
    return Reference(**stats, features=features, **known)


def load_reference(
    path: str | Path,
    extractor: InceptionFeatures,
    img_size: int,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    flag: str = "--fid_stats",
) -> Reference:
    """The reference for images of this size, from whatever `path` is (see the module); every process calls it.

    ValueError if the file says that it was made from another size, another crop or with other Inception weights.
    """
    path = Path(path)
    made = dict(img_size=img_size, batch_size=batch_size, num_workers=num_workers, flag=flag)
    if path.is_dir():
        return make_reference(path, extractor, **made)
    arrays: set[str] = set()
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy") for name in archive.namelist()}
    if "arr_0" not in arrays:
        reference = load_reference_stats(path, flag)
    elif npz_shape(path, flag)[1] != img_size:
        raise ValueError(
            f"{path} ({flag}) holds images of {npz_shape(path, flag)[1]} pixels, the model makes {img_size}"
        )
    elif "mu" not in arrays:
        return make_reference(path, extractor, **made)
    else:  # ADM's reference batch: statistics of the whole data set, and some images for the rest
        reference = load_reference_stats(path, flag)
        reference.features = make_reference(path, extractor, **made).features
        reference.img_size = img_size
    if reference.img_size not in (None, img_size):
        raise ValueError(
            f"{path} ({flag}) was made from images of {reference.img_size} pixels, the model makes {img_size}: "
            f"make another with python -m tools.fid_stats --img_size {img_size}"
        )
    if reference.img_size is None and "in256" in path.name and img_size != 256:
        raise ValueError(
            f"{path} ({flag}) is of images of 256 pixels, the model makes {img_size}: make another with python -m tools.fid_stats"
        )
    if reference.crop not in (None, *CROPS):
        raise ValueError(f"{path} ({flag}) was made with the crop {reference.crop!r}, which this code does not know")
    if reference.inception_sha256 not in (None, extractor.sha256):
        raise ValueError(
            f"{path} ({flag}) was made with other Inception weights than --inception_weights; make it anew with these"
        )
    if reference.img_size is None:
        logger.info("%s does not say which size its images had: that it is %d is taken on trust", path, img_size)
    return reference


def load_references(
    fid_stats: str | Path, pr_reference: str | Path | None, extractor: InceptionFeatures, img_size: int, **more: int
) -> Reference:
    """The reference of --fid_stats, with the features for precision, recall and KID from --pr_reference where that is
    given.

    Arguments and errors as `load_reference`; ValueError too if --pr_reference holds statistics alone.
    """
    reference = load_reference(fid_stats, extractor, img_size, **more)
    if pr_reference:
        features = load_reference(pr_reference, extractor, img_size, flag="--pr_reference", **more).features
        if features is None:
            raise ValueError(
                f"{pr_reference} (--pr_reference) holds neither images (arr_0) nor features of them; "
                "python -m tools.download adm_batch fetches ADM's reference batch of ImageNet 256"
            )
        reference.features = features
    return reference


# ------------------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The flags of python -m tools.fid_stats."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", required=True, help="folder with images below it, or an npz with arr_0")
    parser.add_argument("--out", required=True, help="the .npz to write")
    parser.add_argument(
        "--img_size", type=int, default=None, help="side of the images; without it that of the first image"
    )
    parser.add_argument(
        "--crop",
        default="adm",
        choices=CROPS,
        help="adm: resize and crop as training does; none: the images have the size already",
    )
    parser.add_argument("--num_images", type=int, default=None, help="the first so many images only")
    parser.add_argument(
        "--keep_features",
        type=int,
        default=KEEP_FEATURES,
        help="features of so many images for precision, recall and KID (8 KiB each)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per process at a time")
    parser.add_argument(
        "--inception_weights", default=None, help="torch-fidelity's Inception weights; default: its download"
    )
    add_process_flags(parser, seed=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make a file of statistics. ValueError or OSError for bad input."""
    args, _ = parse(build_parser(), argv)
    at_least(args, img_size=1, num_images=2, keep_features=0, batch_size=1)
    if not args.out.endswith(".npz"):
        raise ValueError(f"--out {args.out} must end with .npz")
    if not Path(args.data_path).exists():
        raise FileNotFoundError(f"no {args.data_path} (--data_path)")
    if Path(args.data_path).is_file() and not zipfile.is_zipfile(args.data_path):
        raise ValueError(f"{args.data_path} (--data_path) is neither a folder nor an npz of images")
    try:
        device = dist.init(args.device, args.dist_url)
        check_writable(Path(args.out).parent, "--out")
        reference = make_reference(
            args.data_path,
            InceptionFeatures(args.inception_weights, device),
            img_size=args.img_size,
            crop=args.crop,
            num_images=args.num_images,
            keep_features=args.keep_features,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
        )
        if dist.is_main():
            save_reference(args.out, reference)
            logger.info(
                "wrote %s: %d images of %d pixels, sha256 %s",
                args.out,
                reference.num_images,
                reference.img_size,
                file_sha256(args.out),
            )
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
