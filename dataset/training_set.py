"""What a training run reads: images, or cached latents that fit its model and VAE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.classes import misleading_numbers
from dataset.image_folder import BAD_IMAGE_CHOICES, ImageFolderDataset
from dataset.latents import CachedLatents, ShardedLatents, open_cache
from dataset.record import check_classes, check_quantizer, check_record
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util.log import warn_once
from util.options import check_options, option


@dataclass(frozen=True)
class DataOptions:
    """The training data."""

    data_path: str = option("./data/imagenet", "folder with train/<class>/<image>")
    use_cached: bool = option(False, "train from --cached_path (see main_cache.py) instead of images")
    cached_path: str = option("")
    no_flip: bool = option(False, "never mirror images (for digits, text)")
    on_bad_image: str = option("error", choices=BAD_IMAGE_CHOICES)

    def __post_init__(self) -> None:
        check_options(self)


def build_dataset(
    options: DataOptions,
    model: TokenBridge,
    vae: AutoencoderKL,
    img_size: int,
    trained_classes: Sequence[str] | None = None,
) -> ImageFolderDataset | CachedLatents | ShardedLatents:
    """The training set; ValueError or FileNotFoundError if it does not fit the model, the VAE or the earlier training.

    trained_classes: the class list of the checkpoint that is continued.
    """
    if options.use_cached:
        dataset = cached_set(options, model, vae, img_size, trained_classes)
    else:
        root, flip = Path(options.data_path) / "train", not options.no_flip
        dataset = ImageFolderDataset(root, img_size, flip, options.on_bad_image, model.class_num)
        check_classes(options.data_path, dataset.classes, trained_classes, "data_path")
    if warning := misleading_numbers(dataset.classes):
        warn_once("%s", warning)
    if len(dataset.classes) < model.class_num:
        message = "the data has %d classes, class_num is %d: the rest are never trained"
        warn_once(message, len(dataset.classes), model.class_num)
    return dataset


def cached_set(
    options: DataOptions, model: TokenBridge, vae: AutoencoderKL, img_size: int, trained_classes: Sequence[str] | None
) -> CachedLatents | ShardedLatents:
    """The cache of the options, compared with model, VAE and trained classes."""
    cache = options.cached_path
    dataset = open_cache(cache, not options.no_flip, model.class_num)
    record = dataset.record
    check_record(cache, record, fingerprint=vae.latent_fingerprint(), img_size=img_size, classes=trained_classes)
    check_classes(cache, dataset.classes, trained_classes)
    expected = (model.token_dim * (2 if dataset.mode == "moments" else 1), model.grid_size, model.grid_size)
    if tuple(dataset.shape) != expected:
        raise ValueError(
            f"{cache} (cached_path) holds {dataset.mode} of shape {tuple(dataset.shape)}, the model needs {expected} "
            "(cached with another img_size or VAE?)"
        )
    if dataset.mode == "indices":
        check_quantizer(cache, record, vae, model.reconstruction_values.tolist(), model.quant_min, model.quant_max)
    return dataset
