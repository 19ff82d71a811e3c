"""How training goes: one line on the terminal, the same numbers in log.jsonl and tensorboard. The only place where the host waits for them.

Numbers stay on the device until a line is due; then all of the window are fetched together.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from util import dist
from util.log import JsonlLog, get_logger

logger = get_logger()


@dataclass
class Window:
    """Steps whose numbers are still on the device."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    details: Tensor | None = None  # (2, C): loss and accuracy of each dimension, of the last step
    flops: float = 0.0  # of all processes
    data_wait: float = 0.0  # seconds
    started: float = field(default_factory=time.perf_counter)


def duration(seconds: float) -> str:
    """h:mm:ss, with days before it when there are any."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours // 24}d " if hours >= 24 else "") + f"{hours % 24}:{minutes:02d}:{s:02d}"


class Progress:
    """Collects a window of steps and writes it when `flush` is called, by every process alike.

    images_per_step: the global batch. peak_tflops: of one device, None if unknown (then no MFU is shown).
    """

    def __init__(
        self,
        *,
        steps_per_epoch: int,
        total_steps: int,
        images_per_step: int,
        max_bad_steps: int,
        device: torch.device,
        log: JsonlLog | None,
        peak_tflops: float | None = None,
    ):
        self.steps_per_epoch, self.total_steps, self.images_per_step = steps_per_epoch, total_steps, images_per_step
        self.max_bad_steps, self.device, self.log, self.peak_tflops = max_bad_steps, device, log, peak_tflops
        self.window = Window()

    def flush(self, step: int, bad_in_row: int) -> int:
        """Fetch and log the window that ends after `step` steps; returns how many steps in a row, up to now, were skipped.

        ValueError naming step, lr and gradient norm once those are --max_bad_steps.
        """
        w, self.window = self.window, Window()
        count = len(w.losses)
        if not count:
            return bad_in_row
        fetched = [torch.stack(w.losses), *([] if w.details is None else [w.details.flatten()])]
        numbers = dist.all_reduce_mean(torch.cat(fetched)).tolist()  # one message for all
        losses, details, norms = numbers[:count], numbers[count:], torch.stack(w.norms).tolist()
        seconds = time.perf_counter() - w.started
        pace = self._pace(w, count, seconds)
        for i, (loss, norm, lr) in enumerate(zip(losses, norms, w.lrs, strict=True)):
            this = step - count + i + 1
            finite = math.isfinite(norm) and math.isfinite(loss)
            bad_in_row = 0 if finite else bad_in_row + 1
            if self.log is not None:
                record = {"step": this, "epoch": (this - 1) // self.steps_per_epoch, "lr": lr}
                record |= {"loss": loss, "grad_norm": norm} if finite else {"skipped": True}
                self.log.write(record | pace | (self._details(details) if this == step and finite else {}))
            if bad_in_row >= self.max_bad_steps:
                raise ValueError(
                    f"{bad_in_row} steps in a row had a loss or gradient that is not finite; stopped at step {this} with lr {lr:.3g}, "
                    f"loss {loss}, grad norm {norm} (--max_bad_steps). Those steps changed no weight and the last checkpoint is as it "
                    "was. Check the data, lower --lr/--blr or --grad_clip, or use --precision bf16/fp32"
                )
        self._line(step, losses, norms, w.lrs, details, pace, (self.total_steps - step) * seconds / count, bad_in_row)
        return bad_in_row

    def _pace(self, w: Window, steps: int, seconds: float) -> dict[str, float]:
        rate = w.flops / seconds / 1e12 / dist.world_size()  # of one device
        pace = {"images_per_s": steps * self.images_per_step / seconds, "tflops": rate}
        if self.peak_tflops:
            pace["mfu"] = rate / self.peak_tflops
        return pace | {"data_wait": w.data_wait / seconds, "memory_gib": dist.peak_memory_gib(self.device)}

    @staticmethod
    def _details(numbers: list[float]) -> dict[str, object]:
        """In head order, the leading dimension first."""
        if not numbers:
            return {}
        half = len(numbers) // 2
        return {
            "loss_per_dim": numbers[:half],
            "bits_per_dim": float(np.mean(numbers[:half])) / math.log(2),
            "accuracy_per_dim": numbers[half:],
            "token_accuracy": float(np.mean(numbers[half:])),
        }

    def _line(
        self,
        step: int,
        losses: list[float],
        norms: list[float],
        lrs: list[float],
        details: list[float],
        pace: dict[str, float],
        eta: float,
        bad_in_row: int,
    ) -> None:
        seen = self._details(details)
        parts = [
            f"epoch {(step - 1) // self.steps_per_epoch} step {step}/{self.total_steps}",
            f"loss {np.mean(losses):.4f}",
            f"lr {lrs[-1]:.2e}",
            f"grad norm {norms[-1]:.2f}",
            f"{pace['images_per_s']:.1f} images/s",
            f"{pace['tflops']:.3g} TFLOP/s",
        ]
        parts += [f"MFU {pace['mfu']:.1%}"] if "mfu" in pace else []
        parts += [f"{seen['bits_per_dim']:.2f} bits/dim", f"accuracy {seen['token_accuracy']:.1%}"] if seen else []
        parts += [f"data wait {pace['data_wait']:.0%}", f"memory {pace['memory_gib']:.1f} GiB", f"ETA {duration(eta)}"]
        parts += [f"({bad_in_row} steps skipped in a row)"] if bad_in_row else []
        logger.info("  ".join(parts))
