"""The training loop. No parsing, no files but those handed in.

Letters: B images per process and micro-batch, A micro-batches per step (--accum_iter), G = B*A*processes, L tokens.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.latent_space import DiagonalGaussian
from models.sampling.orders import random_orders
from models.tokenbridge import TokenBridge, draw_mask_ratio, mask_from_orders, num_masked_tokens
from models.vae import AutoencoderKL
from training.flops import step_flops
from training.lr_sched import learning_rate
from training.progress import Progress
from training.sharding import full
from training.state import TrainState
from util import dist
from util.log import JsonlLog
from util.seeds import mixed_seed


@dataclass
class TrainSettings:
    """What the loop needs to know; the flags of main_tokenbridge.py have the same names."""

    batch_size: int
    epochs: int
    steps_per_epoch: int
    lr: float  # peak, after blr scaling
    min_lr: float
    lr_schedule: str
    warmup_epochs: float
    grad_clip: float
    seed: int
    precision: str
    accum_iter: int = 1
    max_steps: int | None = None
    max_bad_steps: int = 10
    log_freq: int = 20
    save_every_steps: int | None = None
    posthoc_ema_freq: int = 0
    peak_tflops: float | None = None

    @property
    def total_steps(self) -> int:
        total = self.epochs * self.steps_per_epoch
        return total if self.max_steps is None else min(total, self.max_steps)


@dataclass
class StepDraws:
    """The random draws of one optimizer step for this process, dropout aside; rows are images in the order of the global batch."""

    counts: list[int]  # masked tokens of an image, for each micro-batch of the global batch; the same on every process
    num_masked: list[int]  # (A,), those of this process's micro-batches
    masks: Tensor  # (A, B, L) bool
    label_drop: Tensor  # (A, B) bool
    noise: Tensor  # (A, B, C, h, w) for the posterior sample


def draw_step(model: TokenBridge, settings: TrainSettings, step: int, device: torch.device) -> StepDraws:
    """Draws for step `step` from (seed, step) alone: the whole global batch is drawn on every process, which keeps its rows.

    So resuming needs no random state. Micro-batches of the same size draw the same on any number of processes (8 x 1 as 4 x 2); of another
    size, all but the mask ratio, of which each micro-batch has its own (SPEC 4.5). No host sync.
    """
    b, a, world, rank = settings.batch_size, settings.accum_iter, dist.world_size(), dist.rank()
    counts = masked_counts(model, settings.seed, step, a * world)
    num_masked = [counts[micro_batch_number(micro)] for micro in range(a)]
    generator = torch.Generator(device).manual_seed(mixed_seed(settings.seed, step))
    total = a * world * b

    def mine(x: Tensor) -> Tensor:
        return x.view(a, world, b, *x.shape[1:])[:, rank]

    orders = mine(random_orders(total, model.num_tokens, generator, device))  # (A, B, L)
    masks = torch.stack([mask_from_orders(order, count) for order, count in zip(orders, num_masked, strict=True)])
    drop = torch.rand(total, generator=generator, device=device) < model.label_drop_prob
    noise = torch.randn(total, model.token_dim, model.grid_size, model.grid_size, generator=generator, device=device)
    return StepDraws(counts, num_masked, masks, mine(drop), mine(noise))


def micro_batch_number(micro: int) -> int:
    """Place of this process's micro-batch `micro` within the global batch, in which the processes stand side by side (GlobalBatchSampler)."""
    return micro * dist.world_size() + dist.rank()


def masked_counts(model: TokenBridge, seed: int, step: int, count: int) -> list[int]:
    """Masked tokens of an image in each of the `count` micro-batches of a global batch, each from (seed, step, its number) alone (SPEC 4.5)."""
    uniforms = (float(np.random.default_rng([seed, step, number]).random()) for number in range(count))
    return [num_masked_tokens(draw_mask_ratio(model.mask_ratio_min, uniform), model.num_tokens) for uniform in uniforms]


@torch.no_grad()
def batch_latents(batch: Tensor, vae: AutoencoderKL, noise: Tensor, model: TokenBridge) -> Tensor:
    """Scaled latents (B, C, h, w) float32, whatever the data set holds.

    Sampled with `noise` from the posterior of images (B, 3, S, S) or of cached moments (B, 2C, h, w); or cached means (B, C, h, w); or cached
    indices (B, C, h, w) int16, which are the model's own quantizer's.
    """
    if not batch.is_floating_point():
        return model.dequantize(batch.long())
    channels, grid = noise.shape[1], noise.shape[2:]
    if batch.shape[2:] != grid:
        posterior = vae.encode(batch.contiguous(memory_format=torch.channels_last))
    elif batch.shape[1] == 2 * channels:
        posterior = DiagonalGaussian(batch.float())
    else:
        return vae.scale(batch.float())
    return vae.scale(posterior.sample(noise=noise))


def train_one_epoch(
    state: TrainState,
    vae: AutoencoderKL,
    loader: Iterable,
    settings: TrainSettings,
    device: torch.device,
    log: JsonlLog | None,
    *,
    save: Callable[[], None] | None = None,
    keep_averages: Callable[[], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from `state.step` to the end of its epoch (or of the run); the loader starts at that step's first micro-batch.

    A step whose loss or gradient is not finite is skipped on every process alike; max_bad_steps in a row are a ValueError that names
    step, lr and gradient norm. save() is called every save_every_steps, keep_averages() before it every posthoc_ema_freq. should_stop() is
    asked after each step, by every process, all of which get the same answer; returns True if it was to stop.
    """
    model, s = state.model.train(), settings
    last = min((state.step // s.steps_per_epoch + 1) * s.steps_per_epoch, s.total_steps)
    images = s.batch_size * s.accum_iter * dist.world_size()
    progress = Progress(
        steps_per_epoch=s.steps_per_epoch,
        total_steps=s.total_steps,
        images_per_step=images,
        max_bad_steps=s.max_bad_steps,
        device=device,
        log=log,
        peak_tflops=s.peak_tflops,
    )
    batches = dist.prefetch(iter(loader), device)
    parameters = list(model.parameters())
    stop = False
    while state.step < last and not stop:
        draws = draw_step(model, s, state.step, device)
        lr = learning_rate(
            state.step / s.steps_per_epoch,
            peak=s.lr,
            min_lr=s.min_lr,
            schedule=s.lr_schedule,
            warmup_epochs=s.warmup_epochs,
            epochs=s.total_steps / s.steps_per_epoch,
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        logged = (state.step + 1) % s.log_freq == 0
        loss, details = accumulate(state, vae, batches, draws, s, device, progress, detailed=logged)
        norm = optimizer_step(state, parameters, s.grad_clip)
        state.update_averages()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1

        window = progress.window
        window.losses.append(loss)
        window.norms.append(norm)
        window.lrs.append(lr)
        window.details = details
        window.flops += s.batch_size * sum(step_flops(model.config, count) for count in draws.counts)
        stop = should_stop()
        save_now = save is not None and s.save_every_steps is not None and state.step % s.save_every_steps == 0
        if logged or stop or save_now or state.step == last or device.type == "cpu" and not math.isfinite(norm):
            state.bad_in_row = progress.flush(state.step, state.bad_in_row)
        if keep_averages is not None and s.posthoc_ema_freq and state.step % s.posthoc_ema_freq == 0:
            keep_averages()
        if save_now:
            save()
    return stop


def accumulate(
    state: TrainState,
    vae: AutoencoderKL,
    batches: Iterator[tuple[Tensor, Tensor]],
    draws: StepDraws,
    s: TrainSettings,
    device: torch.device,
    progress: Progress,
    detailed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of one step's micro-batches, averaged over the processes at the last of them.

    Each micro-batch counts alike, however many of its tokens are masked, as where processes average (published).
    Returns this process's mean loss and, if `detailed`, loss and accuracy of each dimension (2, C); all on the device.
    """
    losses, details = [], []
    for micro in range(s.accum_iter):
        waiting = time.perf_counter()
        batch, labels = next(batches)
        progress.window.data_wait += time.perf_counter() - waiting
        latents = batch_latents(batch, vae, draws.noise[micro], state.model)
        state.hold_gradients(micro < s.accum_iter - 1)
        # dropout; after the loader, which may draw too
        torch.manual_seed(mixed_seed(s.seed, state.step, 1 + micro_batch_number(micro)))
        with dist.autocast(device, s.precision):
            loss = state.wrapped(
                latents,
                labels,
                draws.masks[micro],
                num_masked=draws.num_masked[micro],
                label_drop=draws.label_drop[micro],
                return_metrics=detailed,
            )
        if detailed:
            loss, *parts = loss
            details.append(torch.stack(parts))
        state.scaler.scale(spoilt_if_not_finite(loss) / s.accum_iter).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), torch.stack(details).mean(0) if detailed else None


def spoilt_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself; one that is not finite gets a gradient of NaN everywhere, whatever path it came by.

    The processes then agree on the bad step by the message that they exchange anyway, the average of their gradients.
    """
    return loss * (1 + 0 * loss.detach())


def optimizer_step(state: TrainState, parameters: Sequence[nn.Parameter], grad_clip: float) -> Tensor:
    """Clip, step; returns the gradient norm before clipping, on the device. Weights stay as they are if it is not finite.

    The gradients are averaged over the processes, so the norm, and with it the decision, is the same everywhere without another message.
    """
    state.scaler.unscale_(state.optimizer)
    norm = full(nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf))
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)  # skips by itself, and lowers its scale
        state.scaler.update()
    else:
        state.optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernel's own switch: no host sync
        state.optimizer.step()
    return norm
