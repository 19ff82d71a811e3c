"""Learning rate (docs/spec.md 7): linear warm-up per iteration, then half a cosine to min_lr, or constant."""

import math

from util.options import ArgumentError

LR_SCHEDULES = ("cosine", "constant")


def base_learning_rate(lr: float | None, blr: float, global_batch: int) -> float:
    """--lr if given, else blr * global batch / 256."""
    return lr if lr is not None else blr * global_batch / 256


def learning_rate(
    epoch: float, *, peak: float, min_lr: float, schedule: str, warmup_epochs: float, epochs: float
) -> float:
    """Learning rate at a fractional epoch: of the iteration after `step` optimizer steps, epoch = step / steps per
    epoch, as published.

    So the first iteration of a warm-up has rate 0. ValueError that lists the choices for an unknown schedule.
    """
    if schedule not in LR_SCHEDULES:
        raise ArgumentError(
            "lr_schedule", f"lr_schedule {schedule!r} is unknown; choose from {', '.join(LR_SCHEDULES)}"
        )
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "constant":
        return peak
    progress = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9))
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
