"""Cached latents as a training set: shards (dataset/shards.py) or the published tree of .npz files (docs/spec.md 8)."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.folders import list_folder, spread_evenly
from dataset.loader import Index, shared_zeros, split_index
from dataset.npz import VIEWS, read_views
from dataset.record import NOT_FINISHED, RECORD, read_record, recorded_classes, tree_differs
from dataset.shards import Shard
from util.seeds import coin, pick

PROBED = 16


class CachedLatents(Dataset):
    """The published cache, root/<class>/<image file name>.npz -> (moments (2C, h, w) float32, label).

    With index (i, seed) `moments` or `moments_flip` is drawn with p = 0.5 if `flip`; with a bare i it is `moments`.
    Samples are in the order of the images. probed: how many files, evenly spaced, are read at the start.
    """

    mode = "moments"

    def __init__(
        self,
        root: str | Path,
        flip: bool = True,
        class_num: int | None = None,
        argument: str = "cached_path",
        probed: int = PROBED,
    ):
        self.record = read_record(root, argument)
        if self.record is not None and not self.record["complete"]:
            raise ValueError(f"{root} ({argument}) {NOT_FINISHED}")
        listing = list_folder(root, (".npz",), class_num, argument, recorded_classes(self.record))
        samples = sorted(listing.samples, key=lambda s: (s[1], *os.path.split(s[0].removesuffix(".npz"))))
        self.folder = dataclasses.replace(listing, samples=samples)
        if self.record is not None and (problems := tree_differs(self.record, self.folder.paths)):
            advice = "run main_cache.py again, which encodes what is missing; remove files of other images"
            raise ValueError(f"{root} ({argument}): {problems[0]}; {advice}")
        self.flip, self.argument = flip, argument
        self.classes, self.labels, self.samples = listing.classes, self.folder.labels, samples
        self.shape: tuple[int, ...] | None = None
        for number in spread_evenly(range(len(samples)), probed):  # now, so that a wrong cache fails at the start
            self.shape = tuple(self._read(number, VIEWS if flip else VIEWS[:1]).shape[1:])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        number, seed = split_index(index)
        mirrored = self.flip and seed is not None and coin(seed)
        return torch.from_numpy(self._read(number, VIEWS[mirrored : mirrored + 1])[0]), self.labels[number]

    def _read(self, number: int, names: Sequence[str]) -> np.ndarray:
        path = self.samples[number][0]
        try:
            return read_views(path, names, self.shape)
        except ValueError as error:
            advice = "cache this image again"
            if f"no array {VIEWS[1]}" in str(error):
                advice = "train without mirrored images (no_flip), or cache again"
            elif "have shape" in str(error) and self.shape is not None:
                advice = f"that is the shape of {self.samples[0][0]}; cache all images with the same VAE and size"
            raise ValueError(f"cached latents {path} ({self.argument}) {error}; {advice}") from error


class ShardedLatents(Dataset):
    """A cache of shards -> (record, label): moments (2C, h, w) or mean (C, h, w) as stored, or indices (C, h, w) int16.

    With index (i, seed) the seed draws the flip (p = 0.5) and the crop; with a bare i it is the first view. Records are
    compared with their checksums. ValueError for a damaged shard, and for `flip` where no mirrored images are cached.
    """

    def __init__(
        self, root: str | Path, flip: bool = True, class_num: int | None = None, argument: str = "cached_path"
    ):
        cache, self.record = f"{root} ({argument})", read_record(root, argument)
        if self.record is None or not self.record.get("shards"):
            raise ValueError(f"{cache} holds no finished shards: run main_cache.py again, as it was begun")
        self.shards = [Shard(Path(root) / entry["name"], argument) for entry in self.record["shards"]]
        for shard, entry in zip(self.shards, self.record["shards"], strict=True):
            if shard.sha256 != entry["sha256"] or shard.spec != self.shards[0].spec:
                differs = f"is not the one that {RECORD} lists (checksum of its header and index)"
                raise ValueError(f"shard {shard.path} ({argument}) {differs}; delete it and run main_cache.py again")
        self.spec = self.shards[0].spec
        self.mode, self.shape = self.spec.mode, self.spec.shape
        self.classes: list[str] = self.record["classes"]
        self.mirrored = bool(self.record["flips"])
        self.flip, self.crops = flip, self.spec.views // (2 if self.mirrored else 1)
        present = [shard.present for shard in self.shards]
        self._shard = np.repeat(np.arange(len(present), dtype=np.int32), [part.sum() for part in present])
        self._slot = np.concatenate([np.flatnonzero(part) for part in present]).astype(np.int32)
        labels = [shard.labels[part] for shard, part in zip(self.shards, present, strict=True)]
        self._labels = np.concatenate(labels).astype(np.int64)
        self._check(cache, class_num)

    def _check(self, cache: str, class_num: int | None) -> None:
        count, largest = len(self.classes), self._labels.max(initial=-1)
        if self.flip and not self.mirrored:
            plain = "was made with no_flip and has no mirrored images"
            raise ValueError(f"{cache} {plain}: train without them too (no_flip), or cache again")
        if class_num is not None and count > class_num:
            raise ValueError(f"{cache} has {count} classes, more than {class_num} (class_num)")
        if largest < 0:
            raise ValueError(f"{cache} holds no images")
        if largest >= count:
            raise ValueError(f"{cache} has a label {largest} but {count} classes; it was tampered with, and is refused")

    @property
    def labels(self) -> list[int]:
        """The class number of each sample."""
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
        """Records (B, ...) and labels (B,) of many samples, each as `self[index]` returns it."""
        data = shared_zeros((len(indices), self.spec.nbytes), torch.uint8)
        rows, pairs = data.numpy(), [split_index(index) for index in indices]
        for row, (number, seed) in zip(rows, pairs, strict=True):
            self.shards[self._shard[number]].read(int(self._slot[number]), self.view_of(seed), row)
        return self.spec.from_bytes(data), torch.from_numpy(self._labels[[number for number, _ in pairs]])

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        values, labels = self.read_batch([index])
        return values[0], int(labels[0])


def open_cache(
    root: str | Path, flip: bool = True, class_num: int | None = None, argument: str = "cached_path"
) -> CachedLatents | ShardedLatents:
    """The data set of a cache folder of either format. FileNotFoundError or ValueError naming it if it is none."""
    record = read_record(root, argument)
    if record is None and any(Path(root).glob("*.safetensors")):
        raise ValueError(f"{root} ({argument}) holds shards but no {RECORD}; run main_cache.py again")
    if record is not None and not record["complete"]:
        raise ValueError(f"{root} ({argument}) {NOT_FINISHED}")
    is_sharded = record is not None and record.get("format") == "shards"
    return (ShardedLatents if is_sharded else CachedLatents)(root, flip, class_num, argument)
