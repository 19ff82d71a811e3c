"""Shards: files of fixed-size latent records that are read through a memory map (main_cache.py writes them, dataset/latents.py reads them).

A shard is a safetensors file, so any reader of that format opens it. Its tensors, for N images with V views each (crops x flips):

  labels  I32 (N,)      class number, -1 where the image could not be read
  crc32   U32 (N, V)    checksum of each record, checked whenever one is read
  paths   U8            the images' paths below the data folder, UTF-8, each ended by a zero byte, then zeros to a multiple of 64
  moments | mean | indices   (N, V, ...)   the records; image i, view v stand at a fixed offset: no index but its number is needed

Everything before the records is the head; its SHA-256 stands in cache.json, and it holds the records' checksums, so one byte changed
anywhere is found. Views: (crop 0, crop 0 mirrored, crop 1, ...), without the mirrored ones if the cache has none.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FORMAT = "tokenbridge-latents-1"
MODES = ("moments", "mean", "indices")
DTYPES = {"float16": ("F16", torch.float16), "float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
NAME = re.compile(r"shard-\d{5,}\.safetensors")
ALIGNMENT = 64
LARGEST_HEADER = 2**20
# absolute, with .., or with a backslash or drive
TRAVERSAL = re.compile(rb"(?:^|\0)/|(?:^|[\0/])\.\.(?:[\0/]|$)|\\|(?:^|\0)[A-Za-z]:")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


# ------------------------------------------------------------------------------------------------------------- records


def pack_bits(indices: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers (..., n) in [0, 2^bits) -> uint8 (..., bits * ceil(n/8)), one plane after the other, the lowest bit's first."""
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
    """What a record is. shape: of one view: (2C, h, w) moments, (C, h, w) mean or indices. bits: of indices only, else 0."""

    mode: str
    dtype: str  # of moments and mean; indices are bit planes
    shape: tuple[int, int, int]
    views: int
    bits: int = 0

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one view of one image."""
        return (
            self.bits * -(-self.numbers // 8)
            if self.mode == "indices"
            else self.numbers * DTYPES[self.dtype][1].itemsize
        )

    def to_bytes(self, values: Tensor) -> np.ndarray:
        """Values (..., *shape) -> uint8 (..., nbytes). ValueError if one does not fit the dtype, or is NaN or infinite."""
        flat = values.cpu().reshape(*values.shape[: values.ndim - 3], self.numbers)
        if self.mode == "indices":
            return pack_bits(flat.numpy().astype(np.int16), self.bits)
        stored = flat.to(DTYPES[self.dtype][1])
        if not torch.isfinite(stored).all():
            what = (
                "NaN or infinite"
                if not torch.isfinite(flat).all()
                else f"too large for {self.dtype} (--dtype): use bfloat16 or float32"
            )
            raise ValueError(f"the VAE's latents of an image are {what}")
        return stored.contiguous().view(torch.uint8).numpy()

    def from_bytes(self, data: Tensor) -> Tensor:
        """uint8 (B, nbytes) -> values (B, *shape): of `dtype` as stored, or int16 indices."""
        if self.mode == "indices":
            return torch.from_numpy(unpack_bits(data.numpy(), self.bits, self.numbers)).reshape(-1, *self.shape)
        return data.view(DTYPES[self.dtype][1]).reshape(-1, *self.shape)


# ------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """Where everything of a shard stands; known before the first record is."""

    spec: RecordSpec
    images: int
    path_bytes: bytes

    @property
    def _sizes(self) -> dict[str, tuple[str, list[int], int]]:
        n, s = self.images, self.spec
        kind = "U8" if s.mode == "indices" else DTYPES[s.dtype][0]
        shape = [n, s.views, s.nbytes] if s.mode == "indices" else [n, s.views, *s.shape]
        return {
            "labels": ("I32", [n], 4 * n),
            "crc32": ("U32", [n, s.views], 4 * n * s.views),
            "paths": ("U8", [len(self.path_bytes)], len(self.path_bytes)),
            s.mode: (kind, shape, n * s.views * s.nbytes),
        }

    def header(self, index_crc: int) -> bytes:
        """Length and JSON of a safetensors header, padded so that what follows is aligned."""
        entries, offset = {}, 0
        for name, (dtype, shape, size) in self._sizes.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        about = {
            "format": FORMAT,
            "bits": str(self.spec.bits),
            "shape": json.dumps(self.spec.shape),
            "index_crc32": f"{index_crc:08x}",
        }
        text = json.dumps({"__metadata__": about} | entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def head_bytes(self) -> int:
        return len(self.header(0)) + 4 * self.images * (1 + self.spec.views) + len(self.path_bytes)

    @property
    def total_bytes(self) -> int:
        return self.head_bytes + self.images * self.spec.views * self.spec.nbytes

    def head(self, labels: np.ndarray, crcs: np.ndarray) -> bytes:
        index = labels.astype("<i4").tobytes() + crcs.astype("<u4").tobytes() + self.path_bytes
        return self.header(zlib.crc32(index)) + index


def encode_paths(paths: Sequence[str], images: int, views: int) -> bytes:
    """The `paths` tensor: padded so that the records that follow it are aligned."""
    text = b"".join(os.fsencode(path) + b"\0" for path in paths)
    return text + b"\0" * (-(len(text) + 4 * images * (1 + views)) % ALIGNMENT)


def make_layout(spec: RecordSpec, paths: Sequence[str]) -> Layout:
    return Layout(spec, len(paths), encode_paths(paths, len(paths), spec.views))


# ------------------------------------------------------------------------------------------------------------- reading


class Shard:
    """A finished shard: its head in memory, its records through a memory map that is opened at the first read in each process.

    ValueError naming the file if it is cut short, of another format, or its head does not match its checksum.
    """

    def __init__(self, path: str | Path, flag: str = "--cached_path"):
        self.path, self.flag = Path(path), flag
        self._map: np.ndarray | None = None
        try:
            with self.path.open("rb") as file:
                self._read_head(file)
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} ({flag}) is absent though cache.json lists it; run main_cache.py again to encode it anew"
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._broken(str(error) or type(error).__name__) from error

    def _broken(self, what: str) -> ValueError:
        return ValueError(
            f"shard {self.path} ({self.flag}) is damaged: {what}. Delete this file and run main_cache.py again; it encodes only "
            "what is missing"
        )

    def _read_head(self, file) -> None:  # noqa: ANN001
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError("it is no safetensors file, or cut short")
        header = json.loads(file.read(length))
        about = header.pop("__metadata__")
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, not {FORMAT}")
        (mode,) = set(header) - {"labels", "crc32", "paths"}
        dtype = {kind: name for name, (kind, _) in DTYPES.items()}.get(header[mode]["dtype"], "uint8")
        shape = tuple(int(x) for x in json.loads(about["shape"]))
        self.images, views = (int(x) for x in header["crc32"]["shape"])
        self.spec = RecordSpec(mode, dtype, shape, views, int(about["bits"]))
        begin, end = header["paths"]["data_offsets"]
        if mode not in MODES or len(shape) != 3 or min(self.images, views, *shape, end - begin) < 1 or end > size:
            raise ValueError("its header is not consistent")
        index = file.read(4 * self.images * (1 + views) + end - begin)
        self._paths = index[4 * self.images * (1 + views) :]
        layout = Layout(self.spec, self.images, self._paths)
        if size != layout.total_bytes:
            raise ValueError(f"it has {size} bytes, its header says {layout.total_bytes}")
        self.labels = np.frombuffer(index, "<i4", self.images)
        self.crcs = np.frombuffer(index, "<u4", self.images * views, 4 * self.images).reshape(self.images, views)
        self.head_bytes = layout.head_bytes
        if f"{zlib.crc32(index):08x}" != about["index_crc32"] or 8 + length + len(index) != self.head_bytes:
            raise ValueError("its index does not match its checksum")
        if TRAVERSAL.search(self._paths):
            raise ValueError("a path in its index leaves the data folder (absolute, or with ..)")
        self.sha256 = hashlib.sha256(layout.header(zlib.crc32(index)) + index).hexdigest()

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
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.head_bytes + self.images * self.spec.views * self.spec.nbytes:
                    raise self._broken("it was cut short while in use")
                # or each map would keep a file descriptor
                keep = {"trackfd": False} if sys.version_info >= (3, 13) else {}
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **keep)
            flat = np.frombuffer(mapped, np.uint8, offset=self.head_bytes)
            self._map = flat.reshape(self.images, self.spec.views, self.spec.nbytes)
        return self._map

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_map": None}  # workers that are spawned map anew

    def read(self, image: int, view: int, out: np.ndarray) -> None:
        """One record into `out` (nbytes,). ValueError naming file and image if its checksum is wrong."""
        out[:] = self.records[image, view]
        if zlib.crc32(out) != self.crcs[image, view]:
            raise self._broken(f"the checksum of {self.paths[image]}, view {view}, is wrong")

    def wrong_records(self) -> list[str]:
        """Names of all images with a record that does not match its checksum."""
        paths = self.paths
        return [
            paths[i]
            for i in np.flatnonzero(self.present)
            if any(zlib.crc32(r) != c for r, c in zip(self.records[i], self.crcs[i], strict=True))
        ]


# ------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one shard batch by batch, so that a kill loses no more than the batch in hand.

    Records go to a hidden file at their final place, and a journal keeps the checksums of each finished batch. `done` has the batches that an
    earlier process finished and whose bytes still match. `finish` adds the head, syncs to the disk and renames.
    """

    def __init__(self, folder: Path, number: int, layout: Layout, labels: Sequence[int], batch_size: int, key: str):
        self.path, self.layout = folder / shard_name(number), layout
        self.partial, self.journal = (folder / f".{self.path.name}.{kind}" for kind in ("partial", "journal"))
        self.all_labels, self.batch_size = np.asarray(labels, np.int32), batch_size
        self.labels = np.full(layout.images, -1, np.int32)
        self.crcs = np.zeros((layout.images, layout.spec.views), np.uint32)
        self.done: set[int] = set()
        self.key = hashlib.sha256(f"{key}{layout}{batch_size}".encode()).hexdigest()
        self._files: tuple[int, int] | None = None

    def open(self) -> None:
        """Continue what a kill left behind if it is of the same kind, else begin."""
        try:
            lines = self.journal.read_text().splitlines()
            usable = lines[:1] == [self.key] and self.partial.stat().st_size == self.layout.total_bytes
        except (OSError, UnicodeDecodeError):
            usable, lines = False, []
        if not usable:
            self.journal.write_text(self.key + "\n")
            allocate(self.partial, self.layout.total_bytes)
        self._files = os.open(self.partial, os.O_RDWR), os.open(self.journal, os.O_WRONLY | os.O_APPEND)
        if usable:
            self._recover(lines[1:])

    def _recover(self, lines: Sequence[str]) -> None:
        for line in lines:
            try:
                batch, crcs, present = json.loads(line)
                crcs, present = np.array(crcs, np.uint32).reshape(-1, self.layout.spec.views), np.array(present, bool)
                part = self.slots(batch)
                records = np.frombuffer(os.pread(self._files[0], *self._extent(part)), np.uint8).reshape(
                    *crcs.shape, -1
                )
            except (ValueError, TypeError, OverflowError):
                continue  # a line cut short by the kill
            if len(crcs) == part.stop - part.start and (checksums(records) == crcs).all():
                self._keep(batch, part, crcs, present)
        os.write(self._files[1], b"\n")  # ends a half line

    @property
    def is_open(self) -> bool:
        return self._files is not None

    def slots(self, batch: int) -> slice:
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, self.layout.images))

    def _extent(self, part: slice) -> tuple[int, int]:
        each = self.layout.spec.views * self.layout.spec.nbytes
        return (part.stop - part.start) * each, self.layout.head_bytes + part.start * each

    def _keep(self, batch: int, part: slice, crcs: np.ndarray, present: np.ndarray) -> None:
        self.labels[part] = np.where(present, self.all_labels[part], -1)
        self.crcs[part] = crcs
        self.done.add(batch)

    @property
    def num_batches(self) -> int:
        return -(-self.layout.images // self.batch_size)

    def write(self, batch: int, records: np.ndarray, present: np.ndarray) -> None:
        """Records (b, V, nbytes) of a batch, zeros where not present (b,). OSError if the disk is full."""
        part, crcs = self.slots(batch), checksums(records)
        data, offset = memoryview(np.ascontiguousarray(records)).cast("B"), self._extent(part)[1]
        while data:
            written = os.pwrite(self._files[0], data, offset)
            data, offset = data[written:], offset + written
        line = json.dumps([batch, crcs.tolist(), present.tolist()]) + "\n"
        os.write(self._files[1], line.encode())
        self._keep(batch, part, crcs, present)

    def finish(self) -> None:
        """Head, sync, rename: from here on the shard is there, whole."""
        os.pwrite(self._files[0], self.layout.head(self.labels, self.crcs), 0)
        os.fsync(self._files[0])
        self.close()
        os.replace(self.partial, self.path)
        self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Close without finishing; what was written stays for the next run."""
        for descriptor in self._files or ():
            os.close(descriptor)
        self._files = None

    def reopen(self, shard: Shard, again: set[int]) -> None:
        """Begin from a finished shard whose batches `again` are to be written once more (images that can be read by now)."""
        shutil.copyfile(shard.path, self.partial)
        kept = [batch for batch in range(self.num_batches) if batch not in again]
        lines = [
            json.dumps([b, shard.crcs[self.slots(b)].tolist(), shard.present[self.slots(b)].tolist()]) for b in kept
        ]
        self.journal.write_text("\n".join([self.key, *lines]) + "\n")
        self.open()


def allocate(path: Path, size: int) -> None:
    """A file of `size` bytes whose room on the disk is taken, so that a full disk is noticed now; nothing is left if there is no room."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot reserve room
                path.unlink()
                raise
            file.truncate(size)


def checksums(records: np.ndarray) -> np.ndarray:
    """CRC-32 of each record: uint8 (b, V, nbytes) -> uint32 (b, V)."""
    return np.array([[zlib.crc32(view) for view in record] for record in records], np.uint32).reshape(records.shape[:2])
