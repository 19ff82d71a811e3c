"""Shards: safetensors files of fixed-size latent records that are read through a memory map.

Tensors of a shard of N images with V views each, (crop 0, crop 0 mirrored, crop 1, ...) or without the mirrored ones:

  labels  I32 (N,)      class number, -1 where the image could not be read
  crc32   I32 (N, V)    the 32 bits of each record's checksum, which is checked whenever the record is read
  paths   U8            the images' paths below the data folder, UTF-8, each terminated by a zero byte
  sources I64 (N, 3)    size, time and checksum of each image's file (dataset/source.py), zeros where unreadable
  moments | mean | indices   (N, V, ...)   the records; indices as bit planes

The metadata holds a checksum of labels, crc32, paths and sources (the index). The SHA-256 of header and index is in
cache.json, so that a changed byte anywhere in the file is detected.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dataset.source import UNKNOWN, is_stamp
from util.files import replacing
from util.json_reader import parse_json

FORMAT = "tokenbridge-latents-3"
# 2: without sources; 1: also U32 checksums, padded paths, flat metadata
READABLE = (FORMAT, "tokenbridge-latents-2", "tokenbridge-latents-1")
MARK = b"tokenbridge-latents-"  # in the header of every version
MODES = ("moments", "mean", "indices")
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
SAFETENSORS_NAMES = {"F16": "float16", "F32": "float32", "BF16": "bfloat16", "U8": "uint8"}
INDEX = ("labels", "crc32", "paths", "sources")
NAME = re.compile(r"shard-\d{5,}\.safetensors")
LARGEST_HEADER = 2**20
# absolute, with .., or with a drive; with slashes or backslashes
TRAVERSAL = re.compile(rb"(?:^|\0)(?:[A-Za-z]:)?[/\\]|(?:^|[\0/\\])\.\.(?:[\0/\\]|$)")


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def pack_bits(indices: np.ndarray, bits: int) -> np.ndarray:
    """Integers (..., n) in [0, 2^bits) -> uint8 (..., bits * ceil(n/8)): bit planes, the lowest bit's first."""
    planes = (indices[..., None, :] >> np.arange(bits, dtype=indices.dtype)[:, None]) & 1  # (..., bits, n)
    return np.packbits(planes.astype(np.uint8), axis=-1).reshape(*indices.shape[:-1], -1)


def unpack_bits(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Inverse of `pack_bits`: uint8 (..., bits * ceil(n/8)) -> int16 (..., n)."""
    planes = np.unpackbits(packed.reshape(*packed.shape[:-1], bits, -1), axis=-1, count=n)  # (..., bits, n)
    out = planes[..., bits - 1, :].astype(np.int16)
    for bit in range(bits - 2, -1, -1):
        out <<= 1
        out |= planes[..., bit, :]
    return out


@dataclass(frozen=True)
class RecordSpec:
    """What a record is. shape of a view: (2C, h, w) moments, (C, h, w) mean or indices; bits: of indices, else 0."""

    mode: str
    dtype: str  # of moments and mean; "uint8" for indices
    shape: tuple[int, int, int]
    views: int
    bits: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one view of one image."""
        numbers = math.prod(self.shape)
        return self.bits * -(-numbers // 8) if self.mode == "indices" else numbers * DTYPES[self.dtype].itemsize

    def to_bytes(self, values: Tensor) -> np.ndarray:
        """Values (..., *shape) -> uint8 (..., nbytes). ValueError if they do not fit the dtype, or are not finite."""
        flat = values.cpu().flatten(-3)
        if self.mode == "indices":
            return pack_bits(flat.numpy().astype(np.int16), self.bits)
        stored = flat.to(DTYPES[self.dtype])
        if not torch.isfinite(flat).all():
            raise ValueError("the VAE's latents of an image are NaN or infinite")
        if not torch.isfinite(stored).all():
            raise ValueError(f"latents are too large for {self.dtype} (dtype): use bfloat16 or float32")
        return stored.contiguous().view(torch.uint8).numpy()

    def from_bytes(self, data: Tensor) -> Tensor:
        """uint8 (B, nbytes) -> values (B, *shape): of `dtype` as stored, or int16 indices."""
        if self.mode == "indices":
            indices = unpack_bits(data.numpy(), self.bits, math.prod(self.shape))
            return torch.from_numpy(indices).reshape(-1, *self.shape)
        return data.view(DTYPES[self.dtype]).reshape(-1, *self.shape)

    def stored_shape(self, images: int) -> tuple[int, ...]:
        """Shape of the records' tensor."""
        return (images, self.views, *((self.nbytes,) if self.mode == "indices" else self.shape))


def index_crc32(index: Sequence[np.ndarray]) -> str:
    """Checksum of labels, crc32, paths and sources."""
    return f"{zlib.crc32(b''.join(part.tobytes() for part in index)):08x}"


def write_shard(
    path: Path,
    spec: RecordSpec,
    paths: Sequence[str],
    labels: np.ndarray,
    records: np.ndarray,
    sources: np.ndarray | None = None,
) -> None:
    """Write a shard under a temporary name, sync it to the disk and rename it. OSError if the disk is full.

    labels (N,): -1 where the image could not be read. records (N, V, nbytes) uint8, sources (N, 3) int64: zeros where
    it could not; sources None: not known.
    """
    crcs = np.array([[zlib.crc32(view) for view in views] for views in records], "<u4").view("<i4")  # (N, V)
    names = np.array(bytearray(b"".join(os.fsencode(name) + b"\0" for name in paths)))
    index = (labels.astype("<i4"), crcs, names, *(() if sources is None else (sources.astype("<i8"),)))
    stored = torch.from_numpy(records)
    if spec.mode != "indices":
        stored = stored.view(DTYPES[spec.dtype]).reshape(spec.stored_shape(len(paths)))
    about = {"format": FORMAT, "bits": spec.bits, "shape": json.dumps(spec.shape), "index_crc32": index_crc32(index)}
    tensors = {name: torch.from_numpy(part) for name, part in zip(INDEX, index, strict=False)} | {spec.mode: stored}
    with replacing(path, sync=True) as file:
        # one metadata entry: safetensors writes several in any order, and equal contents must be equal files
        file.write(save(tensors, {"tokenbridge": json.dumps(about)}))


def is_ours(path: Path) -> bool:
    """Whether a file's header has the mark of this format, also if the rest is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return MARK in file.read(min(length, LARGEST_HEADER))
    except OSError:
        return False


class Shard:
    """A finished shard: its index in memory, its records through a memory map that each process opens itself.

    ValueError naming the file if it is truncated, of another format, or its index does not match its checksum.
    """

    def __init__(self, path: str | Path, argument: str = "cached_path"):
        self.path, self.argument = Path(path), argument
        self._map: np.ndarray | None = None
        try:
            self._read_head()
        except FileNotFoundError:
            absent = f"{self.path} ({argument}) is absent though cache.json lists it"
            raise ValueError(f"{absent}; run main_cache.py again to encode it") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SafetensorError) as error:
            raise self._broken(f"it is not a shard as written ({error or type(error).__name__})") from error

    def _broken(self, what: str) -> ValueError:
        advice = "Delete this file and run main_cache.py again; it encodes only what is missing"
        return ValueError(f"shard {self.path} ({self.argument}) is damaged: {what}. {advice}")

    def _read_head(self) -> None:
        with self.path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(min(int.from_bytes(length, "little"), LARGEST_HEADER))
        with safe_open(self.path, "np") as file:
            about = file.metadata()
            about = parse_json(about["tokenbridge"]) if "tokenbridge" in about else about
            if about["format"] not in READABLE:
                raise ValueError(f"its format is {about['format']!r}, not {FORMAT}")
            (mode,) = set(file.keys()) - set(INDEX)
            index = [file.get_tensor(name) for name in INDEX if name in file.keys()]  # noqa: SIM118
            records = file.get_slice(mode)
            stored, dtype = tuple(records.get_shape()), SAFETENSORS_NAMES[records.get_dtype()]
        self.labels, self.crcs = index[0], index[1].view("<u4")  # (N,), (N, V)
        self.images, views = self.crcs.shape
        self.spec = RecordSpec(mode, dtype, tuple(map(int, parse_json(about["shape"]))), views, int(about["bits"]))
        consistent = mode in MODES and len(self.spec.shape) == 3 and stored == self.spec.stored_shape(self.images)
        self.sources = index[3] if len(index) > 3 else np.tile(UNKNOWN, (self.images, 1))  # (N, 3)
        consistent &= is_stamp(self.sources, 2) and len(self.sources) == self.images
        if not consistent or self.labels.shape != (self.images,) or min(stored) < 1:
            raise ValueError("its header is not consistent")
        if index_crc32(index) != about["index_crc32"]:
            raise ValueError("its index does not match its checksum")
        self._paths = index[2].tobytes()
        if TRAVERSAL.search(self._paths):
            raise ValueError("a path in its index leaves the data folder (absolute, or with ..)")
        self.sha256 = hashlib.sha256(b"".join((header, *(part.tobytes() for part in index)))).hexdigest()

    @property
    def paths(self) -> list[str]:
        """Of all images, also of those that could not be read: <class>/<file>, below the data folder."""
        return [os.fsdecode(path) for path in self._paths.split(b"\0")[: self.images]]

    @property
    def present(self) -> np.ndarray:
        """(N,) bool: whether the image could be read."""
        return self.labels >= 0

    @property
    def records(self) -> np.ndarray:
        """(N, V, nbytes) uint8, mapped, not read."""
        if self._map is None:
            try:
                with safe_open(self.path, "pt") as file:
                    stored = file.get_tensor(self.spec.mode)
            except SafetensorError as error:
                raise self._broken(f"it changed while in use ({error})") from error
            self._map = stored.flatten(2).view(torch.uint8).numpy()
        return self._map

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_map": None}  # spawned workers map the file themselves

    def read(self, image: int, view: int, out: np.ndarray) -> None:
        """One record into `out` (nbytes,). ValueError naming file and image if its checksum is wrong."""
        out[:] = self.records[image, view]
        if zlib.crc32(out) != self.crcs[image, view]:
            raise self._broken(f"the checksum of {self.paths[image]}, view {view}, is wrong")

    def wrong_records(self) -> list[str]:
        """Paths of all images with a record that does not match its checksum."""
        crcs = ([zlib.crc32(view) for view in views] for views in self.records)
        return [path for path, here, kept in zip(self.paths, crcs, self.crcs.tolist(), strict=True) if here != kept]
