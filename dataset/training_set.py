"""What a training run reads: images, or cached latents that fit its model and VAE."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dataset.latents import CachedLatents, ShardedLatents, check_classes, check_quantizer, check_record, open_cache
from dataset.loader import ImageFolderDataset
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util.log import get_logger

logger = get_logger()


def build_dataset(
    args: argparse.Namespace, model: TokenBridge, vae: AutoencoderKL, trained_classes: Sequence[str] | None = None
) -> ImageFolderDataset | CachedLatents | ShardedLatents:
    """The training set of the flags; ValueError or FileNotFoundError if it does not fit the model, the VAE or what was trained before.

    trained_classes: the class list of the checkpoint that is continued.
    """
    if not args.use_cached:
        dataset = ImageFolderDataset(
            Path(args.data_path) / "train", args.img_size, not args.no_flip, args.on_bad_image, model.class_num
        )
        check_classes(args.data_path, dataset.classes, trained_classes, "--data_path")
    else:
        dataset = open_cache(args.cached_path, not args.no_flip, model.class_num)
        check_record(
            args.cached_path,
            dataset.record,
            fingerprint=vae.latent_fingerprint(),
            img_size=args.img_size,
            classes=trained_classes,
        )
        check_classes(args.cached_path, dataset.classes, trained_classes)
        expected = (model.token_dim * (2 if dataset.mode == "moments" else 1), model.grid_size, model.grid_size)
        if tuple(dataset.shape) != expected:
            raise ValueError(
                f"{args.cached_path} (--cached_path) holds {dataset.mode} of shape {tuple(dataset.shape)}, the model needs {expected} "
                "(cached with another --img_size or VAE?)"
            )
        if dataset.mode == "indices":
            check_quantizer(
                args.cached_path, dataset.record, model.reconstruction_values.tolist(), model.quant_min, model.quant_max
            )
    if len(dataset.classes) < model.class_num:
        logger.warning(
            "the data has %d classes, --class_num is %d: the rest are never trained",
            len(dataset.classes),
            model.class_num,
        )
    return dataset
