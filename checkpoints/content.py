"""Which checkpoint a command starts from, and the content of its file, checked, in one layout."""

import os
from pathlib import Path

from checkpoints.published import one_layout, other_weights
from util.checkpoint import LAST, find_file, read_file
from util.checkpoint_folder import load_latest, numbered
from util.json_reader import check_schema
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()
# What the files of a model say of it (util.json_reader.check_schema); published ones have no config.
ARGS = {"vae_path?": str, "quantizer?": str, "ema_rate?": (float, None), "ema_warmup?": bool}
CONFIG = {"model_name": str, "model": dict, "vae": dict, "vae_fingerprint": str, "args?": (ARGS, None)}
CONTENT = {"config?": (CONFIG | {"classes?": ([str], None)}, None), "step?": int}


def read_checkpoint(
    resume: str, output_dir: str, *, trains: bool, reset_classes: bool = False
) -> tuple[Path | None, dict | None]:
    """The checkpoint to resume, and its content; with reset_classes, to take weights from for a new run.

    None if training starts from random weights: `resume` is empty, or a folder without a checkpoint. ArgumentError if
    training would overwrite another run's checkpoint, or the file is none of this model's.
    """
    if trains and not continues_run_in(output_dir, resume):
        refuse_other_run(Path(output_dir))
    if reset_classes and (not trains or continues_run_in(output_dir, resume)):
        reason = f"trains a new run from the weights of {resume}: leave it out to continue, evaluate or sample"
        raise ArgumentError("reset_classes", f"reset_classes {reason}")
    if trains and not resume and not reset_classes:
        logger.info("nothing to resume: training starts from random weights")
        return None, None
    if not resume:
        advice = f"give a checkpoint or a folder with {LAST}"
        what = "reset_classes needs" if trains else "evaluation and sampling need"
        raise ArgumentError("resume", f"{what} trained weights: {advice}")
    path, is_folder = find_file(resume), Path(resume).suffix not in (".pth", ".pt", ".ckpt")
    if trains and not reset_classes and is_folder and not path.is_file() and not numbered(Path(resume)):
        logger.info("no %s in %s: training starts from random weights", LAST, resume)
        return None, None
    path, content = load_latest(resume) if trains else (path, read_generator(path, "resume"))
    return path, _checked_content(content, path, trains and not reset_classes)


def _checked_content(content: dict, path: Path, continues: bool) -> dict:
    """The content in one layout. ArgumentError if training cannot continue from it, or its config is not a model's."""
    try:
        content = model_content(content, str(path))
    except ValueError as error:
        raise ArgumentError("resume", str(error)) from error
    if continues and "weights" in content:
        reason = "it generates images, but a training cannot be continued from it"
        raise ArgumentError("resume", f"{path} holds one set of weights only: {reason}")
    return content


def continues_run_in(output_dir: str | Path, resume: str | Path) -> bool:
    """Whether `resume` is the folder `output_dir`, or the checkpoint-last.pth in it."""

    def same(one: Path, other: Path) -> bool:
        return one.exists() and other.exists() and one.samefile(other)

    if not resume:
        return False
    return same(find_file(resume), Path(output_dir) / LAST) or same(Path(resume), Path(output_dir))


def refuse_other_run(folder: Path) -> None:
    """ArgumentError if the folder holds checkpoints, which a run that does not continue them would replace."""
    there = [path.name for path in numbered(folder)]
    names = f"a {LAST}" if os.path.lexists(folder / LAST) else ", ".join(there[:3] + ["..."] * (len(there) > 3))
    if names:
        advice = f"continue it with --resume {folder}, or choose another folder"
        raise ArgumentError("output_dir", f"{folder} already holds {names}: {advice}")


def read_generator(path: Path, argument: str = "") -> dict:
    """A checkpoint to generate images with: its optimizer state stays on the disk, unread."""
    return read_file(path, argument, mmap=True, unchecked=["optimizer"])


def model_content(content: dict, source: str) -> dict:
    """`one_layout` of a file of a TokenBridge model. ValueError, which names `source`, for weights of another model."""
    content = one_layout(content, source)
    if other := other_weights(content["model"]):
        raise ValueError(f"{source} holds the weights of {other}")
    try:
        check_schema(content, CONTENT, "the file")
    except ValueError as error:
        raise ValueError(f"{source} does not describe a TokenBridge model: {error}") from error
    return content


def class_names(content: dict) -> list[str]:
    """The names of the classes by number, as training recorded them; none for a published file."""
    config = content.get("config")
    names = config.get("classes") if isinstance(config, dict) else None
    return list(map(str, names)) if isinstance(names, (list, tuple)) else []
