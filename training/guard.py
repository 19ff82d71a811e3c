"""What every training asks before it starts, before it writes a checkpoint, and after steps that were skipped.

No broken checkpoint takes the place of a good one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.settings import LoopSettings
from training.sharding import local
from util import dist
from util.log import warn_once
from util.options import ArgumentError


@dataclass
class SkippedSteps:
    """Counts the steps that changed no weight, because their loss or gradient was not finite; on all ranks alike."""

    in_row: int = 0  # the last ones
    total: int = 0
    steps: int = 0  # skipped or not, since this process started

    def count(self, finite: bool) -> None:
        """One more step."""
        self.in_row = 0 if finite else self.in_row + 1
        self.total += not finite
        self.steps += 1

    def warn(self, step: int, finished: bool) -> None:
        """At the end of a run, after step `step`: how many were skipped, and whether the last one was.

        The last one alone: a finished run whose last two were skipped ended with an error (`check_bad_steps`).
        """
        if self.total > 1:
            counts = self.total, self.steps, 100 * self.total / self.steps
            warn_once("%d of %d steps (%.3g %%) were skipped: their loss or gradient was not finite", *counts)
        if finished and self.in_row:
            what = (
                "the last step, %d, was skipped (its loss or gradient was not finite): the weights are those of step %d"
            )
            warn_once(what, step, step - self.in_row)


def check_same_start(dataset: Dataset, content: Mapping | None, resume: str) -> None:
    """ValueError on every process unless all have the same data and the same checkpoint `content` of `resume`, or none.

    A folder that is not on a shared disk would otherwise leave the processes waiting for each other.
    """
    dist.check_same((len(dataset), list(dataset.classes)), "the training data (--data_path, --cached_path)")
    dist.check_same(content and (content.get("epoch"), content.get("step")), f"{resume} (--resume)")


def may_save(
    step: int, bad_in_row: int, weights: Mapping[str, Tensor], lr: float, *, final: bool, saved: int | None
) -> bool:
    """Whether a training may write its checkpoint. Every process asks, and all get the same answer.

    Not while steps are being skipped, except for one at the end of the run: they changed no weight. saved: the step of
    the last checkpoint. ArgumentError if a weight or an average is not finite.
    """
    if bad_in_row and not final:
        stays = "there is none yet" if saved is None else f"that of step {saved} stays"
        warn_once("no checkpoint at step %d: the last %d steps were skipped; %s", step, bad_in_row, stays)
        return False
    check_finite(weights, step, lr)
    return True


def check_bad_steps(bad_in_row: int, settings: LoopSettings, step: int, *, loss: float, norm: float, lr: float) -> None:
    """ArgumentError if too many steps in a row, up to `step`, were skipped: their loss or gradient was not finite.

    Too many are max_bad_steps; at the last step of the run two, since a single overflow of fp16 may fall there, and
    one if it is the run's only step and its loss is not finite. So no run ends well whose last losses are all NaN.
    """
    allowed = settings.max_bad_steps
    if step == settings.total_steps:
        allowed = min(allowed, 2 if math.isfinite(loss) else min(2, step))
    if bad_in_row >= allowed:
        raise ArgumentError(
            "max_bad_steps",
            f"{bad_in_row} steps in a row had a loss or gradient that is not finite; stopped at step {step} with "
            f"lr {lr:.3g}, loss {loss}, grad norm {norm}. Those steps changed no weight and the files written so "
            "far are as they were. Check the data, lower the learning rate or grad_clip, or use precision bf16 or fp32",
        )


def stop_message(step: int, total: int, saved: int | None, folder: object) -> str:
    """How a run that a signal stopped goes on."""
    again = f"the same command with --resume {folder} continues"
    if saved != step:
        again += " from the beginning" if saved is None else f" from the checkpoint of step {saved}"
    return f"stopped by a signal after step {step} of {total}; {again}"


def check_finite(weights: Mapping[str, Tensor], step: int, lr: float) -> None:
    """ArgumentError, on every process, if a value is NaN or infinite. One host sync."""
    finite = torch.stack([torch.isfinite(local(value.detach())).all() for value in weights.values()]).tolist()
    own = [name for name, good in zip(weights, finite, strict=True) if not good]
    broken = list(dict.fromkeys(name for names in dist.gather_objects(own) for name in names))
    if broken:
        raise ArgumentError(
            "lr",
            f"{len(broken)} weights are NaN or infinite at step {step} with lr {lr:.3g}, first: {broken[0]}; the files "
            "written so far are as they were. Lower the learning rate",
        )
