"""One optimizer step: random draws, latents, accumulated gradients, update (docs/spec.md 4.5, 7).

Letters: B images per process and micro-batch, A micro-batches per step (--accum_iter), L tokens, C latent channels.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.latent_space import DiagonalGaussian
from models.sampling.orders import random_orders
from models.tokenbridge import TokenBridge, draw_mask_ratio, mask_from_orders, num_masked_tokens
from models.vae import AutoencoderKL
from training.optimizer_state import Stepped
from training.progress import Window
from training.settings import TrainSettings
from training.sharding import full
from training.state import TrainState
from util import dist
from util.seeds import mixed_seed


@dataclass
class StepDraws:
    """Random draws of one optimizer step for this process, dropout apart; rows in the order of the global batch."""

    counts: list[int]  # masked tokens of an image, for each micro-batch of the global batch
    num_masked: list[int]  # (A,), those of this process's micro-batches
    masks: Tensor  # (A, B, L) bool
    label_drop: Tensor  # (A, B) bool
    noise: Tensor  # (A, B, C, h, w) for the posterior sample


def draw_step(model: TokenBridge, settings: TrainSettings, step: int, device: torch.device) -> StepDraws:
    """Draws for step `step` from (seed, step) alone: every process draws the global batch and keeps its rows.

    So resuming needs no random state. Micro-batches of the same size draw the same on any number of processes
    (8 x 1 as 4 x 2); of another size, all but the mask ratio, of which each micro-batch has its own. No host sync.
    """
    batch, accum, world = settings.batch_size, settings.accum_iter, dist.world_size()
    counts = masked_counts(model, settings.seed, step, accum * world)
    num_masked = [counts[micro_batch_number(micro)] for micro in range(accum)]
    generator = torch.Generator(device).manual_seed(mixed_seed(settings.seed, step))
    total, grid = accum * world * batch, model.grid_size

    def own_rows(x: Tensor) -> Tensor:
        return x.view(accum, world, batch, *x.shape[1:])[:, dist.rank()]

    orders = own_rows(random_orders(total, model.num_tokens, generator, device))  # (A, B, L)
    masks = torch.stack([mask_from_orders(order, count) for order, count in zip(orders, num_masked, strict=True)])
    drop = torch.rand(total, generator=generator, device=device) < model.label_drop_prob
    noise = torch.randn(total, model.token_dim, grid, grid, generator=generator, device=device)
    return StepDraws(counts, num_masked, masks, own_rows(drop), own_rows(noise))


def micro_batch_number(micro: int) -> int:
    """Place of this process's micro-batch `micro` in the global batch (the order of GlobalBatchSampler)."""
    return micro * dist.world_size() + dist.rank()


def masked_counts(model: TokenBridge, seed: int, step: int, count: int) -> list[int]:
    """Masked tokens of an image in each of the `count` micro-batches of a step, from (seed, step, its number) alone."""
    uniforms = (float(np.random.default_rng([seed, step, number]).random()) for number in range(count))
    return [num_masked_tokens(draw_mask_ratio(model.mask_ratio_min, uniform), model.num_tokens) for uniform in uniforms]


@torch.no_grad()
def batch_latents(batch: Tensor, vae: AutoencoderKL, noise: Tensor, model: TokenBridge) -> Tensor:
    """Scaled latents (B, C, h, w) float32 of a batch, whatever the data set holds.

    Images (B, 3, S, S) and cached moments (B, 2C, h, w) are sampled from their posterior with `noise`; cached means
    (B, C, h, w) are scaled; cached indices (B, C, h, w) int16 are dequantized by the model.
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


def accumulate(
    state: TrainState,
    vae: AutoencoderKL,
    batches: Iterator[tuple[Tensor, Tensor]],
    draws: StepDraws,
    settings: TrainSettings,
    window: Window,
    detailed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of one step's micro-batches, averaged over the processes at the last of them.

    Each micro-batch counts alike, however many of its tokens are masked, as where processes average (published).
    Returns this process's mean loss and, if `detailed`, loss and accuracy of each dimension (2, C); on the device.
    """
    losses, details = [], []
    for micro in range(settings.accum_iter):
        waiting = time.perf_counter()
        batch, labels = next(batches)
        window.data_wait += time.perf_counter() - waiting
        latents = batch_latents(batch, vae, draws.noise[micro], state.model)
        state.hold_gradients(micro < settings.accum_iter - 1)
        # seeds dropout; after the loader, which may draw too
        torch.manual_seed(mixed_seed(settings.seed, state.step, 1 + micro_batch_number(micro)))
        with dist.autocast(state.device, settings.precision):
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
        state.scaler.scale(nan_gradients_if_not_finite(loss) / settings.accum_iter).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), torch.stack(details).mean(0) if detailed else None


def nan_gradients_if_not_finite(loss: Tensor) -> Tensor:
    """Turns a non-finite loss into NaN gradients, so that the all-reduce makes every rank skip the step."""
    return loss * (1 + 0 * loss.detach())


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(state: Stepped, parameters: Sequence[nn.Parameter], grad_clip: float) -> Tensor:
    """Clip the gradients and step; returns their norm before clipping, on the device.

    Weights and moments stay as they are if the norm is not finite. The gradients are averaged over the processes, so
    the norm, and with it the decision, is the same on every rank without another message. No host sync without a
    scaler.
    """
    optimizer, scaler = state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    norm = full(nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf))
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips by itself, and lowers its scale
        scaler.update()
    else:
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernel's own switch: no host sync
        optimizer.step()
    return norm
