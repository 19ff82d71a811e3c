"""Progress of a training: one line on the terminal, the same numbers in the log and in tensorboard, the stop after bad
steps.

Numbers stay on the device until a line is due; then all of the window are fetched together. Nothing else waits for
them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from training.guard import SkippedSteps, check_bad_steps
from training.settings import LoopSettings
from util import dist
from util.log import JsonlLog, get_logger

logger = get_logger()


@dataclass
class Window:
    """Steps whose numbers are still on the device."""

    losses: list[Tensor] = field(default_factory=list)  # of each step: (), or (P,) with P named parts, the loss first
    norms: list[Tensor] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    details: Tensor | None = None  # (2, C): loss and accuracy of each dimension, of the last step
    flops: float = 0.0  # of all processes
    data_wait: float = 0.0  # seconds
    started: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """The numbers of one step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.lrs.append(lr)


def duration(seconds: float) -> str:
    """h:mm:ss, with days before it when there are any."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours // 24}d " if hours >= 24 else "") + f"{hours % 24}:{minutes:02d}:{s:02d}"


class Progress:
    """Collects a window of steps and writes it when `flush` is called, by every process alike.

    peak_tflops: of one device, None if unknown (no MFU then). parts: the names of the loss's parts in the log, "loss"
    first; in_words puts their means on the terminal.
    """

    def __init__(
        self,
        settings: LoopSettings,
        device: torch.device,
        log: JsonlLog | None,
        *,
        peak_tflops: float | None = None,
        parts: Sequence[str] = ("loss",),
        in_words: Callable[..., str] = "loss {:.4f}".format,
    ):
        self.settings, self.device, self.log, self.peak_tflops = settings, device, log, peak_tflops
        self.parts, self.in_words = parts, in_words
        self.window = Window()

    def due(self, step: int, norm: Tensor) -> bool:
        """Whether to flush after `step` steps: every log_freq steps, and on a CPU at once after a bad step."""
        return step % self.settings.log_freq == 0 or self.device.type == "cpu" and not math.isfinite(norm)

    def flush(self, step: int, skipped: SkippedSteps) -> None:
        """Fetch, count and log the steps of the window that ends after `step` steps.

        ArgumentError once too many in a row were skipped (`check_bad_steps`).
        """
        w, self.window = self.window, Window()
        count, width = len(w.losses), len(self.parts)
        if not count:
            return
        sent = [torch.stack(w.losses).flatten(), *([] if w.details is None else [w.details.flatten()])]
        numbers = dist.all_reduce_mean(torch.cat(sent)).tolist()  # one message for all
        losses = np.reshape(numbers[: count * width], (count, width))
        norms, pace = torch.stack(w.norms).tolist(), self._pace(w)
        finite = np.isfinite(norms) & np.isfinite(losses[:, 0])
        details = by_dimension(numbers[count * width :]) if finite[-1] else {}
        for i, number in enumerate(range(step - count + 1, step + 1)):
            skipped.count(finite[i])
            record = {"step": number, "epoch": (number - 1) // self.settings.steps_per_epoch, "lr": w.lrs[i]}
            values = dict(zip(self.parts, losses[i].tolist(), strict=True)) | {"grad_norm": norms[i]}
            record |= values if finite[i] else {"skipped": True}
            if self.log is not None:
                self.log.write(record | pace | (details if number == step else {}))
            check_bad_steps(skipped.in_row, self.settings, number, loss=losses[i, 0], norm=norms[i], lr=w.lrs[i])
        means = losses[finite if finite.any() else slice(None)].mean(0)
        words = [self.in_words(*means), f"lr {w.lrs[-1]:.2e}", f"grad norm {norms[-1]:.2f}"]
        bad = int(count - finite.sum())
        more = [f"({bad} of {count} steps skipped, {skipped.in_row} in a row)"] if bad else []
        self._line(step, words, details, pace, more)

    def _pace(self, w: Window) -> dict[str, float]:
        seconds = time.perf_counter() - w.started
        pace = {"images_per_s": len(w.losses) * self.settings.images_per_step / seconds}
        if w.flops:
            pace["tflops"] = w.flops / seconds / 1e12 / dist.world_size()  # of one device
        if w.flops and self.peak_tflops:
            pace["mfu"] = pace["tflops"] / self.peak_tflops
        return pace | {"data_wait": w.data_wait / seconds, "memory_gib": dist.peak_memory_gib(self.device)}

    def _line(self, step: int, words: list[str], details: dict, pace: dict[str, float], more: list[str]) -> None:
        epoch, total = (step - 1) // self.settings.steps_per_epoch, self.settings.total_steps
        eta = (total - step) * self.settings.images_per_step / pace["images_per_s"]
        parts = [f"epoch {epoch} step {step}/{total}", *words, f"{pace['images_per_s']:.1f} images/s"]
        parts += [f"{pace['tflops']:.3g} TFLOP/s"] if "tflops" in pace else []
        parts += [f"MFU {pace['mfu']:.1%}"] if "mfu" in pace else []
        if details:
            parts += [f"{details['bits_per_dim']:.2f} bits/dim", f"accuracy {details['token_accuracy']:.1%}"]
        parts += [f"data wait {pace['data_wait']:.0%}", f"memory {pace['memory_gib']:.1f} GiB", f"ETA {duration(eta)}"]
        logger.info("  ".join(parts + more))


def by_dimension(numbers: list[float]) -> dict[str, object]:
    """Losses and accuracies (2C,) of the dimensions, in head order, for the log; {} if there are none."""
    if not numbers:
        return {}
    losses, accuracies = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    return {
        "loss_per_dim": losses,
        "bits_per_dim": float(np.mean(losses)) / math.log(2),
        "accuracy_per_dim": accuracies,
        "token_accuracy": float(np.mean(accuracies)),
    }
