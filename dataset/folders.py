"""Folders of images: the one listing of class folders, and the data set of its images."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from dataset.images import center_crop_adm, read_image, to_tensor
from dataset.loader import Index, split_index
from util.log import get_logger
from util.options import ArgumentError
from util.seeds import coin

logger = get_logger()
BAD_IMAGE_CHOICES = ("error", "skip")


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


def list_folder(
    root: str | Path,
    extensions: tuple[str, ...] = IMG_EXTENSIONS,
    class_num: int | None = None,
    flag: str = "--data_path",
) -> ClassFolders:
    """The files of root/<class>/ with these extensions. Errors name root: absent, empty, over class_num classes."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} ({flag}); expected one sub-folder per class in it")
    try:
        classes, numbers = find_classes(str(root))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} ({flag}) holds no class folders; expected {root}/<class>/<file>") from error
    samples = make_dataset(str(root), numbers, extensions, allow_empty=True)
    if not samples:
        kinds = "/".join(extension.lstrip(".") for extension in extensions)
        raise FileNotFoundError(f"{root} ({flag}) holds class folders but no {kinds} files")
    if class_num is not None and len(classes) > class_num:
        raise ValueError(f"{root} ({flag}) has {len(classes)} class folders, more than --class_num {class_num}")
    return ClassFolders(root, classes, samples)


def list_images(folder: Path, flag: str) -> list[Path]:
    """All images below a folder, with or without class folders, sorted by path. FileNotFoundError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        kinds = ", ".join(extension.lstrip(".") for extension in IMG_EXTENSIONS)
        raise FileNotFoundError(f"{folder} ({flag}) holds no images ({kinds})")
    return files


class BadImages:
    """The policy for unreadable images: "error" raises, "skip" logs each file once and counts it."""

    def __init__(self, policy: str):
        if policy not in BAD_IMAGE_CHOICES:
            choices = ", ".join(BAD_IMAGE_CHOICES)
            raise ArgumentError("on_bad_image", f"on_bad_image {policy!r} is not one of {choices}")
        self.skip, self.paths = policy == "skip", set()

    def report(self, error: ValueError, path: str) -> None:
        """Raise the error with the flag that skips it, or log it if the path is new."""
        if not self.skip:
            raise ValueError(f"{error}, or pass --on_bad_image skip") from error
        if path not in self.paths:
            self.paths.add(path)
            logger.warning("skipped bad image %d: %s", len(self.paths), error)


class ImageFolderDataset(Dataset):
    """root/<class>/<image> -> (image (3, S, S) float32 in [-1, 1], label), ADM-cropped to S = img_size.

    With index (i, seed) the image is mirrored with p = 0.5 if `flip`; with a bare i it never is. on_bad_image: "error",
    or "skip", which takes the next readable image instead, so that batches keep their size.
    """

    def __init__(
        self,
        root: str | Path,
        img_size: int,
        flip: bool = True,
        on_bad_image: str = "error",
        class_num: int | None = None,
        flag: str = "--data_path",
    ):
        self.folder = list_folder(root, class_num=class_num, flag=flag)
        self.img_size, self.flip, self.bad, self.flag = img_size, flip, BadImages(on_bad_image), flag
        self.classes, self.labels, self.samples = self.folder.classes, self.folder.labels, self.folder.samples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tensor:
        """The cropped image (3, S, S), not mirrored; ValueError naming the file if it is corrupt."""
        return to_tensor(center_crop_adm(read_image(self.samples[index][0]), self.img_size))

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        first, seed = split_index(index)
        for offset in range(len(self)):
            number = (first + offset) % len(self)
            path, label = self.samples[number]
            try:
                image = self.load(number)
            except ValueError as error:
                self.bad.report(error, path)
                continue
            mirrored = self.flip and seed is not None and coin(seed)
            return image.flip(-1) if mirrored else image, label
        raise ValueError(f"{self.folder.root} ({self.flag}): none of its images can be read")
