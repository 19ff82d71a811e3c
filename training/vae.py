"""Training a KL autoencoder: settings, loss, state and loop (main_vae.py is the command).

  loss = mean |x - x'| + kl_weight * KL + perceptual_weight * edges

x' is decoded from a posterior sample, the mean runs over pixels and colours, values in [-1, 1]. KL is in nats, summed
over an image's latents and averaged over the batch, so it grows with the number of latents. `edges` compares pixel
differences at three resolutions (`edge_distance`); it is no learned perceptual metric and needs no weights.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset.image_folder import BAD_IMAGE_CHOICES
from models.latent_space import DiagonalGaussian
from models.vae import LARGEST, MOST_LEVELS, AutoencoderKL
from training.guard import SkippedSteps, may_save
from training.lr_sched import learning_rate
from training.optimizer_state import load_optimizer
from training.progress import Progress
from training.settings import LoopSettings
from training.step import nan_gradients_if_not_finite, optimizer_step, set_learning_rate
from util import checkpoint, dist
from util.log import JsonlLog, get_logger
from util.options import ArgumentError, option
from util.seeds import mixed_seed

logger = get_logger()

RESULT, STATE, LOG = "vae.pth", "vae_state.pth", "vae_log.jsonl"  # the files in output_dir
PARTS = ("loss", "l1", "kl", "edges")


@dataclass(frozen=True, kw_only=True)
class VaeSettings(LoopSettings):
    """The VAE's shape (defaults: KL-16, docs/spec.md 2), its data and its training. Raises ArgumentError."""

    data_path: str = option(
        "./data/imagenet", "folder with train/<class>/<image> and, if there is one, val/<class>/<image>"
    )
    img_size: int = option(
        256, "side of the images, pixels; a multiple of the stride 2^(levels - 1)", lowest=2, highest=2**14
    )
    class_num: int | None = option(
        None, "refuse a folder with more classes than this; the VAE itself has none", lowest=1
    )
    no_flip: bool = option(False, "never mirror images (for digits, text)")
    on_bad_image: str = option("error", choices=BAD_IMAGE_CHOICES)
    vae_embed_dim: int = option(16, "latent channels", lowest=1, highest=LARGEST["embed_dim"])
    width: int = option(128, "channels of the finest level", lowest=1, highest=LARGEST["ch"])
    ch_mult: str = option("1,1,2,2,4", "width of each level as a multiple of --width; n levels have stride 2^(n - 1)")
    num_res_blocks: int = option(
        2, "residual blocks per encoder level; the decoder has one more", lowest=1, highest=LARGEST["num_res_blocks"]
    )
    no_attention: bool = option(False, "no spatial attention at the coarsest level")
    norm_groups: int = option(
        32, "groups of every GroupNorm; must divide the width of every level", lowest=1, highest=LARGEST["norm_groups"]
    )
    kl_weight: float = option(
        1e-6,
        "weight of the KL in nats per image; 1e-5 suits 64 latents (32-pixel digits), images with more latents need "
        "less",
        lowest=0,
    )
    perceptual_weight: float = option(0.0, "weight of the edge term; 0 leaves it out", lowest=0)
    epochs: int = option(50, lowest=1)
    lr: float = option(1e-4, "first learning rate (Adam); falls along half a cosine", lowest=0)
    min_lr_ratio: float = option(
        0.02, "last learning rate as a share of --lr; 1 keeps it constant", lowest=0, highest=1
    )
    grad_clip: float = option(1.0, "largest gradient norm; 0 for no limit", lowest=0)
    output_dir: str = option("./output_dir")
    resume: str = option("", f"folder with {STATE}, or that file; a folder without one starts a new run")
    save_freq: int = option(1000, f"steps between writes of {STATE}", lowest=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [self.width * m for m in (1, *self.multipliers) if self.width * m % self.norm_groups]
        if wrong:
            what = f"norm_groups {self.norm_groups} does not divide a level's width, {wrong[0]}"
            advice = f"(width {self.width} times 1 or ch_mult); give another width or norm_groups"
            raise ArgumentError("norm_groups", f"{what} {advice}")

    @property
    def multipliers(self) -> list[int]:
        """ch_mult as numbers."""
        try:
            multipliers = [int(part) for part in self.ch_mult.split(",")]
        except ValueError:
            multipliers = []
        most, levels = LARGEST["ch_mult"], len(multipliers)
        if not 1 <= levels <= MOST_LEVELS or not all(1 <= multiplier <= most for multiplier in multipliers):
            numbers = "positive whole numbers separated by commas, such as 1,1,2,2"
            got = f"at most {MOST_LEVELS} of at most {most}; got {self.ch_mult!r:.60}"
            raise ArgumentError("ch_mult", f"ch_mult takes {numbers}, {got}")
        return multipliers

    def learning_rate(self, step: int) -> float:
        """Of the iteration after `step` optimizer steps: half a cosine."""
        shape = dict(schedule="cosine", warmup_epochs=0, epochs=self.total_steps)
        return learning_rate(step, peak=self.lr, min_lr=self.lr * self.min_lr_ratio, **shape)

    def structure(self) -> dict[str, object]:
        """Constructor arguments of AutoencoderKL."""
        widths = dict(embed_dim=self.vae_embed_dim, ch=self.width, ch_mult=self.multipliers)
        blocks = dict(num_res_blocks=self.num_res_blocks, norm_groups=self.norm_groups)
        return widths | blocks | {"attention": not self.no_attention}


def edge_distance(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of the edges of two image batches (B, 3, H, W): scalar.

    Edges are differences of horizontal and of vertical neighbours, compared at `scales` resolutions, each half the one
    before (2x2 averages), and averaged. Cheap, and no substitute for a learned metric: it only asks for equally steep
    edges.
    """
    error, distances = a - b, []  # edges are linear, so the difference's edges are enough
    for _ in range(scales):
        distances.append(error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        if min(error.shape[-2:]) < 4:
            break
        error = F.avg_pool2d(error, 2)  # (B, 3, H/2, W/2)
    return torch.stack(distances).mean()


class Objective(nn.Module):
    """The loss as one module, so that DistributedDataParallel wraps one forward."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float, perceptual_weight: float):
        super().__init__()
        self.vae, self.kl_weight, self.perceptual_weight = vae, kl_weight, perceptual_weight

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], standard normal noise (B, C, h, w) -> (4,): loss, L1, KL, edges."""
        # float32: exp(logvar) can overflow in half precision
        posterior = DiagonalGaussian(self.vae.encode(images).parameters.float())
        decoded = self.vae.decode(posterior.sample(noise=noise)).float()  # (B, 3, H, W)
        l1, kl = (images - decoded).abs().mean(), posterior.kl().mean()
        edges = edge_distance(images, decoded) if self.perceptual_weight else torch.zeros_like(l1)
        return torch.stack([l1 + self.kl_weight * kl + self.perceptual_weight * edges, l1, kl, edges])

    def in_words(self, loss: float, l1: float, kl: float, edges: float) -> str:
        """Means of a window for the progress line."""
        with_edges = f" + {self.perceptual_weight:g} x edges {edges:.4f}" if self.perceptual_weight else ""
        return f"loss {loss:.4f} = L1 {l1:.4f} + {self.kl_weight:g} x KL {kl:.1f}{with_edges}"


class VaeState:
    """VAE, optimizer, scaler and the number of steps done: all that a training state keeps."""

    def __init__(self, vae: AutoencoderKL, settings: VaeSettings):
        self.vae, self.device = vae, next(vae.parameters()).device
        self.objective = Objective(vae, settings.kl_weight, settings.perceptual_weight)
        self.wrapped: nn.Module = self.objective
        if dist.world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.objective, devices, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.step = 0
        self.skipped = SkippedSteps()
        self.output = Path(settings.output_dir)
        self.saved: int | None = None  # step of the last vae_state.pth there

    def state_dict(self) -> dict:
        """What a training state keeps of it."""
        parts = {"model": self.vae, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}

    def load_state_dict(self, content: dict, source: str) -> None:
        """Continue from a training state; ValueError naming `source` if it does not fit."""
        checkpoint.load_state(self.vae, content["model"], source)
        load_optimizer(self, self.vae, content, source)
        self.step = content["step"]
        self.saved = self.step if Path(source).resolve() == (self.output / STATE).resolve() else None

    def save(self, settings: VaeSettings) -> None:
        """Write vae_state.pth on rank 0, unless steps are being skipped (`may_save`).

        ArgumentError on every rank, and no file, if a weight is not finite.
        """
        weights, lr = dict(self.vae.named_parameters()), self.optimizer.param_groups[0]["lr"]
        final = self.step >= settings.total_steps
        if not may_save(self.step, self.skipped.in_row, weights, lr, final=final, saved=self.saved):
            return
        self.saved = self.step
        if dist.is_main():
            path, config = self.output / STATE, {"vae": self.vae.config, "args": dict(vars(settings))}
            content = {"steps_per_epoch": settings.steps_per_epoch, "config": config}
            checkpoint.atomic_save(self.state_dict() | content, path)
            logger.info("wrote %s at step %d", path, self.step)


def step_noise(shape: Sequence[int], seed: int, step: int, device: torch.device) -> Tensor:
    """This process's rows (B, C, h, w) of the posterior noise of the whole global batch, drawn from (seed, step) alone.

    So resuming needs no random state, and one process with the whole batch draws what several draw with its parts.
    """
    rows, rank = shape[0], dist.rank()
    generator = torch.Generator(device).manual_seed(mixed_seed(seed, step))
    noise = torch.randn(rows * dist.world_size(), *shape[1:], generator=generator, device=device)
    return noise[rows * rank : rows * (rank + 1)]


def train_epoch(
    state: VaeState,
    loader: Iterable,
    settings: VaeSettings,
    log: JsonlLog | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from `state.step` to the end of its epoch (or of the run), saving the state every save_freq steps.

    The loader starts at that step's batch. A step without a finite gradient changes no weight; max_bad_steps in a row
    are an error that names step and lr, on every process alike, because DDP has averaged the gradients. should_stop()
    is asked after each step; returns True, with the state saved, if it was to stop.
    """
    s, vae, device = settings, state.vae.train(), state.device
    last = min((state.step // s.steps_per_epoch + 1) * s.steps_per_epoch, s.total_steps)
    progress = Progress(s, device, log, parts=PARTS, in_words=state.objective.in_words)
    parameters, batches, side = list(vae.parameters()), iter(loader), s.img_size // vae.stride
    stop = False
    while state.step < last and not stop:
        lr = s.learning_rate(state.step)
        set_learning_rate(state.optimizer, lr)
        waiting = time.perf_counter()
        images = next(batches)[0].to(device, non_blocking=True)  # (B, 3, S, S)
        progress.window.data_wait += time.perf_counter() - waiting
        noise = step_noise((len(images), vae.embed_dim, side, side), s.seed, state.step, device)
        with dist.autocast(device, s.precision):
            parts = state.wrapped(images, noise)  # (4,)
        state.scaler.scale(nan_gradients_if_not_finite(parts[0])).backward()
        norm = optimizer_step(state, parameters, s.grad_clip)
        state.optimizer.zero_grad(set_to_none=True)
        progress.window.add(parts.detach(), norm, lr)
        state.step += 1
        stop = should_stop()
        save_now = stop or state.step % s.save_freq == 0 and state.step < s.total_steps
        if save_now or state.step == last or progress.due(state.step, norm):
            progress.flush(state.step, state.skipped)
        if save_now:
            state.save(s)
    return stop
