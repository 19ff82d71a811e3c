"""What reconstruction.py is asked for, and the networks and references that its scores need."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoints import download, transfer
from dataset.image_folder import BAD_IMAGE_CHOICES
from dataset.images import PIXELS
from evaluation.image_metrics import SMALLEST_FOR_LPIPS, SMALLEST_FOR_SSIM, Lpips, find_alexnet_weights
from evaluation.inception import InceptionFeatures, fetch_inception_weights
from evaluation.metrics import Reference
from evaluation.reference import check_published, load_reference
from models.quantizer import MAX_BITS
from models.quantizer_tables import QUANTIZERS
from util import dist
from util.log import get_logger
from util.options import ArgumentError, check_options, option

logger = get_logger()
ADM_STATS = download.PUBLISHED["stats"].target


class ImageCount(int):
    """A number of images, or "all"."""

    def __new__(cls, text: str | int) -> "ImageCount":
        """From the flag's text."""
        return super().__new__(cls, sys.maxsize if text == "all" else text)


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Which images and which quantizers, and what is measured."""

    vae_path: str = option("pretrained_models/vae/kl16.ckpt", 'VAE checkpoint (weights under "model")')
    vae_embed_dim: int | None = option(None, "latent channels, to be checked against the VAE's")
    image_dir: str = option("./data/imagenet/train", "folder with <class>/<image>, or with train/<class>/<image>")
    images_per_class: ImageCount = option(
        50, "the first so many images of each class, or all", lowest=1, highest=sys.maxsize
    )
    num_images: int | None = option(None, "at most so many images in all, spread evenly over the classes", lowest=1)
    img_size: int = option(256, "side of the images, pixels", lowest=SMALLEST_FOR_SSIM, highest=2**14)
    output_dir: str = option("quantization_results", "where results.json and grid.png go")
    bits: tuple[int, ...] = option(
        6, f"bits per latent dimension, 1 to {MAX_BITS}; several make a sweep", nargs="+", lowest=1, highest=MAX_BITS
    )
    range: tuple[float, ...] = option(
        5.0, "the quantizer covers [-range, range]; several make a sweep", nargs="+", above=0, highest=1e4
    )
    quantizer: tuple[str, ...] = option(
        "gaussian",
        "where the levels come from, several to compare: the paper's, equal widths, or fitted to the images' latents",
        nargs="+",
        choices=QUANTIZERS,
    )
    save_images: bool = option(False, "also write every image quantized with the first pair to OUT/images/<class>/")
    mode: bool = option(False, "decode the posterior's mean; default: a sample, as published")
    batch_size: int = option(16, "images per process decoded together", lowest=1)
    precision: str = option("fp32", "of the VAE; the quantizer is float32 always", choices=dist.PRECISIONS)
    inception_weights: str | None = option(None, "torch-fidelity's Inception weights; default: its download folder")
    fid_stats: str | None = option(
        None,
        "also the FID to these images' statistics (see python -m tools.fid_stats), not the originals'; "
        f"default at {download.PUBLISHED_SIZE} px: {ADM_STATS}, fetched if it is missing; none for no such FID",
    )
    no_download: bool = option(False, "fetch no published file that is missing (VAE, statistics, Inception weights)")
    pixels: str | None = option(
        None,
        "how reconstructions become bytes; default: truncate, as the published script, "
        "where published figures stand beside, otherwise round",
        choices=PIXELS,
    )
    lpips_weights: str | None = option(
        None, "torchvision's AlexNet weights, for LPIPS; default: where torch keeps downloads"
    )
    no_rfid: bool = option(False, "no rFID and Inception Score even if the weights are there")
    grid_images: int = option(8, "rows of grid.png, spread evenly over the classes; 0 for no grid", lowest=0)
    on_bad_image: str = option("error", choices=BAD_IMAGE_CHOICES)
    seed: int = 0
    num_workers: int = 0
    pin_mem: bool = False
    fid_stats_given: bool = False  # whether fid_stats is the caller's choice, so that its absence is an error

    def __post_init__(self) -> None:
        check_options(self)
        for name, absent in (("fid_stats", (None, "none")), ("inception_weights", (None, ""))):
            if self.no_rfid and getattr(self, name) not in absent:
                raise ArgumentError(name, f"no_rfid and {name} contradict each other; leave one out")
        if self.lpips_weights and self.img_size < SMALLEST_FOR_LPIPS:
            size = f"LPIPS needs images of at least {SMALLEST_FOR_LPIPS} pixels, img_size is {self.img_size}"
            raise ArgumentError("lpips_weights", size)

    def resolved(self) -> "ReconstructionOptions":
        """With the default reference and pixels filled in, and image_dir/train if that exists.

        ArgumentError if image_dir holds val/ but no train/.
        """
        root, image_dir = Path(self.image_dir), self.image_dir
        if (root / "train").is_dir():
            image_dir = str(root / "train")
            logger.info("%s (--image_dir) holds train/: the images are those of %s", root, image_dir)
        elif (root / "val").is_dir():
            raise ArgumentError("image_dir", f"{root} holds val/, which is no class: give {root / 'val'}")
        given = self.fid_stats not in (None, "none")
        default = ADM_STATS if self.img_size == download.PUBLISHED_SIZE and not self.no_rfid else None
        fid_stats = default if self.fid_stats is None else self.fid_stats if given else None
        options = replace(self, image_dir=image_dir, fid_stats=fid_stats, fid_stats_given=given)
        return replace(options, pixels=self.pixels or ("truncate" if options.beside_published else "round"))

    @property
    def beside_published(self) -> bool:
        """Whether the published figures stand beside ours: those of 256 px, against ADM's statistics."""
        is_adms = self.fid_stats is not None and Path(self.fid_stats).name == Path(ADM_STATS).name
        return is_adms and self.img_size == download.PUBLISHED_SIZE


@dataclass
class Measures:
    """The networks and the reference of the scores, and why some of rfid, fid and lpips are not computed."""

    extractor: InceptionFeatures | None = None
    lpips: Lpips | None = None
    reference: Reference | None = None  # of --fid_stats
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, options: ReconstructionOptions, device: torch.device) -> "Measures":
        """What can be loaded. What was asked for by path and is absent or broken is an error."""
        measures = cls()
        measures._load_extractor(options, device)
        measures._load_lpips(options, device)
        measures._load_reference(options)
        return measures

    def _load_extractor(self, options: ReconstructionOptions, device: torch.device) -> None:
        if options.no_rfid:
            self.missing["rfid"] = "--no_rfid was given"
            return
        try:
            fetch_inception_weights(options.inception_weights, download=not options.no_download)
        except ValueError as error:
            if options.inception_weights or options.fid_stats_given:
                raise
            self.missing["rfid"] = str(error)
        else:
            self.extractor = InceptionFeatures(options.inception_weights, device)

    def _load_lpips(self, options: ReconstructionOptions, device: torch.device) -> None:
        if options.img_size < SMALLEST_FOR_LPIPS:
            self.missing["lpips"] = f"it needs {SMALLEST_FOR_LPIPS} pixels"
            return
        try:
            weights = find_alexnet_weights(options.lpips_weights)
            import lpips  # noqa: F401  (optional)
        except (ArgumentError, ImportError) as error:
            if options.lpips_weights:
                raise ArgumentError("lpips_weights", str(error)) from error
            self.missing["lpips"] = str(error)
        else:
            self.lpips = Lpips(str(weights), device)

    def _load_reference(self, options: ReconstructionOptions) -> None:
        path = options.fid_stats
        if self.extractor is None or path is None:
            self.missing["fid"] = self.missing.get("rfid", "no --fid_stats")
            return
        try:
            download.provide(path, "--fid_stats", options.no_download, check_published)
        except (OSError, ValueError) as error:  # ValueError: another process could not
            if options.fid_stats_given:
                raise
            self.missing["fid"] = str(error)
            return
        self.reference = load_reference(path, self.extractor, options.img_size, batch_size=options.batch_size)
        published = download.PUBLISHED["stats"].git_blob
        if options.beside_published and transfer.file_hash(path, published) != published and dist.is_main():
            other = "has another content than ADM's published file"
            logger.warning("%s (--fid_stats) %s: FID is not comparable with the published figures", path, other)
