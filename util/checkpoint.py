"""Checkpoint files: written whole or not at all, in the background; read without running code; the newest whole one found."""

import os
import platform
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import torch

from util import dist
from util.files import replacing, sync_folder
from util.log import get_logger

logger = get_logger()

LAST = "checkpoint-last.pth"
NUMBERED = "checkpoint-{:08d}.pth"  # by step; beside LAST with --keep_last 2 or more


def atomic_save(content: object, path: str | Path) -> None:
    """torch.save to a temporary file beside `path`, fsync, rename: a kill leaves the old file or the new one, never half of one."""
    with replacing(path, sync=True) as file:
        torch.save(content, file)


def load_file(path: str | Path, flag: str = "--resume", mmap: bool = False) -> dict:
    """The dict in a checkpoint file, on the CPU. FileNotFoundError or ValueError naming flag and file; code in it is never run."""
    from checkpoints.weights import read_file  # the one place that reads checkpoints; util knows no model when imported

    return read_file(path, flag, mmap)


def resolve(resume: str) -> Path:
    """--resume DIR means DIR/checkpoint-last.pth, or DIR/model.safetensors where there is only that; a file is taken as it is."""
    from checkpoints.weights import find_file

    return find_file(resume)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of single steps in the folder, oldest first."""
    return sorted(folder.glob("checkpoint-" + "[0-9]" * 8 + ".pth"))


def load_latest(resume: str, mmap: bool = False) -> tuple[Path, dict]:
    """As `load_file`; of a folder whose checkpoint-last.pth is damaged or absent, the newest numbered checkpoint that is whole.

    Says so when it leaves one out. ValueError or FileNotFoundError of the first candidate if none can be read.
    """
    first, older = resolve(resume), []
    if Path(resume).is_dir():
        older = [path for path in reversed(numbered(Path(resume))) if not (first.exists() and path.samefile(first))]
    failure: Exception | None = None
    for path in [first, *older]:
        try:
            content = load_file(path, mmap=mmap)
        except (ValueError, OSError) as error:
            failure = failure or error
            logger.warning("left out: %s", error)
            continue
        if failure is not None:
            logger.warning("the checkpoint before it is taken instead: %s", path)
        return path, content
    raise failure


# ------------------------------------------------------------------------------------------------------------- writing


class CheckpointWriter:
    """Writes checkpoints of one folder in a background thread, one at a time: `save` waits for the file before it.

    keep_last: with 1, checkpoint-last.pth alone; with more, so many checkpoint-<step>.pth too, the newest of which checkpoint-last.pth is
    another name for. An error in the thread is raised by the next `save` or `close`.
    """

    def __init__(self, folder: Path, keep_last: int = 1):
        self.folder, self.keep_last = folder, keep_last
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, content: dict) -> None:
        """Begin to write `content`, whose tensors are on the CPU and nobody's but the writer's, and which has a "step"."""
        self.close()
        self._thread = threading.Thread(target=self._run, args=(content,), name="checkpoint writer")
        self._thread.start()

    def close(self) -> None:
        """Wait until the file is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
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
        if self.keep_last == 1:
            atomic_save(content, last)
        else:
            path = self.folder / NUMBERED.format(content["step"])
            atomic_save(content, path)
            second_name(path, last)
        logger.info("wrote %s at step %d", last, content["step"])
        if self.keep_last > 1:
            for path in numbered(self.folder)[: -self.keep_last]:
                path.unlink()


def second_name(path: Path, name: Path) -> None:
    """Let `name` be the file `path` too, in one step: a hard link, or a copy where the file system has none."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)
        sync_folder(name.parent)
    finally:
        temporary.unlink(missing_ok=True)  # still there if both names were one file before


def versions() -> dict[str, str]:
    """Of what decides the last bit of a run's numbers."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


# ------------------------------------------------------------------------------------------------------------- random state


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python: what draws from them is then the same in every run."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device: torch.device) -> dict:
    """This process's global generators: torch's on the CPU and on the device, numpy's, Python's; in types that weights_only reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "device": dist.device_random_state(device),
        "numpy": [name, keys.tolist(), *rest],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict, device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    dist.set_device_random_state(device, state["device"])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


# ------------------------------------------------------------------------------------------------------------- weights


def load_state(module: torch.nn.Module, state: dict, source: str) -> None:
    """Strict load_state_dict whose ValueError names the file and the first keys that do not fit; NaN is refused too."""
    from checkpoints.weights import load_state as load

    load(module, state, source)
