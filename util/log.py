"""Logging, what an unexpected error says, and the run's machine-readable log."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from util.files import replacing, writing
from util.json_reader import parse_json

if TYPE_CHECKING:  # torch takes seconds to import, which not every command needs
    from torch import Tensor


def get_logger() -> logging.Logger:
    """The project's logger; INFO from rank 0, warnings from every rank, on stderr."""
    logger = logging.getLogger("tokenbridge")
    if not logger.handlers:
        rank = os.environ.get("RANK", "0")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s " + (f"[rank {rank}] " if rank != "0" else "") + "%(message)s", "%H:%M:%S")
        )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
        logger.propagate = False
    return logger


def warn_once(message: str, *arguments: object) -> None:
    """A warning that all processes would give alike: from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        get_logger().warning(message, *arguments)


def log_lines(lines: Iterable[str]) -> None:
    """Each line at level INFO."""
    for line in lines:
        get_logger().info("%s", line)


def first_line(error: Exception | str) -> str:
    """The first line of an error's message, or its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__ * isinstance(error, Exception)])[0]


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Around a piece of work, or as a decorator: an unexpected error within says so (`util.cli.run_cli`)."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "doing"):  # the innermost one knows best
            error.doing = what
        raise


class JsonlLog:
    """Appends one JSON object per line to a file and, if asked, the same scalars to tensorboard. Only for rank 0.

    Lines of steps after `resume_step` are dropped on opening, so that a resumed run's log is that of one never stopped;
    so are lines that are no JSON. resume_epoch: the epoch of that step. Lines of epochs before it are kept whatever the
    number of their step, which another batch size has changed.
    """

    def __init__(
        self, path: Path, resume_step: int = 0, tensorboard_dir: Path | None = None, resume_epoch: int | None = None
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        last, kept = resume_step, list[bytes]()
        for line in path.read_bytes().splitlines() if path.exists() else ():
            step, epoch = _step_and_epoch(line)
            if step is None:
                continue
            before = epoch < resume_epoch if None not in (epoch, resume_epoch) and epoch != resume_epoch else None
            if before or before is None and step <= resume_step:
                kept.append(line)
                last = max(last, step)
        with replacing(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = None
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; only for runs that write it

            purge = resume_step + 1 if last == resume_step else None  # it would hide steps of another batch size
            self.board = SummaryWriter(str(tensorboard_dir), purge_step=purge)

    def write(self, record: dict) -> None:
        """`record` holds "step" and numbers (or lists of numbers)."""
        with writing(self.file.name):
            self.file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        if self.board is None:
            return
        with writing(self.board.log_dir):
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(key, value, record["step"])
                for i, number in enumerate(value if isinstance(value, list) else ()):
                    self.board.add_scalar(f"{key}/{i:02d}", number, record["step"])

    def write_image(self, name: str, image: "Tensor", step: int) -> None:
        """An image (3, H, W) in [-1, 1], for tensorboard only."""
        if self.board is not None:
            with writing(self.board.log_dir):
                self.board.add_image(name, (image + 1) / 2, step)

    def close(self) -> None:
        """Close the file and tensorboard's."""
        with writing(self.file.name):
            self.file.close()
        if self.board is not None:
            with writing(self.board.log_dir):
                self.board.close()


def _step_and_epoch(line: bytes) -> tuple[int | None, int | None]:
    """Numbers in a line of a log; None where it has none, as in what a kill or a bad disk left."""
    try:
        record = parse_json(line)
    except ValueError:
        return None, None
    numbers = (record.get(name) if isinstance(record, dict) else None for name in ("step", "epoch"))
    step, epoch = (number if type(number) is int else None for number in numbers)
    return step, epoch
