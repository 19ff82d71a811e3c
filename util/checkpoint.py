"""Checkpoint files: written whole or not at all, read without running code."""

from pathlib import Path

import torch

from util.files import replacing

LAST = "checkpoint-last.pth"


def atomic_save(content: object, path: str | Path) -> None:
    """torch.save to a temporary file beside `path`, fsync, rename: a kill leaves the old file or the new one, never half of one."""
    with replacing(path, sync=True) as file:
        torch.save(content, file)


def load_file(path: str | Path, flag: str = "--resume", mmap: bool = False) -> dict:
    """The dict in a checkpoint file, on the CPU. FileNotFoundError or ValueError naming flag and file; code in it is never run."""
    from models.weights import read_file  # the one place that reads checkpoints; util knows no model when imported
    return read_file(path, flag, mmap)


def resolve(resume: str) -> Path:
    """--resume DIR means DIR/checkpoint-last.pth, or DIR/model.safetensors where there is only that; a file is taken as it is."""
    from models.weights import find_file
    return find_file(resume)


def load_state(module: torch.nn.Module, state: dict, source: str) -> None:
    """Strict load_state_dict whose ValueError names the file and the first keys that do not fit; NaN is refused too."""
    from models.weights import load_state as load
    load(module, state, source)
