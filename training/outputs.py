"""What a training run writes to its folder: checkpoints, snapshots of its averages, the log, sample grids."""

from pathlib import Path
from typing import Self

from torch import Tensor

from checkpoints.content import continues_run_in
from training import posthoc_ema
from training.guard import may_save
from training.settings import RunSettings, TrainSettings
from training.state import TrainState
from util import dist
from util.checkpoint import LAST
from util.checkpoint_folder import CheckpointWriter
from util.files import remove_leftovers, set_aside
from util.log import JsonlLog, get_logger

logger = get_logger()

LOG = "log.jsonl"


def open_log(path: Path, own: bool, step: int, epoch: int | None = None, board: Path | None = None) -> JsonlLog:
    """The log of a run that continues after `step`. The log of another run (not `own`) is renamed, never mixed with it.

    epoch: the number of the epoch that `step` is in, where batch size or data may have changed the steps' numbers.
    """
    if not own and path.exists() and path.stat().st_size:
        logger.warning("%s is the log of another run: it is now %s", path, set_aside(path).name)
    return JsonlLog(path, step, board, epoch)


class RunOutputs:
    """A context manager, entered by every process; files are written by rank 0, checkpoints in the background.

    config and data go into every checkpoint. Entering makes the folder, so a run that is refused leaves none behind.
    """

    def __init__(self, run: RunSettings, settings: TrainSettings, state: TrainState, *, config: dict, data: dict):
        self.run, self.settings, self.state, self.config, self.data = run, settings, state, config, data
        self.folder = Path(run.output_dir)
        self.continues = continues_run_in(run.output_dir, run.resume)
        self.asked: int | None = None  # the last step whose checkpoint was due
        # step of the last checkpoint in the folder
        self.saved = state.step if self.continues and (self.folder / LAST).exists() else None
        self.log: JsonlLog | None = None
        self.snapshots: posthoc_ema.SnapshotWriter | None = None

    def __enter__(self) -> Self:
        if dist.is_main() and self.continues:
            remove_leftovers(self.folder, LAST, LOG)
        self.writer = CheckpointWriter(self.folder, self.run.keep_last)
        if self.state.power_emas:
            self.snapshots = posthoc_ema.SnapshotWriter(self.folder, self.config["run"], self.state.step)
        if dist.is_main():
            where = self.state.step, self.state.step // self.settings.steps_per_epoch
            self.log = open_log(self.folder / LOG, self.continues, *where, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.snapshots, self.writer, self.log):
            if part is not None:
                part.close()

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.state.step % every == 0

    def due(self) -> bool:
        """Whether something is to be written after this step, within an epoch."""
        return self._is_due(self.run.save_every_steps) or self._is_due(self.settings.posthoc_ema_freq)

    def after_step(self) -> None:
        """Snapshots and checkpoints that are due within an epoch; raises what kept the one before from the disk."""
        self.writer.raise_error()
        if self._is_due(self.settings.posthoc_ema_freq):
            self.save_averages()
        if self._is_due(self.run.save_every_steps):
            self.save_checkpoint()

    def _may_save(self) -> bool:
        state, final = self.state, self.state.step >= self.settings.total_steps
        lr = state.optimizer.param_groups[0]["lr"]
        return may_save(state.step, state.skipped.in_row, state.weights(), lr, final=final, saved=self.saved)

    def save_averages(self) -> None:
        """A snapshot of the averages of --posthoc_ema_freq, once for each step, unless steps are being skipped."""
        if self.snapshots is not None and self._may_save():
            self.snapshots.take(self.state.step, self.state.power_emas, self.state.fsdp)

    def save_checkpoint(self) -> None:
        """Begin to write checkpoint-last.pth, once for each step; its snapshots are on the disk before it.

        Nothing is written while steps are being skipped; ArgumentError if a weight is not finite.
        """
        if self.asked == self.state.step:
            return
        self.asked = self.state.step
        if not self._may_save():
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
