"""Checkpoint files: written whole or not at all, read without running code."""

import argparse
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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path} ({flag})")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):       # published checkpoints keep their arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(f"{path} ({flag}) cannot be read as a checkpoint; it is cut short, another kind of file, or holds code: "
                         f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({flag}) is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def resolve(resume: str) -> Path:
    """--resume DIR means DIR/checkpoint-last.pth; a file is taken as it is."""
    path = Path(resume)
    return path if path.is_file() else path / LAST


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"no tensor but {type(value).__name__}"


def load_state(module: torch.nn.Module, state: dict, source: str) -> None:
    """Strict load_state_dict whose ValueError names the file and the first keys that do not fit; NaN is refused too."""
    own = module.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    wrong = [f"{k}: file {_shape(state[k])}, model {_shape(own[k])}" for k in own if k in state and _shape(state[k]) != _shape(own[k])]
    problems = [f"lacks {len(missing)} keys ({', '.join(missing[:3])})"] if missing else []
    problems += [f"has {len(extra)} unknown keys ({', '.join(extra[:3])})"] if extra else []
    problems += [f"has {len(wrong)} weights of another shape ({'; '.join(wrong[:3])})"] if wrong else []
    if problems:
        raise ValueError(f"{source} does not fit the model (--model, --img_size, --quant_bits, --buffer_size, --class_num): {' and '.join(problems)}")
    not_finite = [k for k in own if k != "channel_mask" and not torch.isfinite(state[k]).all()]
    if not_finite:
        raise ValueError(f"{source} holds NaN or infinite weights, first: {', '.join(not_finite[:3])}")
    module.load_state_dict(state, strict=True)
