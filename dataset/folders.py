"""Folders of images: the one listing of class folders, and the data set of its images."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.images import center_crop_adm, image_extensions, read_image, to_tensor
from dataset.loader import Index, build_loader, split_index
from util.log import get_logger
from util.options import ArgumentError
from util.seeds import coin, mix, pick

logger = get_logger()
BAD_IMAGE_CHOICES = ("error", "skip")
PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclass(frozen=True)
class ClassFolders:
    """The files below root/<class>/, sorted by class and path; samples: (path, class number)."""

    root: Path
    classes: list[str]
    samples: list[tuple[str, int]]

    @property
    def labels(self) -> list[int]:
        """The class number of each file."""
        return [label for _, label in self.samples]

    @property
    def paths(self) -> list[str]:
        """Each file's path below root, with forward slashes."""
        return [Path(path).relative_to(self.root).as_posix() for path, _ in self.samples]


class LeftOut:
    """Names of what a listing does not take, by the reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """One more."""
        self.names.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        """All reasons with their counts and up to three names; empty if nothing was left out."""
        parts = []
        for reason, names in self.names.items():
            parts.append(f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        return f"; left out: {', '.join(parts)}" if parts else ""


def identity(path: str | Path) -> tuple[int, int]:
    """Equal for two paths of the same file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def classify(entry: os.DirEntry, extensions: tuple[str, ...]) -> str:
    """ "folder", "link" to a folder, "file" of a wanted extension, or the reason why the entry is left out."""
    try:
        if entry.name.startswith("."):
            return "hidden"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if not entry.name.lower().endswith(extensions):
            return "of other types"
        return "file" if entry.is_file() else "no regular files"  # a pipe would block its reader
    except OSError:
        return "unreadable"


def walk(top: str, extensions: tuple[str, ...], root: Path, left_out: LeftOut) -> list[tuple[str, str]]:
    """Sorted (folder, file name) of the files below `top`. Links are followed; no folder is entered twice.

    Folders come before links to folders, so that a link to a listed folder adds nothing.
    """
    files, folders, links, visited = [], [top], [], {identity(root)}
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            number, entries = identity(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out.add("unreadable", os.path.relpath(folder, root))
            continue
        if number in visited:
            left_out.add("links to listed folders", os.path.relpath(folder, root))
            continue
        visited.add(number)
        for entry in entries:
            kind = classify(entry, extensions)
            if kind == "file":
                files.append((folder, entry.name))
            elif kind in ("folder", "link"):
                (folders if kind == "folder" else links).append(entry.path)
            else:
                left_out.add(kind, os.path.relpath(entry.path, root))
    return sorted(files)


def refuse_parts(root: Path, files: dict[str, list[tuple[str, str]]], argument: str) -> None:
    """ValueError if the class folders are the parts of a data set, such as train and val."""
    if not files or not all(name.lower() in PARTS for name in files):
        return
    if len(files) > 1 or all(folder != str(root / name) for name in files for folder, _ in files[name]):
        part = root / ("train" if "train" in files else min(files))
        parts = f"{', '.join(files)}, the parts of a data set, not classes"
        raise ValueError(f"{root} ({argument}) holds {parts}; give the folder that holds the class folders, {part}")


def scan(
    root: Path, extensions: tuple[str, ...], left_out: LeftOut
) -> tuple[dict[str, list[tuple[str, str]]], list[tuple[str, str]]]:
    """The files of each folder of root by its name, and those in root itself, as (folder, file name)."""
    folders, loose = {}, []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        kind = classify(entry, extensions)
        if kind == "file":
            loose.append((str(root), entry.name))
        elif kind in ("folder", "link"):
            folders[entry.name] = walk(str(root / entry.name), extensions, root, left_out)
        else:
            left_out.add(kind, entry.name)
    return folders, loose


def list_folder(
    root: str | Path,
    extensions: tuple[str, ...] | None = None,
    class_num: int | None = None,
    argument: str = "data_path",
    classes: Sequence[str] = (),
    allow_flat: bool = False,
) -> ClassFolders:
    """The files below root/<class>/ with these extensions; default: all images that `read_image` decodes.

    Classes are the sorted names of the folders that hold such files, and those of `classes`, which keep their number
    when they are empty. Hidden files and folders, files beside the class folders, and empty class folders are left out;
    one line of the log counts everything. allow_flat: files of a root without class folders are one class, "".
    FileNotFoundError or ValueError naming root: absent, without files, over class_num classes, parts of a data set.
    """
    root, left_out = Path(root), LeftOut()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} ({argument}); expected one sub-folder per class in it")
    folders, loose = scan(root, extensions or image_extensions(), left_out)
    files = {name: found for name, found in folders.items() if found or name in classes}
    for name in sorted(folders.keys() - files.keys() - set(left_out.names.get("unreadable", ()))):
        left_out.add("empty class folders", name)
    if not classes:
        refuse_parts(root, files, argument)
    if allow_flat and not files and loose:
        files, loose = {"": loose}, []
    for _, name in loose:
        left_out.add("beside the class folders", name)
    names, what = sorted({*files, *classes}), "latents" if extensions else "images"
    samples = [(os.path.join(*path), number) for number, name in enumerate(names) for path in files.get(name, ())]
    if not samples:
        lacks = "no images" if allow_flat else f"no class folders; expected {root}/<class>/<file>"
        if folders and not allow_flat:
            lacks = f"class folders but no {' or '.join(e.lstrip('.') for e in extensions or ('image',))} files"
        raise FileNotFoundError(f"{root} ({argument}) holds {lacks}{left_out}")
    logger.info("%s: %d %s in %d classes%s", root, len(samples), what, len(names), left_out)
    if class_num is not None and len(names) > class_num:
        raise ValueError(f"{root} ({argument}) has {len(names)} class folders, more than {class_num} (class_num)")
    return ClassFolders(root, names, samples)


def spread_evenly(items: Sequence, count: int) -> list:
    """`count` items at equal distances, the first among them; all of them if there are not more.

    Of a list that is sorted by class, each class gets its share.
    """
    return list(items) if count >= len(items) else [items[i * len(items) // count] for i in range(count)]


def substitutes(seed: int, count: int) -> Iterator[int]:
    """Every number below `count` once, from a start and with a stride that are drawn from the seed."""
    start, stride = pick(seed, count), 1 + pick(mix(seed), count)
    while math.gcd(stride, count) > 1:
        stride += 1
    return ((start + i * stride) % count for i in range(count))


class BadImages:
    """The policy for unreadable images: "error" raises, "skip" logs each file once and counts it."""

    def __init__(self, policy: str):
        if policy not in BAD_IMAGE_CHOICES:
            choices = ", ".join(BAD_IMAGE_CHOICES)
            raise ArgumentError("on_bad_image", f"on_bad_image {policy!r} is not one of {choices}")
        self.skip, self.paths = policy == "skip", set()

    def report(self, error: ValueError, path: str) -> None:
        """Raise the error with the setting that skips it, or log it if the path is new."""
        if not self.skip:
            raise ValueError(f"{error}, or skip such images (on_bad_image)") from error
        if path not in self.paths:
            self.paths.add(path)
            logger.warning("skipped bad image %d: %s", len(self.paths), error)


class NumberedImages(Dataset):
    """An ImageFolderDataset's images by their number -> (image (3, S, S) in [-1, 1], number, readable)."""

    def __init__(self, folder: "ImageFolderDataset"):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, number: int) -> tuple[Tensor, int, bool]:
        try:
            return self.folder.load(number), number, True
        except ValueError as error:
            self.folder.bad.report(error, self.folder.samples[number][0])
            return torch.zeros(3, self.folder.img_size, self.folder.img_size), number, False


def readable_images(
    folder: "ImageFolderDataset",
    numbers: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    bad: list[int] | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """The images with these numbers in batches, (B, 3, S, S), and their numbers, each image once, none mirrored.

    A bad image is an error or, with on_bad_image "skip", left out and added to `bad`: another in its place would count
    twice in a measurement. Without a list `bad`, ValueError if not one can be read.
    """
    batches, found = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)], 0
    for images, own, readable in build_loader(NumberedImages(folder), batches, num_workers, pin_memory):
        found += int(readable.sum())
        if bad is not None:
            bad += own[~readable].tolist()
        if readable.any():
            yield images[readable], own[readable].tolist()
    if not found and bad is None:
        raise ValueError(f"{folder.folder.root} ({folder.argument}): none of its images can be read")


class ImageFolderDataset(Dataset):
    """root/<class>/<image> -> (image (3, S, S) float32 in [-1, 1], label), ADM-cropped to S = img_size.

    With index (i, seed) the image is mirrored with p = 0.5 if `flip`; with a bare i it never is. on_bad_image: "error",
    or "skip", which takes another image instead, so that batches keep their size. It is drawn from the whole set by the
    sample's seed (or, without one, by its number), so that no image has more than its share.
    """

    def __init__(
        self,
        root: str | Path,
        img_size: int,
        flip: bool = True,
        on_bad_image: str = "error",
        class_num: int | None = None,
        argument: str = "data_path",
    ):
        self.folder = list_folder(root, class_num=class_num, argument=argument)
        self.img_size, self.flip, self.bad, self.argument = img_size, flip, BadImages(on_bad_image), argument
        self.classes, self.labels, self.samples = self.folder.classes, self.folder.labels, self.folder.samples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tensor:
        """The cropped image (3, S, S), not mirrored; ValueError naming the file if it is corrupt."""
        return to_tensor(center_crop_adm(read_image(self.samples[index][0]), self.img_size))

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        first, seed = split_index(index)
        others = substitutes(mix(first) if seed is None else seed, len(self))
        for number in chain([first], others):
            path, label = self.samples[number]
            try:
                image = self.load(number)
            except ValueError as error:
                self.bad.report(error, path)
                continue
            mirrored = self.flip and seed is not None and coin(seed)
            return image.flip(-1) if mirrored else image, label
        raise ValueError(f"{self.folder.root} ({self.argument}): none of its images can be read")
