"""cache.json: the settings and the VAE that a cache was made with, and what they must agree with."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.image_folder import BAD_IMAGE_CHOICES
from dataset.shards import DTYPES, MODES, NAME, RecordSpec
from models.quantizer import MAX_BITS, TableQuantizer, check_range
from models.quantizer_tables import QUANTIZERS, build_quantizer
from models.vae import AutoencoderKL
from util import dist
from util.files import file_sha256
from util.json_reader import check_schema, read_json
from util.log import get_logger
from util.options import ArgumentError, check_options, option

logger = get_logger()

RECORD = "cache.json"
BAD_LIST = "bad_images.txt"
NOT_FINISHED = "is not finished: run main_cache.py again with the command that began it, it encodes what is missing"
VAE_KEYS = ("vae", "scale_factor", "shift", "latent_fingerprint", "vae_file", "vae_sha256")

LARGEST = 2**28  # bytes of a record; that of ImageNet in shards has 150 kB
# What a record says (util.json_reader.check_schema), and what one of shards says besides.
NUMBERS = (float, [float])
SCHEMA = {
    **{"complete": bool, "img_size": (int, None), "format?": ("shards", "npz"), "classes?": [str], "images?": int},
    **{"flips?": bool, "crops?": int, "mode?": MODES, "batch_size?": int, "shards?": [{"name": str, "sha256": str}]},
    **{"latent_fingerprint?": (str, None), "vae?": dict, "scale_factor?": NUMBERS, "shift?": NUMBERS},
    "quantizer?": {"kind": str, "bits": int, "min": float, "max": float, "reconstruction_values": [float]},
}
OF_SHARDS = {"flips": bool, "classes": [str], "shards": list, "images": int}


@dataclass(frozen=True)
class CacheOptions:
    """What is cached and how. ArgumentError for values that do not fit together."""

    vae_path: str = option("pretrained_models/vae/kl16.ckpt", "VAE checkpoint, or a folder of diffusers")
    vae_embed_dim: int = option(16, "latent channels; taken from the VAE's file if it says so")
    batch_size: int = option(128, "images per process encoded together", lowest=1)
    img_size: int | None = option(
        256, "side of the images, pixels; a multiple of the VAE's stride", lowest=1, highest=2**14
    )
    data_path: str = option("./data/imagenet", "folder with train/<class>/<image>")
    on_bad_image: str = option(
        "error",
        "corrupt images are left out and listed in bad_images.txt; error: and the cache does not count as complete",
        choices=BAD_IMAGE_CHOICES,
    )
    precision: str = option("fp32", "of the encoder's arithmetic", choices=dist.PRECISIONS)
    cached_path: str = option("", "folder of the cache; needed")
    format: str = option("shards", "npz: the published layout, float32 with both flips", choices=("shards", "npz"))
    mode: str = option(
        "moments", "moments of the posterior; only its mean; indices of one quantized posterior sample", choices=MODES
    )
    dtype: str | None = option(None, "of moments and mean; default: float16, npz float32", choices=tuple(DTYPES))
    no_flip: bool = option(False, "no mirrored images (for digits, text): half the size; training needs it too")
    crops: int = option(
        1, "of each image: the centre, then random ones of 0.8 to 1 times the short side", lowest=1, highest=1000
    )
    shard_size: int = option(
        1024, "images per shard; it is kept in memory until it is complete", lowest=1, highest=10**7
    )
    quantizer: str = option("gaussian", "--mode indices: where the levels come from", choices=QUANTIZERS)
    quantizer_tables: str = option("", "--quantizer lloyd: file with its levels, from python -m tools.vae_stats")
    quant_bits: int = option(6, "--mode indices: bits per latent dimension", lowest=1, highest=MAX_BITS)
    quant_min: float = option(-5.0, "--mode indices: lowest latent value of the quantizer")
    quant_max: float = option(5.0, "--mode indices: highest latent value of the quantizer")
    overwrite: bool = option(False, "delete what is cached of these images first, whatever VAE made it")
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)
        changed = {"mode": self.mode != "moments", "dtype": self.dtype not in (None, "float32")}
        changed |= {"crops": self.crops != 1, "no_flip": self.no_flip}
        for name in (name for name, refused in changed.items() if refused and self.format == "npz"):
            layout = "the published layout: float32 moments of the centre crop and its mirror image"
            raise ArgumentError(name, f"{name} does not go with format npz, {layout}")
        if self.mode == "indices" and self.dtype is not None:
            raise ArgumentError("dtype", "dtype does not go with mode indices, which stores bits")
        check_range(self.quant_min, self.quant_max)

    @property
    def cache(self) -> Path:
        """The folder of the cache."""
        return Path(self.cached_path)

    def spec(self, channels: int, side: int) -> RecordSpec:
        """The record of latents with C channels on a side x side grid."""
        shape, views = (channels * (2 if self.mode == "moments" else 1), side, side), self.crops * (2 - self.no_flip)
        if self.mode == "indices":
            return RecordSpec(self.mode, "uint8", shape, views, self.quant_bits)
        return RecordSpec(self.mode, self.dtype or ("float32" if self.format == "npz" else "float16"), shape, views)

    def build_quantizer(self) -> TableQuantizer | None:
        """The quantizer of mode indices."""
        if self.mode != "indices":
            return None
        limits = self.quant_min, self.quant_max
        return build_quantizer(self.quantizer, self.quant_bits, *limits, self.quantizer_tables)


def read_record(cache: str | Path, argument: str = "cached_path") -> dict | None:
    """cache.json as a dict, None if there is none. ValueError naming the file if it is no record of main_cache.py."""
    if not str(cache):
        raise ValueError(f"the folder of the cache ({argument}) is needed")
    path = Path(cache) / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path, SCHEMA, LARGEST)
        if record.get("format") == "shards":
            check_schema(record, OF_SHARDS)
    except (OSError, ValueError) as error:
        advice = "choose another folder, or encode the images again (overwrite)"
        raise ValueError(f"{path} ({argument}) is not a record of main_cache.py ({error}); {advice}") from error
    foreign = [name for entry in record.get("shards", []) if not NAME.fullmatch(name := entry["name"])]
    if foreign:
        refused = "which is no file of this folder; it was tampered with, and is refused"
        raise ValueError(f"{path} ({argument}) names a shard {foreign[0]!r}, {refused}")
    return record


def check_record(
    cache: str | Path, record: dict | None, *, fingerprint: str, img_size: int, classes: Sequence[str] | None = None
) -> None:
    """ValueError naming both sides if a cache is of another VAE, image size or class list than the run.

    A cache without a record (published scripts) is used as it is. classes: those of the checkpoint that is continued.
    """
    if record is None:
        logger.info("%s has no %s: its latents are assumed to be of this VAE", cache, RECORD)
        return
    made_with = record.get("latent_fingerprint")
    if made_with is None:
        logger.info("%s does not say which VAE made it: it is assumed to be this one", cache)
    elif made_with != fingerprint:
        both = f"fingerprints {made_with[:12]} and {fingerprint[:12]}"
        another = f"was made with another VAE ({record.get('vae_file')}) than vae_path ({both})"
        raise ValueError(f"{cache} (cached_path) {another}; encode the images again, or name that VAE")
    if record["img_size"] not in (None, img_size):
        sizes = f"was made with img_size {record['img_size']}, this run has img_size {img_size}"
        raise ValueError(f"{cache} (cached_path) {sizes}; encode the images again")
    check_classes(cache, record.get("classes"), classes)


def recorded_classes(record: dict | None) -> list[str]:
    """The class names of a record; none without one."""
    return (record or {}).get("classes", [])


def check_classes(
    folder: str | Path, found: object, trained: Sequence[str] | None, argument: str = "cached_path"
) -> None:
    """ValueError naming the first difference between a data set's classes and the checkpoint's (None: none)."""
    if trained is None or not isinstance(found, list) or list(trained) == found:
        return
    pairs = enumerate(zip([*found, "none"], [*trained, "none"], strict=False))
    first, (here, there) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    counts = f"has {len(found)} classes, the checkpoint was trained with {len(trained)}"
    raise ValueError(
        f"{folder} ({argument}) {counts}; first difference: class {first} is {here!r} here and {there!r} there"
    )


def check_quantizer(
    cache: str | Path, record: dict, vae: AutoencoderKL, levels: Sequence[float], min_value: float, max_value: float
) -> None:
    """ValueError if cached indices are of another scale than the VAE's, or another quantizer than the model's.

    levels: on [-3, 3]; min_value, max_value: the range that they are mapped to.
    """
    for name in ("scale_factor", "shift"):
        before, now = record.get(name), vae.config[name]
        if before not in (None, now):
            made = f"holds indices of latents with {name} {before}, the VAE (vae_path) has {now}"
            raise ValueError(f"{cache} (cached_path) {made}: encode the images again, or describe the VAE as then")
    made = record.get("quantizer") or {}
    cached, limits = made.get("reconstruction_values", []), [made.get("min"), made.get("max")]
    same_levels = len(cached) == len(levels) and np.allclose(cached, levels, rtol=0, atol=1e-5)
    if not same_levels or limits != [min_value, max_value]:
        raise ValueError(
            f"{cache} (cached_path) holds indices of a {made.get('kind')} quantizer with {len(cached)} levels on "
            f"{limits}; the model has {len(levels)} on {[min_value, max_value]}. Give the quant_bits, quant_min, "
            "quant_max and quantizer that main_cache.py had, or encode the images again"
        )


def digest_of(lines: Sequence[str]) -> str:
    """SHA-256 of a list of names."""
    return hashlib.sha256("\0".join(lines).encode(errors="surrogateescape")).hexdigest()


def npz_list(paths: Iterable[str]) -> str:
    """image_list of a tree of .npz files: the digest of the paths of its images."""
    return digest_of(sorted(f"{path}.npz" for path in paths))


def tree_differs(record: dict, files: Sequence[str]) -> list[str]:
    """What is wrong with a complete tree whose .npz files are `files` (paths below it): at most one problem."""
    if len(files) != record.get("images", len(files)):
        return [f"it holds {len(files)} .npz files, {RECORD} says {record['images']} images"]
    lost = sorted(set(recorded_classes(record)) ^ {name.partition("/")[0] for name in files})
    if record.get("image_list", digest := digest_of(sorted(files))) != digest:
        which = f", classes that differ: {', '.join(lost[:3])}" if lost else ""
        return [f"its .npz files are of other images than {RECORD} says{which}"]
    return []


def describe(
    options: CacheOptions, spec: RecordSpec, classes: list[str], paths: list[str], quantizer: TableQuantizer | None
) -> dict:
    """The content of cache.json before anything is encoded, without what `describe_vae` adds."""
    record = {
        "format": options.format,
        "complete": False,
        "img_size": options.img_size,
        "crop": "ADM centre crop",
        "crops": options.crops,
        "flips": not options.no_flip,
        "mode": spec.mode,
        "dtype": spec.dtype,
        "record_shape": list(spec.shape),
        "views": spec.views,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "classes": classes,
        "class_list": digest_of(classes),
        "images": len(paths),
        "corrupt": 0,
    }
    if options.crops > 1 or spec.mode == "indices":
        record["seed"] = options.seed
    if quantizer is not None:
        record["quantizer"] = quantizer.description()
    if options.format == "shards":
        record |= {"shard_size": options.shard_size, "image_list": digest_of(paths), "shards": []}
    return record


def describe_vae(vae: AutoencoderKL, path: str) -> dict:
    """The part of cache.json that says which VAE made the latents (VAE_KEYS)."""
    scaling = vae.config["scale_factor"], vae.config["shift"]
    values = vae.config, *scaling, vae.latent_fingerprint(), Path(path).name, file_sha256(path)
    return dict(zip(VAE_KEYS, values, strict=True))


def describe_tree(
    old: Path, shape: tuple[int, ...], before: dict | None, vae: AutoencoderKL | None, vae_path: str, named: int | None
) -> dict:
    """For convert: image size, precision and VAE of a tree with moments of `shape`, as far as they are known.

    ValueError if its record `before`, the VAE that the user names and the size that he names contradict each other.
    """
    if vae is not None and (2 * vae.embed_dim != shape[0] or named not in (None, shape[-1] * vae.stride)):
        raise ValueError(f"{old} (convert) holds moments of {shape}, not those of vae_path and img_size")
    named_vae = describe_vae(vae, vae_path) if vae is not None else {}
    found = {"img_size": named if vae is None else shape[-1] * vae.stride, "precision": "fp32"} | named_vae
    if before is None:
        return found
    recorded = {key: before[key] for key in ("img_size", "precision", *VAE_KEYS) if key in before}
    if named not in (None, before["img_size"]):
        raise ValueError(f"img_size {named} contradicts {old / RECORD}, which says {before['img_size']}")
    fingerprint, other = recorded.get("latent_fingerprint"), recorded.get("vae_file")
    if vae is not None and recorded.keys() & set(VAE_KEYS) and fingerprint != named_vae["latent_fingerprint"]:
        raise ValueError(f"{old} (convert) was made with another VAE ({other}) than {vae_path} (vae_path)")
    return found | recorded | named_vae
