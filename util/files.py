"""Writing files so that a kill leaves the old content or the new, never half of one."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` (its folder is made) when the block ends without an error.

    Its own name is fixed, .NAME.tmp beside `path`, so that writing again replaces what a kill left behind; one process at a time may write.
    sync: on the disk (fsync) before it is renamed, for files that must survive a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk: a rename survives a power cut only after that. Nothing where folders cannot be opened."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(number)


def write_json(path: str | Path, content: object) -> None:
    """`content` as indented JSON, on the disk before it replaces `path`."""
    with replacing(path, sync=True) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as sha256sum prints it; of a folder, over its files' names and contents."""
    path, digest = Path(path), hashlib.sha256()
    for one in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if one != path:
            digest.update(str(one.relative_to(path)).encode())
        with one.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()
