"""The training loop. No parsing, no files but those handed in.

Letters: B images per process and micro-batch, A micro-batches per step (--accum_iter), G = B*A*processes, L tokens.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.tokenbridge import TokenBridge, draw_mask_ratio, mask_from_orders, num_masked_tokens, random_orders
from models.vae import AutoencoderKL, posterior_from_moments
from util import dist
from util.ema import ModelEma
from util.log import JsonlLog, get_logger
from util.lr_sched import learning_rate

logger = get_logger()


# ------------------------------------------------------------------------------------------------------------- training

@dataclass
class TrainSettings:
    """What the loop needs to know; the flags of main_tokenbridge.py have the same names."""

    batch_size: int
    epochs: int
    steps_per_epoch: int
    lr: float                   # peak, after blr scaling
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

    @property
    def total_steps(self) -> int:
        total = self.epochs * self.steps_per_epoch
        return total if self.max_steps is None else min(total, self.max_steps)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Biases and 1-D parameters without decay first, then all others with it (SPEC 7; the published optimizer's order)."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


class TrainState:
    """Model, optimizer, EMA, scaler and the number of optimizer steps done: all that a checkpoint keeps."""

    def __init__(self, model: TokenBridge, *, weight_decay: float, ema_rate: float, precision: str):
        self.model = model
        device = next(model.parameters()).device
        self.wrapped: nn.Module = model
        if dist.world_size() > 1:
            sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters else \
                "broadcast_buffers"                                         # its name before torch 2.15; ours are constants
            self.wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                                                   **{sync_buffers: False})
        self.optimizer = torch.optim.AdamW(weight_decay_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
        self.ema = ModelEma(model, ema_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step = 0                   # optimizer steps done
        self.bad_in_row = 0             # steps skipped one after another, up to now

    def state_dict(self, steps_per_epoch: int) -> dict:
        """The published checkpoint layout (SPEC 7) plus `step`. `epoch` is the last one finished, -1 before that."""
        return {"model": self.model.state_dict(), "model_ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "epoch": self.step // steps_per_epoch - 1, "step": self.step,
                "steps_per_epoch": steps_per_epoch}

    def load_state_dict(self, content: dict, steps_per_epoch: int, source: str) -> None:
        """Continue from a checkpoint whose weights are in the model already; works without our extra keys, and says what is absent.

        ValueError naming the source for a part that is there but does not fit.
        """
        if isinstance(content.get("model_ema"), dict):
            self.ema.load_state_dict(content["model_ema"], source)
        else:
            logger.warning("%s has no model_ema: the average starts anew from its weights", source)
        if "optimizer" not in content:
            logger.warning("%s has no optimizer state: it starts anew", source)
        try:
            if "optimizer" in content:
                self.optimizer.load_state_dict(content["optimizer"])
            if content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the optimizer state in {source} does not fit this model: {error}") from error
        if not all(isinstance(content.get(key, -1), int) for key in ("step", "epoch")):
            raise ValueError(f"step and epoch in {source} must be whole numbers, they are {content.get('step')!r} and {content.get('epoch')!r}")
        if "step" in content and content.get("steps_per_epoch") == steps_per_epoch:
            self.step = content["step"]
        else:
            self.step = (content.get("epoch", -1) + 1) * steps_per_epoch
            if "step" in content:
                logger.warning("%s was written with %s steps per epoch, now there are %d (batch size or data changed): continuing after its last "
                               "full epoch", source, content.get("steps_per_epoch"), steps_per_epoch)


@dataclass
class StepDraws:
    """All random draws of one optimizer step for this process; rows are images in the order of the global batch."""

    num_masked: int
    masks: Tensor           # (A, B, L) bool
    label_drop: Tensor      # (A, B) bool
    noise: Tensor           # (A, B, C, h, w) for the posterior sample


def draw_step(model: TokenBridge, settings: TrainSettings, step: int, device: torch.device) -> StepDraws:
    """Draws for step `step` from (seed, step) alone: the whole global batch is drawn on every process, which keeps its rows.

    So resuming needs no random state, and any split of the global batch over processes or micro-batches draws the same. No host sync.
    """
    b, a, world, rank = settings.batch_size, settings.accum_iter, dist.world_size(), dist.rank()
    ratio = draw_mask_ratio(model.mask_ratio_min, float(np.random.default_rng([settings.seed, step]).random()))
    num_masked = num_masked_tokens(ratio, model.num_tokens)
    generator = torch.Generator(device).manual_seed(mixed_seed(settings.seed, step))
    total = a * world * b

    def mine(x: Tensor) -> Tensor:
        return x.view(a, world, b, *x.shape[1:])[:, rank]
    masks = mask_from_orders(mine(random_orders(total, model.num_tokens, generator, device)).flatten(0, 1), num_masked)
    drop = torch.rand(total, generator=generator, device=device) < model.label_drop_prob
    noise = torch.randn(total, model.token_dim, model.grid_size, model.grid_size, generator=generator, device=device)
    return StepDraws(num_masked, masks.view(a, b, -1), mine(drop), mine(noise))


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


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
        posterior = vae.encode(batch)
    elif batch.shape[1] == 2 * channels:
        posterior = posterior_from_moments(batch.float())
    else:
        return vae.scale(batch.float())
    return vae.scale(posterior.sample(noise=noise))


@dataclass
class Window:
    """Steps whose numbers are still on the device."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    data_wait: float = 0.0
    started: float = field(default_factory=time.perf_counter)


def train_one_epoch(state: TrainState, vae: AutoencoderKL, loader: Iterable, settings: TrainSettings, device: torch.device,
                    log: JsonlLog | None) -> None:
    """Train from `state.step` to the end of its epoch (or of the run); the loader starts at that step's first micro-batch.

    A step whose loss or gradient is not finite is skipped on every process alike; max_bad_steps in a row are a ValueError that names
    step, lr and gradient norm.
    """
    model, s = state.model.train(), settings
    last = min((state.step // s.steps_per_epoch + 1) * s.steps_per_epoch, s.total_steps)
    batches, window = iter(loader), Window()
    parameters = list(model.parameters())
    while state.step < last:
        draws = draw_step(model, s, state.step, device)
        torch.manual_seed(mixed_seed(s.seed, state.step, dist.rank(), 1))                    # dropout
        lr = learning_rate((state.step + 1) / s.steps_per_epoch, peak=s.lr, min_lr=s.min_lr, schedule=s.lr_schedule,
                           warmup_epochs=s.warmup_epochs, epochs=s.total_steps / s.steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for micro in range(s.accum_iter):
            waiting = time.perf_counter()
            batch, labels = (x.to(device, non_blocking=True) for x in next(batches))
            window.data_wait += time.perf_counter() - waiting
            latents = batch_latents(batch, vae, draws.noise[micro], model)
            hold = micro < s.accum_iter - 1 and isinstance(state.wrapped, DistributedDataParallel)
            with state.wrapped.no_sync() if hold else contextlib.nullcontext():
                with dist.autocast(device, s.precision):
                    loss = state.wrapped(latents, labels, draws.masks[micro], num_masked=draws.num_masked, label_drop=draws.label_drop[micro])
                state.scaler.scale(loss / s.accum_iter).backward()
            losses.append(loss.detach())
        window.norms.append(optimizer_step(state, parameters, s.grad_clip))
        state.ema.update()
        state.optimizer.zero_grad(set_to_none=True)
        window.losses.append(torch.stack(losses).mean())
        window.lrs.append(lr)
        state.step += 1
        if state.step % s.log_freq == 0 or state.step == last or device.type == "cpu" and not math.isfinite(window.norms[-1]):
            window = flush(state, s, window, log, device)


def optimizer_step(state: TrainState, parameters: Sequence[nn.Parameter], grad_clip: float) -> Tensor:
    """Clip, step; returns the gradient norm before clipping, on the device. Weights stay as they are if it is not finite.

    DDP has averaged the gradients, so the norm, and with it the decision, is the same on every process without another message.
    """
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)              # skips by itself, and lowers its scale
        state.scaler.update()
    else:
        state.optimizer.found_inf = (~torch.isfinite(norm)).float()       # the fused kernel's own switch: no host sync
        state.optimizer.step()
    return norm


def flush(state: TrainState, s: TrainSettings, window: Window, log: JsonlLog | None, device: torch.device) -> Window:
    """The one place where the host waits: fetch the window's losses and norms, log them, stop after too many bad steps."""
    steps = len(window.losses)
    if not steps:
        return window
    losses, norms = dist.all_reduce_mean(torch.stack(window.losses)).tolist(), torch.stack(window.norms).tolist()
    seconds = time.perf_counter() - window.started
    rate = steps * s.batch_size * s.accum_iter * dist.world_size() / seconds
    for i, (loss, norm, lr) in enumerate(zip(losses, norms, window.lrs, strict=True)):
        step = state.step - steps + i + 1
        finite = math.isfinite(norm) and math.isfinite(loss)
        state.bad_in_row = 0 if finite else state.bad_in_row + 1
        if log is not None:
            number = {"loss": loss, "grad_norm": norm} if finite else {"skipped": True}
            log.write({"step": step, "epoch": (step - 1) // s.steps_per_epoch, "lr": lr, **number, "images_per_s": rate})
        if state.bad_in_row >= s.max_bad_steps:
            raise ValueError(f"{state.bad_in_row} steps in a row had a loss or gradient that is not finite; stopped at step {step} with lr {lr:.3g}, "
                             f"loss {loss}, grad norm {norm} (--max_bad_steps). Those steps changed no weight and the last checkpoint is as it was. "
                             "Check the data, lower --lr/--blr or --grad_clip, or use --precision bf16/fp32")
    eta = (s.total_steps - state.step) * seconds / steps
    logger.info("epoch %d step %d/%d  loss %.4f  lr %.2e  grad norm %.2f  %.1f images/s  data wait %.0f%%  memory %.1f GiB  ETA %d:%02d:%02d%s",
                (state.step - 1) // s.steps_per_epoch, state.step, s.total_steps, float(np.mean(losses)), window.lrs[-1], norms[-1], rate,
                100 * window.data_wait / seconds, dist.peak_memory_gib(device), eta // 3600, eta % 3600 // 60, eta % 60,
                f"  ({state.bad_in_row} steps skipped in a row)" if state.bad_in_row else "")
    return Window()
