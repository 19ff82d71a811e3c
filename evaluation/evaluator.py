"""`--evaluate` and `--online_eval`: a model's images against a reference, one or several settings, with records.

Letters: B images of a batch, S their side in pixels.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import download
from dataset.images import from_uint8, to_uint8
from evaluation.feature_sums import IS_SPLITS
from evaluation.image_metrics import psnr
from evaluation.inception import InceptionFeatures, fetch_inception_weights
from evaluation.metrics import FEWEST_FOR_PRC, INFINITY_POINTS, METRICS, Reference
from evaluation.reference import check_published, load_reference_stats, load_references
from evaluation.report import scores_in_words
from evaluation.scores import evaluate
from evaluation.store import SAVE_IMAGES, EvalStore
from generation.pipeline import GenerationSettings, generate_batches
from generation.sample import balanced_labels
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.cli import check_writable
from util.files import append_json, file_sha256, unchanged, write_json
from util.log import get_logger
from util.options import ArgumentError, check_options, option

logger = get_logger()
FEW_IMAGES = 10_000  # with fewer, FID is visibly too high
ROUNDTRIP_PSNR = 15.0  # dB; a VAE that fits its latents gives 25 and more
ROUNDTRIP_STD = (0.25, 4.0)  # of scaled latents, which are made to have 1


@dataclass(frozen=True)
class EvaluationOptions:
    """How many images `--evaluate` generates, what it compares them with, and what it keeps."""

    num_images: int = option(
        50000, "images in all, spread evenly over the classes; with --sample 4 per class", lowest=1, highest=10**7
    )
    eval_bsz: int = option(64, "images per process generated together", lowest=1)
    fid_stats: str = option(
        download.PUBLISHED["stats"].target,
        "the real images: npz of statistics (ADM's, or of python -m tools.fid_stats), npz of images (arr_0), "
        "or a folder of images",
    )
    pr_reference: str | None = option(
        None, "real images for precision, recall and KID, if --fid_stats holds none: an npz or a folder as there"
    )
    inception_weights: str | None = option(None, "torch-fidelity's Inception weights; default: its download")
    no_download: bool = option(
        False, "refuse a published file that is missing (weights, VAE, references, Inception) instead of fetching it"
    )
    save_images: str = option(
        "none", "keep the images of --evaluate; npz is the format of ADM's evaluator", choices=SAVE_IMAGES
    )
    fid_infinity: bool = option(False, "also extrapolate FID to infinitely many images")

    def __post_init__(self) -> None:
        check_options(self)

    def check_enough_images(self) -> None:
        """ArgumentError if there are fewer images than the scores need."""
        fewest, reason = IS_SPLITS, f"the Inception Score needs at least {IS_SPLITS} images, one per split"
        if self.fid_infinity:
            fewest, reason = 2 * INFINITY_POINTS, f"fid_infinity needs at least {2 * INFINITY_POINTS} images"
        if self.num_images < fewest:
            raise ArgumentError("num_images", f"num_images {self.num_images}: {reason}")

    @property
    def requested(self) -> list[str]:
        """Names of the metrics on request whose option, of the same name, is set."""
        return [name for name, metric in METRICS.items() if metric.on_request and getattr(self, name, False)]

    def check_references(self, img_size: int) -> None:
        """Fetch published references and Inception weights that are missing; errors name what is still missing."""
        for name in ("fid_stats", "pr_reference"):
            path = getattr(self, name)
            if path and img_size == download.PUBLISHED_SIZE:
                download.provide(path, f"--{name}", self.no_download, check_published)
            if path and not Path(path).exists():
                load_reference_stats(path, f"--{name}")  # raises, before Inception's weights are asked for
        if self.no_download:
            fetch_inception_weights(self.inception_weights, download=False)

    def describe(self) -> dict[str, object]:
        """What a record says of the references: path and, of a file, hash."""
        record = {"num_images": self.num_images}
        for name in ("fid_stats", "pr_reference"):
            path = getattr(self, name)
            is_file = bool(path) and Path(path).is_file()
            record |= {name: path and str(path), f"{name}_sha256": file_sha256(path) if is_file else None}
        return record


@dataclass
class Evaluator:
    """Scores of a model's images; `Evaluator.prepare` reads what it needs, and refuses what is wrong."""

    options: EvaluationOptions
    settings: GenerationSettings
    device: torch.device
    features: InceptionFeatures
    reference: Reference
    output: Path
    inputs: dict[str, object]  # what the scores depend on besides the sampler's settings
    about: dict[str, object] = field(default_factory=dict)  # further entries of each record

    @classmethod
    def prepare(
        cls,
        options: EvaluationOptions,
        settings: GenerationSettings,
        device: torch.device,
        output_dir: str | Path,
        *,
        img_size: int,
        num_workers: int = 0,
        **about: object,
    ) -> "Evaluator":
        """Read the Inception weights and the references; every process calls it. ValueError or OSError for bad ones.

        about: further entries of each record, such as the model's name, vae_path, and class_names of the data.
        """
        options.check_enough_images()
        options.check_references(img_size)
        features = InceptionFeatures(options.inception_weights, device)
        loading = dict(batch_size=options.eval_bsz, num_workers=num_workers)
        with unchanged(options.fid_stats, options.pr_reference):
            inputs = options.describe() | {"inception_sha256": features.sha256}
            reference = load_references(options.fid_stats, options.pr_reference, features, img_size, **loading)
        dist.check_same(inputs, f"{options.fid_stats} (--fid_stats), --pr_reference or the Inception weights")
        output = check_writable(output_dir, "--output_dir")
        if dist.is_main():
            log_limits(options, reference, img_size)
        return cls(options, settings, device, features, reference, output, inputs, about)

    def __call__(
        self,
        model: TokenBridge,
        vae: AutoencoderKL,
        *,
        settings: GenerationSettings | None = None,
        store: EvalStore | None = None,
        **about: object,
    ) -> dict | None:
        """Scores of one setting, logged and appended to OUT/eval.jsonl with everything they depend on.

        Rank 0 returns that record, the others None.
        """
        settings, started = settings or self.settings, time.perf_counter()
        classes = self.trained_classes(model)
        labels = balanced_labels(self.options.num_images, range(classes))
        logger.info("%d images: %s", len(labels), spread_of_labels(labels, classes))
        if classes < model.class_num:
            unseen = "the model has %d classes, but was trained on the first %d only: images are of these"
            logger.warning(unseen, model.class_num, classes)
        make_images = ImageMaker(model, vae, labels, settings, self.device)
        more = dict(store=store, requested=self.options.requested, device=self.device)
        scores = evaluate(make_images, labels, settings.batch_size, self.features, self.reference, **more)
        if scores is None:
            return None
        record = scores | {"vae_roundtrip": make_images.roundtrip} | plain(settings) | self.inputs | self.about | about
        record |= model_record(model, self.device) | {"classes": classes}
        record |= {"seconds": time.perf_counter() - started, "time": time.time()}
        append_json(self.output / "eval.jsonl", record)
        pair = (settings.cfg, settings.temperature, settings.num_iter)
        logger.info("cfg %g, temperature %g, %d iterations: %s", *pair, scores_in_words(record))
        return record

    def trained_classes(self, model: TokenBridge) -> int:
        """How many classes of the model it was trained on, from the first on; all where their names are not known."""
        return min(len(self.about.get("class_names") or ()) or model.class_num, model.class_num)

    def during_training(
        self, pairs: Sequence[tuple[float, float]], model: TokenBridge, vae: AutoencoderKL, step: int
    ) -> None:
        """--online_eval: score the averaged model at each of `online_pairs(pairs)`; one line of eval.jsonl each."""
        for cfg, temperature in online_pairs(pairs):
            settings = replace(self.settings, cfg=cfg, temperature=temperature)
            self(model, vae, settings=settings, step=step, weights="ema")

    def store(self, model: TokenBridge, settings: GenerationSettings, about: dict[str, object]) -> EvalStore:
        """Where the features (and images) of one setting are kept: OUT/eval/cfg..., with settings.json in it.

        The name follows from all that images and features depend on. about: hashes of the weights, the VAE's config.
        """
        key = plain(settings) | self.inputs | about
        key |= {"device": self.device.type, "tf32": dist.allows_tf32(self.device)}
        key |= {"model_config": model.config.to_dict(), "classes": self.trained_classes(model)}
        for name in ("checkpoint", "fid_stats", "fid_stats_sha256", "pr_reference", "pr_reference_sha256"):
            key.pop(name, None)  # neither the references nor the file's place
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        pair = (settings.cfg, settings.temperature)
        folder = self.output / "eval" / "cfg{:g}-t{:g}-{}".format(*pair, digest)
        if dist.is_main():
            write_json(folder / "settings.json", key)
        kept = "features" if self.options.save_images == "none" else "features and images"
        logger.info("cfg %g, temperature %g: %s in %s", *pair, kept, folder)
        return EvalStore(folder, self.options.save_images)


def log_limits(options: EvaluationOptions, reference: Reference, img_size: int) -> None:
    """What the reference does not allow, and which numbers of images make FID too high."""
    if reference.features is None:
        published = img_size == download.PUBLISHED_SIZE
        hint = download.PRECISION_RECALL_HINT if published else "they need images or features (--pr_reference)"
        few = (reference.num_images or FEWEST_FOR_PRC) < FEWEST_FOR_PRC
        held = f"fewer than {FEWEST_FOR_PRC} images" if few else "statistics alone"
        message = "%s (--fid_stats) holds %s, so precision, recall and KID are not computed: %s"
        logger.info(message, options.fid_stats, held, hint)
    if options.num_images < FEW_IMAGES:
        logger.warning(
            "%d images make FID too high: compare with runs of as many only, or add --fid_infinity; "
            "published numbers use 50,000",
            options.num_images,
        )
    if (reference.num_images or FEW_IMAGES) < FEW_IMAGES:
        logger.warning(
            "%s (--fid_stats) is of %d images only, which makes FID too high too: compare with scores against the "
            "same file only; published references are of 50,000 images and more",
            *(options.fid_stats, reference.num_images),
        )


def spread_of_labels(labels: Sequence[int], class_num: int) -> str:
    """In words, how many images each class gets."""
    each, rest = divmod(len(labels), class_num)
    if not rest:
        return f"{each} of each of {class_num} classes"
    if not each:
        return f"one of each of the first {rest} of {class_num} classes, none of the others"
    return f"{each} of each of {class_num} classes and one more of each of the first {rest}"


def online_pairs(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (guidance scale, temperature) pairs of --online_eval: first cfg 1, then every cfg that is neither 1 nor 0."""
    temperatures = dict.fromkeys(temperature for _, temperature in pairs)
    return [(1.0, temperature) for temperature in temperatures] + [pair for pair in pairs if pair[0] not in (0, 1)]


def plain(settings: GenerationSettings) -> dict[str, object]:
    """The settings for a record; the arithmetic's precision under another name, since a score has that one."""
    record = asdict(settings)
    return record | {"arithmetic": record.pop("precision")}


def model_record(model: TokenBridge, device: torch.device) -> dict[str, object]:
    """What a record says of the model and of where it ran."""
    return {
        "img_size": model.config.img_size,
        "model_config": model.config.to_dict(),
        "head_start": model.head_start,
        "class_num": model.class_num,
        "quant_bits": model.config.quant_levels.bit_length() - 1,
        "quant_min": model.quant_min,
        "quant_max": model.quant_max,
        "world_size": dist.world_size(),
        "device": str(device),
        "tf32": dist.allows_tf32(device),
        "torch": torch.__version__,
    }


class ImageMaker:
    """Generates the images of a batch of numbers; `roundtrip` is the VAE's check on the first of them."""

    def __init__(
        self,
        model: TokenBridge,
        vae: AutoencoderKL,
        labels: Sequence[int],
        settings: GenerationSettings,
        device: torch.device,
    ):
        self.model, self.vae, self.labels, self.settings, self.device = model, vae, labels, settings, device
        self.roundtrip: dict[str, float] | None = None

    def __call__(self, numbers: range) -> Tensor:
        """uint8 images (B, 3, S, S). ValueError if an image's logits or pixels are not finite."""
        ((_, images),) = generate_batches(self.model, self.vae, self.labels, numbers, self.settings, self.device)
        if self.roundtrip is None:
            self.roundtrip = vae_roundtrip(self.vae, images, self.model.quant_min, self.model.quant_max)
        return images


@torch.no_grad()
def vae_roundtrip(
    vae: AutoencoderKL, images: Tensor, quant_min: float, quant_max: float, count: int = 8
) -> dict[str, float]:
    """Encode and decode some of the generated images (B, 3, S, S), to see whether VAE, scale and range are the model's.

    Returns PSNR in dB, the scaled latents' standard deviation and their share out of range; logs a warning if they are
    unlikely.
    """
    images = images[:count]
    latents = vae.scale(vae.encode(from_uint8(images.to(next(vae.parameters()).device))).mode())
    decoded = to_uint8(vae.decode(vae.unscale(latents)))
    found = {
        "psnr": psnr(decoded, images.to(decoded.device)).mean().item(),
        "latent_std": latents.std().item(),
        "out_of_range": ((latents < quant_min) | (latents > quant_max)).float().mean().item(),
    }
    if found["psnr"] < ROUNDTRIP_PSNR or not ROUNDTRIP_STD[0] < found["latent_std"] < ROUNDTRIP_STD[1]:
        logger.warning(
            "the VAE does not reproduce the generated images (PSNR %.1f dB, expected over %g; latents' standard "
            "deviation %.2f, expected about 1): is --vae_path the model's VAE, and is its scale right?",
            *(found["psnr"], ROUNDTRIP_PSNR, found["latent_std"]),
        )
    return found
