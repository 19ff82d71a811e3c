"""The one listing of class folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.images import image_extensions
from util.log import get_logger

logger = get_logger()
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


def refuse_parts(root: Path, files: dict[str, list[tuple[str, str]]], argument: str) -> None:
    """ValueError if the class folders are the parts of a data set, such as train and val."""
    if not files or not all(name.lower() in PARTS for name in files):
        return
    if len(files) > 1 or all(folder != str(root / name) for name in files for folder, _ in files[name]):
        part = root / ("train" if "train" in files else min(files))
        parts = f"{', '.join(files)}, the parts of a data set, not classes"
        raise ValueError(f"{root} ({argument}) holds {parts}; give the folder that holds the class folders, {part}")


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


def identity(path: str | Path) -> tuple[int, int]:
    """Equal for two paths of the same file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
