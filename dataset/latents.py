"""Cached latents as a training set: shards (dataset/shards.py), or the published tree of .npz files (SPEC 8); and what cache.json says of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dataset.loader import Index, coin, list_folder, pick, split_index
from dataset.shards import NAME, Shard
from util.log import get_logger

logger = get_logger()

RECORD = "cache.json"


# ------------------------------------------------------------------------------------------------------------- cache.json


def read_record(cache: str | Path, flag: str = "--cached_path") -> dict | None:
    """cache.json as a dict, None if there is none. ValueError naming the file if it is no record of main_cache.py."""
    path = Path(cache) / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if (
            not isinstance(record, dict)
            or not isinstance(record["img_size"], (int, type(None)))
            or not isinstance(record["complete"], bool)
        ):
            raise ValueError("img_size and complete are not as expected")
        shards = record.get("shards", [])
        if not isinstance(shards, list) or not all(
            isinstance(s, dict) and isinstance(s["name"], str) and isinstance(s["sha256"], str) for s in shards
        ):
            raise ValueError("its list of shards is not as expected")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} ({flag}) is not a record of main_cache.py ({type(error).__name__}: {error}); choose another folder, "
            "or cache the images anew with --overwrite"
        ) from error
    foreign = [s["name"] for s in shards if not NAME.fullmatch(s["name"])]
    if foreign:
        raise ValueError(
            f"{path} ({flag}) names a shard {foreign[0]!r}, which is no file of this folder; it was tampered with, and is refused"
        )
    return record


def check_record(
    cache: str | Path,
    record: dict | None,
    *,
    fingerprint: str,
    img_size: int,
    classes: Sequence[str] | None = None,
    flag: str = "--cached_path",
) -> None:
    """ValueError naming both sides if the cache is not finished, or of another VAE, image size or class list than the run.

    A cache without a record (published scripts) is taken as it is. classes: what the run has been trained with so far, if it has.
    """
    if record is None:
        logger.info("%s has no %s: that its latents are from --vae_path is taken on trust", cache, RECORD)
        return
    if not record["complete"]:
        raise ValueError(
            f"{cache} ({flag}) is not finished: run main_cache.py again with the command that began it, it encodes what is missing"
        )
    made_with = record.get("latent_fingerprint")
    if made_with is None:
        logger.info("%s does not say which VAE made it: that it was --vae_path is taken on trust", cache)
    elif made_with != fingerprint:
        raise ValueError(
            f"{cache} ({flag}) was made with another VAE ({record.get('vae_file')}) than --vae_path (fingerprints {made_with[:12]} and "
            f"{fingerprint[:12]}); cache the images anew, or name that VAE"
        )
    if record["img_size"] not in (None, img_size):
        raise ValueError(
            f"{cache} ({flag}) was made with --img_size {record['img_size']}, this run has --img_size {img_size}; cache the images anew"
        )
    check_classes(cache, record.get("classes"), classes, flag)


def check_classes(
    cache: str | Path, cached: object, expected: Sequence[str] | None, flag: str = "--cached_path"
) -> None:
    """ValueError naming the first difference between a cache's class list and the one that the run has been trained with."""
    if expected is None or not isinstance(cached, list) or list(expected) == cached:
        return
    first = next(
        (i for i, (a, b) in enumerate(zip(cached, expected, strict=False)) if a != b), min(len(cached), len(expected))
    )
    here, there = (names[first] if first < len(names) else "none" for names in (cached, list(expected)))
    raise ValueError(
        f"{cache} ({flag}) has {len(cached)} classes, the checkpoint was trained with {len(expected)}; first difference: class {first} is "
        f"{here!r} here and {there!r} there"
    )


def check_quantizer(
    cache: str | Path, record: dict | None, tables: Sequence[float], min_value: float, max_value: float
) -> None:
    """ValueError if cached indices were made with another quantizer than the model's: levels on [-3, 3], and the range they are mapped to."""
    made = (record or {}).get("quantizer") or {}
    levels = made.get("reconstruction_values", [])
    same = (
        len(levels) == len(tables)
        and np.allclose(levels, tables, rtol=0, atol=1e-5)
        and (made["min"], made["max"]) == (min_value, max_value)
    )
    if not same:
        raise ValueError(
            f"{cache} (--cached_path) holds indices of a {made.get('kind')} quantizer with {len(levels)} levels on "
            f"[{made.get('min')}, {made.get('max')}]; the model has {len(tables)} on [{min_value}, {max_value}]. Give the same "
            "--quant_bits, --quant_min, --quant_max and --quantizer as main_cache.py had, or cache the images anew"
        )


# ------------------------------------------------------------------------------------------------------------- data sets


class CachedLatents(Dataset):
    """The published cache, root/<class>/<image file name>.npz with `moments` and `moments_flip` -> (moments (2C, h, w) float32, label).

    With index (i, seed) one of the two is drawn with p = 0.5 if `flip`; with a bare i it is `moments`. Samples stand in the order of the images.
    """

    mode = "moments"

    def __init__(self, root: str | Path, flip: bool = True, class_num: int | None = None, flag: str = "--cached_path"):
        check_named(root, flag)
        self.folder = list_folder(root, (".npz",), class_num, flag)
        self.flip, self.flag = flip, flag
        self.classes = self.folder.classes
        self.samples = sorted(
            self.folder.samples, key=lambda s: (s[1], str(Path(s[0]).parent), Path(s[0]).name.removesuffix(".npz"))
        )
        self.labels = [label for _, label in self.samples]
        self.record = read_record(root, flag)
        self.shape: tuple[int, ...] | None = None
        self.shape = tuple(self[0][0].shape)  # reads one file now, so that a wrong cache fails at the start

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        number, seed = split_index(index)
        path, label = self.samples[number]
        key = "moments_flip" if self.flip and seed is not None and coin(seed) else "moments"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                moments = torch.from_numpy(arrays[key]).float()
        except Exception as error:  # zipfile, zlib, numpy and the disk each have their own
            raise ValueError(
                f"cached latents {path} ({self.flag}) cannot be read, cache this image anew: {error}"
            ) from error
        if not torch.isfinite(moments).all():
            raise ValueError(f"cached latents {path} ({self.flag}) hold NaN or infinite values, cache this image anew")
        if self.shape is not None and tuple(moments.shape) != self.shape:
            raise ValueError(
                f"cached latents {path} ({self.flag}) have shape {tuple(moments.shape)}, those of {self.samples[0][0]} {self.shape}; "
                "cache all images with the same VAE and size"
            )
        return moments, label


class ShardedLatents(Dataset):
    """A cache of shards -> (record, label): moments (2C, h, w) or mean (C, h, w) in the cache's dtype, or indices (C, h, w) int16.

    With index (i, seed) the seed draws the flip (p = 0.5, as everywhere) and, where there are several, the crop; with a bare i it is the first
    view. Every record is checked against its checksum. `read_batch` reads many at once, without a tensor for each. ValueError for a damaged
    shard, and for `flip` where the cache has no mirrored images.
    """

    def __init__(self, root: str | Path, flip: bool = True, class_num: int | None = None, flag: str = "--cached_path"):
        check_named(root, flag)
        self.record = read_record(root, flag)
        if self.record is None or not self.record.get("shards"):
            raise ValueError(
                f"{root} ({flag}) holds no finished shards: run main_cache.py again with the command that began it"
            )
        self.shards = [Shard(Path(root) / entry["name"], flag) for entry in self.record["shards"]]
        for shard, entry in zip(self.shards, self.record["shards"], strict=True):
            if shard.sha256 != entry["sha256"] or shard.spec != self.shards[0].spec:
                raise ValueError(
                    f"shard {shard.path} ({flag}) is not the one that {RECORD} lists (checksum of its head); delete it and run main_cache.py "
                    "again, it encodes only what is missing"
                )
        self.spec = self.shards[0].spec
        self.mode, self.shape = self.spec.mode, self.spec.shape
        self.classes: list[str] = self.record["classes"]
        self.mirrored = bool(self.record["flips"])
        if flip and not self.mirrored:
            raise ValueError(
                f"{root} ({flag}) was made with --no_flip and has no mirrored images: train with --no_flip too, or cache anew"
            )
        if class_num is not None and len(self.classes) > class_num:
            raise ValueError(f"{root} ({flag}) has {len(self.classes)} classes, more than --class_num {class_num}")
        self.flip, self.crops = flip, self.spec.views // (2 if self.mirrored else 1)
        self._shard = np.repeat(np.arange(len(self.shards), dtype=np.int32), [s.present.sum() for s in self.shards])
        self._slot = np.concatenate([np.flatnonzero(s.present) for s in self.shards]).astype(np.int32)
        self._labels = np.concatenate([s.labels[s.present] for s in self.shards]).astype(np.int64)
        if not len(self._labels):
            raise ValueError(f"{root} ({flag}) holds not one image")
        if self._labels.max() >= len(self.classes):
            raise ValueError(
                f"{root} ({flag}) has a label {self._labels.max()} but {len(self.classes)} classes; it was tampered with, and is refused"
            )

    @property
    def labels(self) -> list[int]:
        return self._labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def view_of(self, seed: int | None) -> int:
        """Which view of an image a seed draws; the first without a seed."""
        if seed is None:
            return 0
        crop = pick(seed, self.crops)
        return 2 * crop + (self.flip and coin(seed)) if self.mirrored else crop

    def read_batch(self, indices: Sequence[Index]) -> tuple[Tensor, Tensor]:
        """Records (B, ...) and labels (B,) of many samples, each as `self[index]` gives it."""
        data = torch.empty(len(indices), self.spec.nbytes, dtype=torch.uint8)
        if get_worker_info() is not None:  # into shared memory at once, which spares a copy
            data = data.new(torch.UntypedStorage._new_shared(data.numel(), device="cpu")).resize_(data.shape)
        rows, numbers = data.numpy(), [split_index(index) for index in indices]
        for row, (number, seed) in zip(rows, numbers, strict=True):
            self.shards[self._shard[number]].read(int(self._slot[number]), self.view_of(seed), row)
        return self.spec.from_bytes(data), torch.from_numpy(self._labels[[number for number, _ in numbers]])

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        values, labels = self.read_batch([index])
        return values[0], int(labels[0])


def check_named(root: str | Path, flag: str) -> None:
    """ValueError if no folder is named at all."""
    if not str(root):
        raise ValueError(f"--use_cached needs the folder of the cache: give {flag}")


def open_cache(
    root: str | Path, flip: bool = True, class_num: int | None = None, flag: str = "--cached_path"
) -> CachedLatents | ShardedLatents:
    """The data set of a cache folder, whatever its format. FileNotFoundError or ValueError naming the folder if it is none."""
    check_named(root, flag)
    record = read_record(root, flag)
    if record is not None and not record["complete"]:
        raise ValueError(
            f"{root} ({flag}) is not finished: run main_cache.py again with the command that began it, it encodes what is missing"
        )
    kind = ShardedLatents if record is not None and record.get("format") == "shards" else CachedLatents
    if record is None and Path(root).is_dir() and any(Path(root).glob("*.safetensors")):
        raise ValueError(
            f"{root} ({flag}) holds shards but no {RECORD}, which says what they are; run main_cache.py again"
        )
    return kind(root, flip, class_num, flag)
