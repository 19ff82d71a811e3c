"""Train a KL autoencoder for your own images; its file is what --vae_path of the other scripts takes.

  one process   python main_vae.py --data_path DIR --img_size 256 --output_dir OUT --resume OUT
  several       torchrun --nproc_per_node=8 main_vae.py --data_path DIR --img_size 256 --batch_size 16 --output_dir OUT --resume OUT

DIR/train/<class>/<image> are the images. OUT/vae.pth, written at the end, holds the weights, the VAE's config (shape, measured scale of its
latents, frequency order of its channels) and, if DIR/val exists, the PSNR of reconstructions. OUT/vae_state.pth is for --resume.

  loss = mean |x - x'| + kl_weight * KL + perceptual_weight * edges

x' is decoded from a posterior sample, the mean runs over pixels and colours, values in [-1, 1]. KL is in nats, summed over an image's latents
and averaged over the batch, so it grows with the number of latents. `edges` compares pixel differences at three resolutions (see
edge_distance); it is no learned perceptual metric and needs no weights.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from dataset.folders import BAD_IMAGE_CHOICES, ImageFolderDataset
from dataset.images import to_uint8
from dataset.latent_statistics import frequency_order, latent_scale
from dataset.loader import GlobalBatchSampler, build_loader
from engine_tokenbridge import optimizer_step
from evaluation.image_metrics import psnr
from models.latent_space import DiagonalGaussian
from models.vae import AutoencoderKL
from training.lr_sched import learning_rate
from util import checkpoint, dist
from util.cli import add_process_flags, at_least, check_writable, make_parser, parse
from util.heap import keep_freed_memory
from util.log import JsonlLog, get_logger, run_cli
from util.seeds import mixed_seed

logger = get_logger()

RESULT, STATE, LOG = "vae.pth", "vae_state.pth", "vae_log.jsonl"  # the files in --output_dir
# at most so many images, evenly spread over the classes, for the latents' scale and order, and for the PSNR
MEASURED_IMAGES = 4096
PARTS = ("loss", "l1", "kl", "edges")

# Flag -> argument of AutoencoderKL: fixed by a training state. The other names may change when a run is resumed, and the log says so.
STRUCTURE_FLAGS = {
    "vae_embed_dim": "embed_dim",
    "width": "ch",
    "ch_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "no_attention": "attention",
    "norm_groups": "norm_groups",
}
RECIPE_FLAGS = (
    "data_path",
    "img_size",
    "no_flip",
    "kl_weight",
    "perceptual_weight",
    "batch_size",
    "lr",
    "min_lr_ratio",
    "epochs",
    "max_steps",
    "grad_clip",
    "seed",
)


def build_parser() -> argparse.ArgumentParser:
    """All flags; the shape's defaults are those of KL-16 (SPEC 2)."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        help="folder with train/<class>/<image> and, if there is one, val/<class>/<image>",
    )
    group.add_argument(
        "--img_size", type=int, default=256, help="side of the images, pixels; a multiple of the stride 2^(levels - 1)"
    )
    group.add_argument(
        "--class_num",
        type=int,
        default=None,
        help="refuse a folder with more classes than this; the VAE itself has none",
    )
    group.add_argument("--no_flip", action="store_true", help="never mirror images (for digits, text)")
    group.add_argument("--on_bad_image", default="error", choices=BAD_IMAGE_CHOICES)

    group = parser.add_argument_group("VAE")
    group.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels")
    group.add_argument("--width", type=int, default=128, help="channels of the finest level")
    group.add_argument(
        "--ch_mult",
        default="1,1,2,2,4",
        help="width of each level as a multiple of --width; n levels have stride 2^(n - 1)",
    )
    group.add_argument(
        "--num_res_blocks", type=int, default=2, help="residual blocks per encoder level; the decoder has one more"
    )
    group.add_argument("--no_attention", action="store_true", help="no spatial attention at the coarsest level")
    group.add_argument(
        "--norm_groups", type=int, default=32, help="groups of every GroupNorm; must divide the width of every level"
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--kl_weight",
        type=float,
        default=1e-6,
        help="weight of the KL in nats per image; 1e-5 suits 64 latents (32-pixel digits), images with more latents need less",
    )
    group.add_argument("--perceptual_weight", type=float, default=0.0, help="weight of the edge term; 0 leaves it out")
    group.add_argument("--batch_size", type=int, default=16, help="images per process and step")
    group.add_argument("--epochs", type=int, default=50)
    group.add_argument(
        "--max_steps", type=int, default=None, help="stop after so many steps; the lr schedule ends there too"
    )
    group.add_argument("--lr", type=float, default=1e-4, help="first learning rate (Adam); falls along half a cosine")
    group.add_argument(
        "--min_lr_ratio", type=float, default=0.02, help="last learning rate as a share of --lr; 1 keeps it constant"
    )
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 for no limit")
    group.add_argument(
        "--precision",
        default=None,
        choices=dist.PRECISIONS,
        help="default: bf16 on cuda that has it, else fp16; fp32 on cpu",
    )
    group.add_argument(
        "--max_bad_steps",
        type=int,
        default=10,
        help="stop after so many steps in a row without a finite loss and gradient",
    )
    group.add_argument("--log_freq", type=int, default=20, help="steps between progress lines")

    group = parser.add_argument_group("files")
    group.add_argument("--output_dir", default="./output_dir")
    group.add_argument(
        "--resume", default="", help=f"folder with {STATE}, or that file; a folder without one starts anew"
    )
    group.add_argument("--save_freq", type=int, default=1000, help=f"steps between writes of {STATE}")
    add_process_flags(parser, seed=0)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused without reading a file; turns --ch_mult into a list of whole numbers."""
    at_least(
        args,
        img_size=2,
        vae_embed_dim=1,
        width=1,
        num_res_blocks=1,
        norm_groups=1,
        batch_size=1,
        epochs=1,
        max_steps=1,
        max_bad_steps=1,
        log_freq=1,
        save_freq=1,
        class_num=1,
    )
    at_least(args, kl_weight=0, perceptual_weight=0, lr=0, min_lr_ratio=0, grad_clip=0)
    for name in ("kl_weight", "perceptual_weight", "lr", "min_lr_ratio", "grad_clip"):
        if not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name} must be finite, got {getattr(args, name)}")
    if args.min_lr_ratio > 1:
        raise ValueError(f"--min_lr_ratio is a share of --lr, at most 1; got {args.min_lr_ratio}")
    try:
        multipliers = [int(part) for part in args.ch_mult.split(",")]
    except ValueError:
        multipliers = []
    if not multipliers or min(multipliers) < 1:
        raise ValueError(
            f"--ch_mult takes positive whole numbers separated by commas, such as 1,1,2,2; got {args.ch_mult!r}"
        )
    args.ch_mult = multipliers
    wrong = [args.width * m for m in (1, *multipliers) if args.width * m % args.norm_groups]
    if wrong:
        raise ValueError(
            f"--norm_groups {args.norm_groups} does not divide a level's width, {wrong[0]} (--width {args.width} times 1 or --ch_mult); "
            "give another --width or --norm_groups"
        )


# ------------------------------------------------------------------------------------------------------------- loss and state


def edge_distance(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of the edges of two image batches (B, 3, H, W): scalar.

    Edges are differences of horizontal and of vertical neighbours; they are compared at `scales` resolutions, each half the one before
    (2x2 averages), and averaged. Cheap, and no substitute for a learned metric: it only asks that edges be as steep as in the original.
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
        """Images (B, 3, H, W) in [-1, 1] and standard normal noise (B, C, h, w) -> (4,): loss, L1, KL, edges (see the file's head)."""
        # float32: exp(logvar) can overflow in half precision
        posterior = DiagonalGaussian(self.vae.encode(images).parameters.float())
        decoded = self.vae.decode(posterior.sample(noise=noise)).float()  # (B, 3, H, W)
        l1, kl = (images - decoded).abs().mean(), posterior.kl().mean()
        edges = edge_distance(images, decoded) if self.perceptual_weight else torch.zeros_like(l1)
        return torch.stack([l1 + self.kl_weight * kl + self.perceptual_weight * edges, l1, kl, edges])


class VaeState:
    """VAE, optimizer, scaler and the number of steps done: all that a training state keeps."""

    def __init__(self, vae: AutoencoderKL, args: argparse.Namespace, precision: str):
        self.vae = vae
        device = next(vae.parameters()).device
        self.objective: nn.Module = Objective(vae, args.kl_weight, args.perceptual_weight)
        if dist.world_size() > 1:
            self.objective = DistributedDataParallel(
                self.objective, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step = 0
        self.bad_in_row = 0  # steps skipped one after another, up to now

    def state_dict(self) -> dict:
        return {
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, content: dict, source: str) -> None:
        """Continue from a training state; ValueError naming `source` if it does not fit."""
        checkpoint.load_state(self.vae, content["model"], source)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"the optimizer state in {source} does not fit this VAE: {error}") from error
        if content.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.step = int(content["step"])


# ------------------------------------------------------------------------------------------------------------- training


def step_noise(shape: Sequence[int], seed: int, step: int, device: torch.device) -> Tensor:
    """This process's rows (B, C, h, w) of the posterior noise of the whole global batch, drawn from (seed, step) alone.

    So resuming needs no random state, and one process with the whole batch draws what several draw with its parts.
    """
    rows = shape[0]
    generator = torch.Generator(device).manual_seed(mixed_seed(seed, step))
    return torch.randn(rows * dist.world_size(), *shape[1:], generator=generator, device=device)[
        rows * dist.rank() : rows * (dist.rank() + 1)
    ]


class Window:
    """Steps whose numbers are still on the device."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.lrs: list[float] = []
        self.data_wait, self.started = 0.0, time.perf_counter()


def train_epoch(
    state: VaeState,
    loader: Iterable,
    args: argparse.Namespace,
    steps_per_epoch: int,
    total_steps: int,
    device: torch.device,
    precision: str,
    log: JsonlLog | None,
) -> None:
    """Train from `state.step` to the end of its epoch (or of the run), saving the state every --save_freq steps.

    The loader starts at that step's batch. A step without a finite gradient changes no weight; --max_bad_steps in a row are a
    ValueError that names step and lr, on every process alike, because DDP has averaged the gradients.
    """
    s, vae, window = args, state.vae.train(), Window()
    last = min((state.step // steps_per_epoch + 1) * steps_per_epoch, total_steps)
    parameters, batches = list(vae.parameters()), iter(loader)
    side = s.img_size // vae.stride
    while state.step < last:
        lr = learning_rate(
            state.step, peak=s.lr, min_lr=s.lr * s.min_lr_ratio, schedule="cosine", warmup_epochs=0, epochs=total_steps
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        waiting = time.perf_counter()
        images = next(batches)[0].to(device, non_blocking=True)  # (B, 3, S, S)
        window.data_wait += time.perf_counter() - waiting
        noise = step_noise((len(images), vae.embed_dim, side, side), s.seed, state.step, device)
        with dist.autocast(device, precision):
            parts = state.objective(images, noise)  # (4,)
        state.scaler.scale(parts[0]).backward()
        window.norms.append(optimizer_step(state, parameters, s.grad_clip))
        state.optimizer.zero_grad(set_to_none=True)
        window.parts.append(parts.detach())
        window.lrs.append(lr)
        state.step += 1
        if (
            state.step % s.log_freq == 0
            or state.step == last
            or device.type == "cpu"
            and not math.isfinite(window.norms[-1])
        ):
            window = flush(state, s, window, steps_per_epoch, total_steps, log, device)
        if state.step % s.save_freq == 0 and state.step < total_steps:
            window = flush(state, s, window, steps_per_epoch, total_steps, log, device)
            if not state.bad_in_row:  # else keep the state from before the trouble
                save_state(state, s, steps_per_epoch)


def flush(
    state: VaeState,
    args: argparse.Namespace,
    window: Window,
    steps_per_epoch: int,
    total_steps: int,
    log: JsonlLog | None,
    device: torch.device,
) -> Window:
    """The one place where the host waits: fetch the window's numbers, log them, stop after too many bad steps."""
    steps = len(window.parts)
    if not steps:
        return window
    parts, norms = dist.all_reduce_mean(torch.stack(window.parts)).tolist(), torch.stack(window.norms).tolist()
    seconds = time.perf_counter() - window.started
    rate = steps * args.batch_size * dist.world_size() / seconds
    for i, (values, norm, lr) in enumerate(zip(parts, norms, window.lrs, strict=True)):
        step = state.step - steps + i + 1
        finite = math.isfinite(norm) and math.isfinite(values[0])
        state.bad_in_row = 0 if finite else state.bad_in_row + 1
        if log is not None:
            numbers = dict(zip(PARTS, values, strict=True)) | {"grad_norm": norm} if finite else {"skipped": True}
            log.write({"step": step, "epoch": (step - 1) // steps_per_epoch, "lr": lr, **numbers, "images_per_s": rate})
        # no run may end broken
        if state.bad_in_row >= (args.max_bad_steps if step < total_steps else min(args.max_bad_steps, total_steps, 2)):
            raise ValueError(
                f"{state.bad_in_row} steps in a row had a loss or gradient that is not finite; stopped at step {step} with lr {lr:.3g}, "
                f"loss {values[0]}, grad norm {norm} (--max_bad_steps). Those steps changed no weight and the files written so far "
                "are as they were. Check the data, lower --lr or --grad_clip, or use --precision bf16/fp32"
            )
    eta = (total_steps - state.step) * seconds / steps
    loss, l1, kl, edges = np.mean(parts, axis=0)
    logger.info(
        "epoch %d step %d/%d  loss %.4f = L1 %.4f + %g x KL %.1f%s  lr %.2e  grad norm %.2f  %.1f images/s  data wait %.0f%%  "
        "ETA %d:%02d:%02d%s",
        (state.step - 1) // steps_per_epoch,
        state.step,
        total_steps,
        loss,
        l1,
        args.kl_weight,
        kl,
        f" + {args.perceptual_weight:g} x edges {edges:.4f}" if args.perceptual_weight else "",
        window.lrs[-1],
        norms[-1],
        rate,
        100 * window.data_wait / seconds,
        eta // 3600,
        eta % 3600 // 60,
        eta % 60,
        f"  ({state.bad_in_row} steps skipped in a row)" if state.bad_in_row else "",
    )
    return Window()


def save_state(state: VaeState, args: argparse.Namespace, steps_per_epoch: int) -> None:
    """Write OUT/vae_state.pth on rank 0, whole or not at all. ValueError on every rank, and no file, if a weight is not finite."""
    broken = [name for name, value in state.vae.named_parameters() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"{len(broken)} weights are NaN or infinite at step {state.step} with lr {state.optimizer.param_groups[0]['lr']:.3g}, first: "
            f"{broken[0]}; the files written so far are as they were. Lower --lr"
        )
    if dist.is_main():
        path = Path(args.output_dir) / STATE
        config = {"vae": state.vae.config, "args": vars(args)}
        checkpoint.atomic_save(state.state_dict() | {"steps_per_epoch": steps_per_epoch, "config": config}, path)
        logger.info("wrote %s at step %d", path, state.step)


# ------------------------------------------------------------------------------------------------------------- the result


@torch.no_grad()
def measure(
    vae: AutoencoderKL,
    train: ImageFolderDataset,
    val: ImageFolderDataset | None,
    args: argparse.Namespace,
    device: torch.device,
) -> float | None:
    """Set the VAE's scale_factor (1/std of posterior samples) and channel_order from training images; return the PSNR on `val`.

    The PSNR (dB, mean over images) is of images decoded from the posterior mean, in uint8. At most MEASURED_IMAGES of each set, in float32.
    ValueError if the latents are not finite.
    """

    def batches(dataset: ImageFolderDataset) -> Iterable[Tensor]:
        count = min(len(dataset), MEASURED_IMAGES)
        chosen = Subset(dataset, [i * len(dataset) // count for i in range(count)])
        return (images.to(device) for images, _ in DataLoader(chosen, args.batch_size, num_workers=args.num_workers))

    vae.eval()
    generator = torch.Generator(device).manual_seed(mixed_seed(args.seed, 0, 1))
    latents = torch.cat([vae.encode(images).sample(generator).cpu() for images in batches(train)])  # (N, C, h, w), raw
    if not torch.isfinite(latents).all():
        raise ValueError(
            "the trained VAE's latents are NaN or infinite, so no VAE file is written; train again with a lower --lr"
        )
    vae.scale_factor, vae.channel_order = latent_scale(latents), frequency_order(latents)
    if val is None:
        return None
    values = [psnr(to_uint8(images), to_uint8(vae.decode(vae.encode(images).mode()))).cpu() for images in batches(val)]
    return float(torch.cat(values).mean())


def write_result(
    state: VaeState,
    train: ImageFolderDataset,
    val: ImageFolderDataset | None,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Measure and write OUT/vae.pth on rank 0; the others wait, and fail with it."""
    error = None
    if dist.is_main():
        try:
            vae, path = state.vae, Path(args.output_dir) / RESULT
            quality = measure(vae, train, val, args, device)
            weights = {key: value.detach().cpu() for key, value in vae.state_dict().items()}
            checkpoint.atomic_save({"model": weights, "config": vae.config, "psnr": quality, "step": state.step}, path)
            logger.info(
                "wrote %s: latent scale %.4f, channel order %s, %s",
                path,
                vae.scale_factor,
                vae.channel_order,
                f"validation PSNR {quality:.2f} dB" if quality is not None else "no PSNR, since there is no val folder",
            )
        except (ValueError, OSError) as problem:
            error = problem
    dist.agree(error)


# ------------------------------------------------------------------------------------------------------------- wiring


def read_state(args: argparse.Namespace) -> tuple[Path | None, dict | None]:
    """The training state of --resume, or None for a fresh start. ValueError if that would overwrite another run's files in --output_dir."""
    path = Path(args.resume) if args.resume else None
    if path is not None and not path.is_file() and path.suffix != ".pth":
        path = path / STATE
    if path is not None and not path.is_file() and path.name == STATE:
        logger.info("no %s (--resume): training starts from random weights", path)
        path = None
    present = [name for name in (RESULT, STATE) if (Path(args.output_dir) / name).exists()]
    if present and (path is None or path.resolve() != (Path(args.output_dir) / STATE).resolve()):
        advice = f"continue it with --resume {args.output_dir}, or choose" if STATE in present else "choose"
        raise ValueError(
            f"{args.output_dir} (--output_dir) already holds {' and '.join(present)}: {advice} another folder"
        )
    if path is None:
        return None, None
    content = checkpoint.load_file(path)
    lacking = [key for key in ("model", "optimizer", "step", "steps_per_epoch", "config") if key not in content]
    if lacking:
        raise ValueError(
            f"{path} (--resume) is not a training state of main_vae.py, it lacks {', '.join(lacking)}; give the folder of {STATE}"
        )
    return path, content


def build_vae(args: argparse.Namespace, given: set[str], content: dict | None, source: Path | None) -> AutoencoderKL:
    """The VAE of the flags or of the training state, on the CPU with random weights. ValueError if a flag contradicts the state."""
    shape = {key: getattr(args, flag) for flag, key in STRUCTURE_FLAGS.items()} | {"attention": not args.no_attention}
    if content is not None:
        saved = content["config"]["vae"]
        for flag, key in STRUCTURE_FLAGS.items():
            if flag in given and shape[key] != saved[key]:
                raise ValueError(
                    f"--{flag} contradicts {source}, whose VAE has {key} = {saved[key]}; leave the flag out or train in another folder"
                )
            if key != "attention":
                setattr(args, flag, saved[key])
        shape = {key: saved[key] for key in shape}
        args.no_attention = not shape["attention"]
        before = content["config"]["args"]
        for name in RECIPE_FLAGS:
            if getattr(args, name) != before.get(name):
                logger.warning("--%s: %s from now on, was %s", name, getattr(args, name), before.get(name))
    torch.manual_seed(args.seed)  # initial weights, the same on every process
    vae = AutoencoderKL(**shape, scale_factor=1.0)
    if args.img_size % vae.stride:
        raise ValueError(
            f"--img_size {args.img_size} is not a multiple of the stride {vae.stride} (--ch_mult has {len(vae.config['ch_mult'])} levels)"
        )
    return vae


def train(
    args: argparse.Namespace, vae: AutoencoderKL, content: dict | None, source: Path | None, device: torch.device
) -> None:
    """Train to --epochs or --max_steps and write the files named at the file's head."""
    world, output = dist.world_size(), Path(args.output_dir)
    dataset = ImageFolderDataset(
        Path(args.data_path) / "train", args.img_size, not args.no_flip, args.on_bad_image, args.class_num
    )
    val_root = Path(args.data_path) / "val"
    val = ImageFolderDataset(val_root, args.img_size, False, args.on_bad_image) if val_root.is_dir() else None
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, dist.rank(), world, args.seed)
    steps_per_epoch = len(sampler)
    total_steps = (
        args.epochs * steps_per_epoch if args.max_steps is None else min(args.epochs * steps_per_epoch, args.max_steps)
    )
    precision = dist.pick_precision(args.precision, device)
    state = VaeState(vae.to(device), args, precision)
    if content is not None:
        state.load_state_dict(content, str(source))
        logger.info("resumed from %s at step %d", source, state.step)
        if content["steps_per_epoch"] != steps_per_epoch:
            logger.warning(
                "%s was written with %s steps per epoch, now there are %d (batch size or data changed): the order of images is not "
                "that of a run never stopped",
                source,
                content["steps_per_epoch"],
                steps_per_epoch,
            )
    check_writable(output, "--output_dir")
    dist.barrier()
    side = args.img_size // vae.stride
    logger.info(
        "VAE: %.2f M parameters, %d px -> %d x %d x %d latents; %d images, global batch %d, lr %.3g, %d steps, %d per epoch, %s on %s",
        sum(p.numel() for p in vae.parameters()) / 1e6,
        args.img_size,
        vae.embed_dim,
        side,
        side,
        len(dataset),
        args.batch_size * world,
        args.lr,
        total_steps,
        steps_per_epoch,
        precision,
        device,
    )
    if state.step >= total_steps:
        logger.info("no training left to do: %d of %d steps are done", state.step, total_steps)
        result = output / RESULT
        if result.is_file() and checkpoint.load_file(result, "--output_dir").get("step") == state.step:
            logger.info("%s is already there", result)
            return
    log = JsonlLog(output / LOG, state.step) if dist.is_main() else None
    loader = build_loader(dataset, sampler, args.num_workers, args.pin_mem)
    while state.step < total_steps:
        epoch, done = divmod(state.step, steps_per_epoch)
        sampler.set_epoch(epoch, done)
        train_epoch(state, loader, args, steps_per_epoch, total_steps, device, precision, log)
    if log is not None:
        log.close()
    save_state(state, args, steps_per_epoch)
    write_result(state, dataset, val, args, device)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, train. Raises ValueError or OSError for bad input."""
    args, given = parse(build_parser(), argv)
    check_arguments(args)
    try:
        device = dist.init(args.device, args.dist_url)
        if device.type == "cpu":
            keep_freed_memory()
        source, content = read_state(args)
        train(args, build_vae(args, given, content, source), content, source, device)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
