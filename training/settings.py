"""Settings of a training run: each flag that concerns training is a field here, with default, range and help text."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch

from training.flops import peak_tflops
from training.lr_sched import LR_SCHEDULES, base_learning_rate, learning_rate
from util import dist
from util.options import ArgumentError, check_options, option


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What every training loop needs. Fields that are no flags come from the process flags and from the data."""

    batch_size: int = option(16, "images per process and step", lowest=1)
    epochs: int = option(400, lowest=1)
    max_steps: int | None = option(None, "stop after so many optimizer steps; the lr schedule ends there too", lowest=1)
    grad_clip: float = option(3.0, "largest gradient norm; 0 for no limit", lowest=0)
    precision: str | None = option(
        None, "default: bf16 on cuda that has it, else fp16; fp32 on cpu", choices=dist.PRECISIONS
    )
    max_bad_steps: int = option(10, "stop after so many steps in a row without a finite loss and gradient", lowest=1)
    log_freq: int = option(20, "steps between progress lines", lowest=1)
    seed: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        check_options(self)
        if self.seed < 0:
            raise ArgumentError("seed", f"seed must be at least 0, got {self.seed}")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.epochs * self.steps_per_epoch
        return total if self.max_steps is None else min(total, self.max_steps)

    @property
    def images_per_step(self) -> int:
        """The global batch."""
        return self.batch_size * dist.world_size()

    def prepared(self, steps_per_epoch: int, device: torch.device) -> Self:
        """The settings with everything decided that depends on the data and the device."""
        precision = dist.pick_precision(self.precision, device)
        return replace(self, steps_per_epoch=steps_per_epoch, precision=precision)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoopSettings):
    """How a TokenBridge model is trained; defaults as published. `prepared` decides lr, precision and peak_tflops."""

    batch_size: int = option(16, "per process and micro-batch; global = this x processes x --accum_iter", lowest=1)
    accum_iter: int = option(1, "micro-batches per optimizer step", lowest=1)
    lr: float | None = option(None, "peak learning rate; default: blr x global batch / 256", lowest=0)
    blr: float = option(1e-4, "learning rate per 256 images", lowest=0)
    min_lr: float = option(0.0, lowest=0)
    lr_schedule: str = option("cosine", choices=LR_SCHEDULES)
    warmup_epochs: int = option(100, lowest=0)
    weight_decay: float = option(0.02, "of AdamW; when resuming, default: the checkpoint's", lowest=0)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8
    ema_rate: float = option(0.9999, lowest=0, highest=1)
    ema_warmup: bool = option(False, "a lower EMA rate in the first steps, (1 + t) / (10 + t); published: off")
    posthoc_ema_freq: int = option(
        0,
        "steps between snapshots for an EMA whose length is chosen afterwards (python -m tools.posthoc_ema); 0 for "
        "none",
        lowest=0,
    )
    compile: bool = option(
        False, "compile the transformer blocks, or the sampler (torch.compile): slower start, faster steps"
    )
    fsdp: bool = option(False, "shard weights, gradients, optimizer and EMA over the processes (fully_shard)")
    peak_tflops: float | None = option(None, "of one device, dense, for MFU; default: by the device's name", above=0)

    @property
    def images_per_step(self) -> int:
        """The global batch."""
        return self.batch_size * self.accum_iter * dist.world_size()

    def learning_rate(self, step: int) -> float:
        """Of the iteration after `step` optimizer steps, epochs counted in fractions; after `prepared`."""
        shape = dict(peak=self.lr, min_lr=self.min_lr, schedule=self.lr_schedule, warmup_epochs=self.warmup_epochs)
        return learning_rate(step / self.steps_per_epoch, epochs=self.total_steps / self.steps_per_epoch, **shape)

    def schedule_warnings(self) -> list[str]:
        """What is odd about the learning rate's schedule, in words; after `prepared`."""
        epochs, found = self.total_steps / self.steps_per_epoch, []
        if self.warmup_epochs >= epochs:
            share = f"the learning rate ends at {100 * epochs / self.warmup_epochs:.0f} % of {self.lr:.3g}"
            found.append(f"warmup_epochs {self.warmup_epochs} is no shorter than the run of {epochs:g} epochs: {share}")
        if self.min_lr > self.lr and self.lr_schedule == "cosine":
            found.append(f"min_lr {self.min_lr:g} is above lr {self.lr:.3g}: the learning rate rises after the warm-up")
        return found

    @property
    def optimizer(self) -> dict[str, object]:
        """AdamW's own settings, as checkpoints record them."""
        return {name: getattr(self, name) for name in ("weight_decay", "betas", "eps")}

    def prepared(self, steps_per_epoch: int, device: torch.device) -> Self:
        """The settings with everything decided that depends on the data and the device."""
        chosen = super().prepared(steps_per_epoch, device)
        lr = base_learning_rate(self.lr, self.blr, self.images_per_step)
        peak = self.peak_tflops or peak_tflops(dist.device_name(device), chosen.precision)
        return replace(chosen, lr=lr, peak_tflops=peak)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a training run reads and writes its checkpoints, and how often it writes and evaluates."""

    output_dir: str = option("./output_dir")
    resume: str = option("", "a checkpoint file, or a folder with checkpoint-last.pth")
    start_epoch: int = option(0, lowest=0)
    save_last_freq: int = option(
        5, "a checkpoint after epochs 0, N, 2N, ... (0-based, as published) and at the end", lowest=1
    )
    save_every_steps: int | None = option(None, "a checkpoint every so many steps too", lowest=1)
    keep_last: int = option(1, "keep so many; from 2 on each as checkpoint-<step>.pth, too", lowest=1)
    sample_freq: int = option(0, "epochs between grids of samples (EMA weights, same seeds); 0 for none", lowest=0)
    online_eval: bool = option(
        False,
        "evaluate the EMA weights during training: at cfg 1, then at each --cfg that is neither 1 nor 0 (as published)",
    )
    eval_freq: int = option(40, "--online_eval: after epochs 0, N, 2N, ... (0-based) and at the end", lowest=1)

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, settings: TrainSettings) -> None:
        """ArgumentError for what does not go with the settings of the training."""
        if settings.posthoc_ema_freq and self.start_epoch:
            raise ArgumentError(
                "posthoc_ema_freq",
                "posthoc_ema_freq averages from the first step on and excludes start_epoch: leave one of them out",
            )


def due(epoch: int, every: int) -> bool:
    """Whether epoch `epoch` (0-based) is one of 0, every, 2*every, ...: when the published code saves and evaluates."""
    return epoch % every == 0


def initial_loss(quant_levels: int, head_width: int) -> float:
    """Expected loss of an untrained model: ln K, and half the variance of its logits.

    Xavier-uniform logits of a normalised feature have variance 2E / (E + K), E the head's width.
    """
    return math.log(quant_levels) + head_width / (head_width + quant_levels)
