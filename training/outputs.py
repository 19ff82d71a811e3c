"""What a training run writes to its folder: checkpoints, snapshots of its averages, the log, sample grids."""

from pathlib import Path
from typing import Self

from torch import Tensor

from training import posthoc_ema
from training.settings import RunSettings, TrainSettings
from training.state import TrainState
from util import dist
from util.checkpoint import CheckpointWriter
from util.cli import check_writable
from util.log import JsonlLog


class RunOutputs:
    """A context manager, entered by every process; files are written by rank 0, checkpoints in the background.

    config and data go into every checkpoint. Entering makes the folder, so a run that is refused leaves none behind.
    """

    def __init__(self, run: RunSettings, settings: TrainSettings, state: TrainState, *, config: dict, data: dict):
        self.run, self.settings, self.state, self.config, self.data = run, settings, state, config, data
        self.folder = Path(run.output_dir)
        self.saved: int | None = None  # step of the last checkpoint
        self.log: JsonlLog | None = None
        self.snapshots: posthoc_ema.SnapshotWriter | None = None

    def __enter__(self) -> Self:
        check_writable(self.folder, "--output_dir")
        self.writer = CheckpointWriter(self.folder, self.run.keep_last)
        if self.state.power_emas:
            self.snapshots = posthoc_ema.SnapshotWriter(self.folder, self.config["run"], self.state.step)
        if dist.is_main():
            self.log = JsonlLog(self.folder / "log.jsonl", self.state.step, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.snapshots, self.writer, self.log):
            if part is not None:
                part.close()

    def checkpoint_due(self) -> bool:
        """Whether save_every_steps asks for a checkpoint after this step."""
        every = self.run.save_every_steps
        return every is not None and self.state.step % every == 0

    def after_step(self) -> None:
        """Snapshots and checkpoints that are due within an epoch."""
        every = self.settings.posthoc_ema_freq
        if every and self.state.step % every == 0:
            self.save_averages()
        if self.checkpoint_due():
            self.save_checkpoint()

    def save_averages(self) -> None:
        """A snapshot of the averages of --posthoc_ema_freq, once for each step."""
        if self.snapshots is not None:
            self.snapshots.take(self.state.step, self.state.power_emas, self.state.fsdp)

    def save_checkpoint(self) -> None:
        """Begin to write checkpoint-last.pth, once for each step; its snapshots are on the disk before it."""
        if self.saved == self.state.step:
            return
        self.saved = self.state.step
        epoch, done = divmod(self.state.step, self.settings.steps_per_epoch)
        content = self.state.snapshot(self.settings.steps_per_epoch)
        if self.snapshots is not None:
            self.snapshots.close()
        if content is not None:
            self.writer.save(
                content | {"config": self.config, "data": self.data | {"epoch": epoch, "steps_done": done}}
            )

    def sample_path(self) -> Path:
        """The file of the sample grid of this step."""
        return self.folder / "samples" / f"step-{self.state.step:08d}.png"

    def log_image(self, name: str, image: Tensor | None) -> None:
        """An image (3, H, W) in [-1, 1], for tensorboard."""
        if self.log is not None and image is not None:
            self.log.write_image(name, image, self.state.step)
