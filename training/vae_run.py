"""A run of main_vae.py: where it starts, its data, and the VAE file that it writes at the end."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dataset.folders import spread_evenly
from dataset.image_folder import ImageFolderDataset, readable_images
from dataset.images import to_uint8
from dataset.latent_statistics import frequency_order, latent_scale
from dataset.loader import GlobalBatchSampler, build_loader
from models.vae import AutoencoderKL
from training.guard import check_same_start, stop_message
from training.outputs import open_log
from training.preempt import StopRequest
from training.state import changes
from training.vae import LOG, RESULT, STATE, VaeSettings, VaeState, train_epoch
from util import checkpoint, dist
from util.files import remove_leftovers
from util.json_reader import check_schema
from util.log import get_logger, warn_once
from util.options import ArgumentError
from util.seeds import mixed_seed

logger = get_logger()

# at most so many images, evenly spread over the classes, for the latents' scale and order, and for the PSNR
MEASURED_IMAGES = 4096
# Flag -> argument of AutoencoderKL: fixed by a training state.
STRUCTURE = {"vae_embed_dim": "embed_dim", "width": "ch", "no_attention": "attention"}
STRUCTURE |= {name: name for name in ("ch_mult", "num_res_blocks", "norm_groups")}
# What a training state holds (util.files.check_schema).
SIZES = {key: int for key in STRUCTURE.values()} | {"ch_mult": [int], "attention": bool}
CONTENT = {"model": dict, "optimizer": dict, "step": int, "steps_per_epoch": int}
CONTENT |= {"config": {"vae": SIZES, "args": dict}}
# These may change when a run is resumed, and the log says so.
RECIPE_NAMES = (
    *("data_path", "img_size", "no_flip", "kl_weight", "perceptual_weight", "batch_size", "lr", "min_lr_ratio"),
    *("epochs", "max_steps", "grad_clip", "seed"),
)


def read_state(settings: VaeSettings) -> tuple[Path | None, dict | None]:
    """The training state of `resume`, or None for a fresh start; refuses to overwrite another run's files."""
    path, output = Path(settings.resume) if settings.resume else None, Path(settings.output_dir)
    if path is not None and not path.is_file() and path.suffix != ".pth":
        path = path / STATE
    if path is not None and not path.is_file() and path.name == STATE:
        logger.info("no %s (--resume): training starts from random weights", path)
        path = None
    present = [name for name in (RESULT, STATE) if (output / name).exists()]
    if present and (path is None or path.resolve() != (output / STATE).resolve()):
        advice = f"continue it with --resume {output}, or choose" if STATE in present else "choose"
        raise ValueError(f"{output} (--output_dir) already holds {' and '.join(present)}: {advice} another folder")
    if path is None:
        return None, None
    content = checkpoint.read_file(path, "resume")
    try:
        check_schema(content, CONTENT, "it")
        if content["step"] < 0 or content["steps_per_epoch"] < 1:
            raise ValueError(f"step {content['step']}, steps_per_epoch {content['steps_per_epoch']}")
    except ValueError as error:
        reason = f"{path} is not a training state of main_vae.py ({error}); give the folder of {STATE}"
        raise ArgumentError("resume", reason) from error
    return path, content


def build_vae(
    settings: VaeSettings, given: set[str], content: dict | None, source: Path | None
) -> tuple[AutoencoderKL, VaeSettings]:
    """The VAE of the settings or the training state, on the CPU with random weights; the settings with its structure.

    ArgumentError if a setting that was given contradicts the state.
    """
    if content is not None:
        saved, own = content["config"]["vae"], settings.structure()
        for name, key in STRUCTURE.items():
            if name in given and own[key] != saved[key]:
                advice = "leave it out or train in another folder"
                reason = f"{name} contradicts {source}, whose VAE has {key} = {saved[key]}; {advice}"
                raise ArgumentError(name, reason)
        same = {name: saved[key] for name, key in STRUCTURE.items()}
        same |= {"ch_mult": ",".join(map(str, saved["ch_mult"])), "no_attention": not saved["attention"]}
        settings = replace(settings, **same)
        if changed := changes(vars(settings), content["config"]["args"], RECIPE_NAMES):
            warn_once("settings that differ from those of %s: %s", source, "; ".join(changed))
    torch.manual_seed(settings.seed)  # initial weights, the same on every process
    vae = AutoencoderKL(**settings.structure(), scale_factor=1.0)
    if settings.img_size % vae.stride:
        stride = f"the stride {vae.stride} (ch_mult has {len(settings.multipliers)} levels)"
        raise ArgumentError("img_size", f"img_size {settings.img_size} is not a multiple of {stride}")
    return vae, settings


def train(
    settings: VaeSettings,
    vae: AutoencoderKL,
    content: dict | None,
    source: Path | None,
    device: torch.device,
    psnr: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Train to the last step and write vae.pth, vae_state.pth and vae_log.jsonl to output_dir.

    psnr: of two uint8 batches (B, 3, S, S), in dB, (B,).
    """
    output, root = Path(settings.output_dir), Path(settings.data_path)
    size, bad = settings.img_size, settings.on_bad_image
    dataset = ImageFolderDataset(root / "train", size, not settings.no_flip, bad, settings.class_num)
    val = ImageFolderDataset(root / "val", size, False, bad) if (root / "val").is_dir() else None
    check_same_start(dataset, content, settings.resume)
    sampler = GlobalBatchSampler(len(dataset), settings.batch_size, dist.rank(), dist.world_size(), settings.seed)
    settings = settings.prepared(len(sampler), device)
    state = VaeState(vae.to(device), settings)
    if content is not None:
        resume(state, settings, content, source)
    announce(state, settings, len(dataset))
    if state.step >= settings.total_steps:
        logger.info("no training left to do: %d of %d steps are done", state.step, settings.total_steps)
        result = output / RESULT
        if result.is_file() and checkpoint.read_file(result).get("step") == state.step:
            logger.info("%s is already there", result)
            return
    own = bool(settings.resume) and Path(settings.resume).resolve() in (output.resolve(), (output / STATE).resolve())
    if dist.is_main() and own:
        remove_leftovers(output, STATE, RESULT, LOG)
    log = open_log(output / LOG, own, state.step) if dist.is_main() else None
    loader = build_loader(dataset, sampler, settings.num_workers, settings.pin_memory)
    stop, stopped = StopRequest(), False
    with contextlib.closing(log) if log is not None else contextlib.nullcontext(), stop.listening():
        while state.step < settings.total_steps and not stopped:
            epoch, done = divmod(state.step, settings.steps_per_epoch)
            sampler.set_epoch(epoch, done)
            stopped = train_epoch(state, loader, settings, log, stop.agreed)
    if stopped:
        logger.info("%s", stop_message(state.step, settings.total_steps, state.saved, output))
    else:
        state.save(settings)
        write_result(state, dataset, val, settings, psnr)
    state.skipped.warn(state.step, finished=not stopped)


def resume(state: VaeState, settings: VaeSettings, content: dict, source: Path) -> None:
    """Load a training state; a warning if the order of the images is another one now."""
    state.load_state_dict(content, str(source))
    logger.info("resumed from %s at step %d", source, state.step)
    if content["steps_per_epoch"] != settings.steps_per_epoch:
        now = f"now there are {settings.steps_per_epoch} (batch size or data changed)"
        order = "the order of images is not that of an uninterrupted run"
        warn_once("%s was written with %s steps per epoch, %s: %s", source, content["steps_per_epoch"], now, order)


def announce(state: VaeState, settings: VaeSettings, images: int) -> None:
    """Log what is trained."""
    vae, side = state.vae, settings.img_size // state.vae.stride
    logger.info(
        "VAE: %.2f M parameters, %d px -> %d x %d x %d latents; %d images, global batch %d, lr %.3g, %d steps, %d per "
        "epoch, %s on %s",
        sum(p.numel() for p in vae.parameters()) / 1e6,
        *(settings.img_size, vae.embed_dim, side, side, images, settings.images_per_step, settings.lr),
        *(settings.total_steps, settings.steps_per_epoch, settings.precision, state.device),
    )


@torch.no_grad()
def measure(
    vae: AutoencoderKL,
    train: ImageFolderDataset,
    val: ImageFolderDataset | None,
    settings: VaeSettings,
    psnr: Callable[[Tensor, Tensor], Tensor],
) -> float | None:
    """Set the VAE's scale_factor (1/std of posterior samples) and channel_order from training images; PSNR on `val`.

    The PSNR (dB, mean over images) is of images decoded from the posterior mean, in uint8. At most MEASURED_IMAGES of
    each set, in float32. ArgumentError if the latents are not finite.
    """
    device = next(vae.parameters()).device

    def batches(dataset: ImageFolderDataset) -> Iterator[Tensor]:
        chosen = spread_evenly(range(len(dataset)), MEASURED_IMAGES)
        for images, _ in readable_images(dataset, chosen, settings.batch_size, settings.num_workers):
            yield images.to(device)

    vae.eval()
    generator = torch.Generator(device).manual_seed(mixed_seed(settings.seed, 0, 1))
    latents = torch.cat([vae.encode(images).sample(generator).cpu() for images in batches(train)])  # (N, C, h, w), raw
    if not torch.isfinite(latents).all():
        advice = "so no VAE file is written; train again with a lower lr"
        raise ArgumentError("lr", f"the trained VAE's latents are NaN or infinite, {advice}")
    vae.scale_factor, vae.channel_order = latent_scale(latents), frequency_order(latents)
    if val is None:
        return None
    values = [psnr(to_uint8(images), to_uint8(vae.decode(vae.encode(images).mode()))).cpu() for images in batches(val)]
    return float(torch.cat(values).mean())


def write_result(
    state: VaeState,
    train: ImageFolderDataset,
    val: ImageFolderDataset | None,
    settings: VaeSettings,
    psnr: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Measure and write output_dir/vae.pth on rank 0; the others wait, and fail with it."""
    error = None
    if dist.is_main():
        try:
            vae, path = state.vae, Path(settings.output_dir) / RESULT
            quality = measure(vae, train, val, settings, psnr)
            weights = {key: value.detach().cpu() for key, value in vae.state_dict().items()}
            checkpoint.atomic_save({"model": weights, "config": vae.config, "psnr": quality, "step": state.step}, path)
            about = "no PSNR, since there is no val folder" if quality is None else f"validation PSNR {quality:.2f} dB"
            order = vae.channel_order
            logger.info("wrote %s: latent scale %.4f, channel order %s, %s", path, vae.scale_factor, order, about)
        except (ValueError, OSError) as problem:
            error = problem
    dist.agree(error)
