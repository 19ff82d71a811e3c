"""The checkpoints of a folder: a background writer, which keeps numbered ones, and the latest that can be read."""

import hashlib
import os
import re
import threading
import zipfile
from pathlib import Path

from util.checkpoint import LAST, atomic_save, find_file, read_file
from util.files import second_name, set_aside, write_json
from util.json_reader import read_json
from util.log import get_logger

logger = get_logger()
LISTING = "checkpoints.json"  # which numbered ones the folder's run wrote: name -> `file_mark` when it was complete
NUMBERED = "checkpoint-{:08d}.pth"  # by step; beside LAST with --keep_last 2 or more
NUMBER = re.compile(r"checkpoint-\d{8}\.pth")
MARKED = 2**16  # bytes at the end of a file that `file_mark` reads: in a zip file, the checksums of its parts


class CheckpointWriter:
    """Writes checkpoints of one folder in a background thread, one at a time: `save` waits for the file before it.

    keep_last: with 1, checkpoint-last.pth alone; with more, so many checkpoint-<step>.pth too, the newest of which
    checkpoint-last.pth is another name for. Only those are counted, replaced and deleted that this run wrote and that
    are as it wrote them, which checkpoints.json records; it is the run of the folder's checkpoint-last.pth. Another
    run's file of the same step is renamed. An error in the thread is raised by the next `save` or `close`.
    """

    def __init__(self, folder: Path, keep_last: int = 1):
        self.folder, self.keep_last = folder, keep_last
        self.written: dict[str, str] = {}  # name -> mark of this run's numbered checkpoints, in the order of writing
        if keep_last > 1 and (folder / LAST).exists():
            self.written = read_listing(folder)
            for path in numbered(folder)[-1:]:  # if a kill came before it was listed
                unlisted = path.name not in self.written and zipfile.is_zipfile(path)
                if unlisted and file_mark(path) == file_mark(folder / LAST):
                    self.written[path.name] = file_mark(path)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, content: dict) -> None:
        """Begin to write `content`; its tensors are on the CPU and used by nobody else, and it has a "step"."""
        self.close()
        self._thread = threading.Thread(target=self._run, args=(content,), name="checkpoint writer")
        self._thread.start()

    def close(self) -> None:
        """Wait until the file is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what kept a file from the disk, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, content: dict) -> None:
        try:
            self._write(content)
        except Exception as error:  # raised in the main thread
            self._error = error

    def _write(self, content: dict) -> None:
        last = self.folder / LAST
        atomic_save(content, last)
        if self.keep_last > 1:
            self._keep(last, self.folder / NUMBERED.format(content["step"]))
        logger.info("wrote %s at step %d", last, content["step"])

    def _keep(self, last: Path, path: Path) -> None:
        """Let `path` be another name of `last`, and delete the oldest of this run's good ones that are too many."""
        if path.name not in self.written and path.exists():
            logger.warning("%s is another run's: it is now %s", path, set_aside(path).name)
        second_name(last, path)
        self.written.pop(path.name, None)
        self.written[path.name] = file_mark(path)
        good = [name for name, mark in self.written.items() if file_mark(self.folder / name) == mark]
        for name in good[: -self.keep_last]:
            (self.folder / name).unlink()
        self.written = {name: mark for name, mark in self.written.items() if (self.folder / name).exists()}
        write_json(self.folder / LISTING, self.written)


def load_latest(resume: str | Path, mmap: bool = False) -> tuple[Path, dict]:
    """As `read_file`; of a folder whose checkpoint-last.pth cannot be read, the newest numbered one that can.

    Files that are skipped are logged. ValueError or FileNotFoundError of the first candidate if none can be read.
    """
    first, older = find_file(resume), []
    if Path(resume).is_dir():
        listed = read_listing(Path(resume))  # others in the folder are another run's
        there = [path for path in numbered(Path(resume)) if not listed or path.name in listed]
        older = [path for path in reversed(there) if not (first.exists() and path.samefile(first))]
    failure: Exception | None = None
    for path in [first, *older]:
        try:
            content = read_file(path, "resume", mmap)
        except (ValueError, OSError) as error:
            failure = failure or error
            logger.warning("skipped: %s", error)
            continue
        if failure is not None:
            logger.warning("the checkpoint before it is taken instead: %s", path)
        return path, content
    raise failure


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of single steps in the folder, oldest first."""
    return sorted(folder.glob("checkpoint-" + "[0-9]" * 8 + ".pth"))


def read_listing(folder: Path) -> dict[str, str]:
    """What LISTING says; nothing if there is none, or it cannot be read."""
    try:
        listed = read_json(folder / LISTING)
    except (OSError, ValueError):
        return {}
    return {name: mark for name, mark in listed.items() if isinstance(mark, str) and NUMBER.fullmatch(name)}


def file_mark(path: Path) -> str:
    """Size and hash of the end of a file: other content, or a truncated file, has another mark. "" if unreadable."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - MARKED, 0))
            return f"{size}-{hashlib.sha256(file.read()).hexdigest()}"
    except OSError:
        return ""
