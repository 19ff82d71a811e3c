"""A training run: its data, its settings, its checkpoints, epoch after epoch (engine_tokenbridge.py has the loop within one). No parsing."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dataset.images import read_image, save_grid, to_tensor
from dataset.loader import GlobalBatchSampler, build_loader
from dataset.training_set import DataOptions, build_dataset
from engine_tokenbridge import TrainSettings, train_one_epoch
from generation.pipeline import GenerationSettings, generate_batches, generation_settings
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from training import posthoc_ema
from training.flops import peak_tflops
from training.lr_sched import base_learning_rate
from training.preempt import StopRequest
from training.recipe import RECIPE, name_older_recipe, warn_of_other_recipe
from training.sharding import cannot_shard
from training.state import TrainState
from util import checkpoint, dist
from util.cli import check_writable
from util.log import JsonlLog, get_logger
from util.options import read_options

logger = get_logger()


def train_settings(args: argparse.Namespace, steps_per_epoch: int, device: torch.device) -> TrainSettings:
    """What the loop needs to know, from the flags."""
    precision = dist.pick_precision(args.precision, device)
    return TrainSettings(
        batch_size=args.batch_size,
        epochs=args.epochs,
        steps_per_epoch=steps_per_epoch,
        lr=base_learning_rate(args.lr, args.blr, args.batch_size * dist.world_size() * args.accum_iter),
        min_lr=args.min_lr,
        lr_schedule=args.lr_schedule,
        warmup_epochs=args.warmup_epochs,
        grad_clip=args.grad_clip,
        seed=args.seed,
        precision=precision,
        accum_iter=args.accum_iter,
        max_steps=args.max_steps,
        max_bad_steps=args.max_bad_steps,
        log_freq=args.log_freq,
        save_every_steps=args.save_every_steps,
        posthoc_ema_freq=args.posthoc_ema_freq,
        peak_tflops=args.peak_tflops or peak_tflops(dist.device_name(device), precision),
    )


def announce(
    args: argparse.Namespace, model: TokenBridge, settings: TrainSettings, images: int, device: torch.device
) -> None:
    """What is trained, and where its loss should start."""
    levels, width = model.config.quant_levels, model.config.channel_embed_dim
    # xavier-uniform logits of a normalised feature have twice that variance
    start = math.log(levels) + width / (width + levels)
    logger.info(
        "%s: %.2f M parameters, %d tokens x %d dimensions x %d levels; %d images, global batch %d, lr %.3g, %d epochs of %d steps, %s on %s",
        args.model,
        sum(p.numel() for p in model.parameters()) / 1e6,
        model.num_tokens,
        model.token_dim,
        levels,
        images,
        settings.batch_size * dist.world_size() * settings.accum_iter,
        settings.lr,
        args.epochs,
        settings.steps_per_epoch,
        settings.precision,
        device,
    )
    logger.info(
        "the loss starts near %.2f; below ln %d = %.3f something has been learned", start, levels, math.log(levels)
    )


def sample_grid(
    model: TokenBridge, vae: AutoencoderKL, settings: GenerationSettings, path: Path, device: torch.device
) -> Tensor | None:
    """Write a grid of images of up to 16 classes, evenly spaced; the same seeds each time. Returns it (3, H, W) on rank 0."""
    count = min(16, model.class_num)
    labels = [i * model.class_num // count for i in range(count)]
    mine = list(generate_batches(model, vae, labels, range(dist.rank(), count, dist.world_size()), settings, device))
    pieces = dist.gather_objects(
        [(number, image.cpu()) for numbers, images in mine for number, image in zip(numbers, images, strict=True)]
    )
    if not dist.is_main():
        return None
    images = dict(piece for part in pieces for piece in part)
    save_grid(path, torch.stack([images[i] for i in range(count)]), math.ceil(count**0.5))
    return to_tensor(read_image(path))


def due(epoch: int, every: int) -> bool:
    """Whether a checkpoint or an evaluation is due after epoch number `epoch` (0-based): epochs 0, every, 2*every, ... as published."""
    return epoch % every == 0


def train(
    args: argparse.Namespace,
    model: TokenBridge,
    vae: AutoencoderKL,
    content: dict | None,
    source: Path | None,
    device: torch.device,
    optimizer_settings: dict,
    make_evaluator: Callable[[], Callable] | None = None,
) -> None:
    """Train to --epochs or --max_steps; writes checkpoint-last.pth, log.jsonl and tensorboard events to --output_dir.

    optimizer_settings: weight_decay, betas and eps (engine_recipe.take_optimizer_settings). make_evaluator: called once the data is known to
    be good; what it returns is called with (model, vae, step) where --eval_freq says so, and at the end (--online_eval).
    SIGTERM and SIGUSR1 end the run after a step, with a checkpoint.
    """
    classes = ((content or {}).get("config") or {}).get("classes")
    dataset = build_dataset(read_options(DataOptions, args), model, vae, args.img_size, classes)
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, dist.rank(), dist.world_size(), args.seed)
    steps_per_epoch = len(sampler) // args.accum_iter
    if steps_per_epoch == 0:
        raise ValueError(
            f"the data set has {len(dataset)} samples, fewer than one optimizer step needs "
            f"({args.batch_size} x {dist.world_size()} processes x --accum_iter {args.accum_iter})"
        )
    if args.fsdp and dist.world_size() == 1:
        raise ValueError(
            "--fsdp cuts the weights over several processes, and there is one: start it with torchrun --nproc_per_node, or leave it out"
        )
    if args.fsdp and (reason := cannot_shard(device)):
        raise ValueError(reason)
    evaluator = make_evaluator() if make_evaluator is not None else None
    settings, grid = train_settings(args, steps_per_epoch, device), generation_settings(args, device)
    grid.check(model.token_dim)
    if content is not None:
        checkpoint.load_state(model, content["model"], str(source))
    state = TrainState(
        model,
        **optimizer_settings,
        ema_rate=args.ema_rate,
        ema_warmup=args.ema_warmup,
        precision=settings.precision,
        compiled=args.compile,
        fsdp=args.fsdp,
        accumulates=args.accum_iter > 1,
        posthoc_ema=args.posthoc_ema_freq > 0,
        device=device,
    )
    vae.to(memory_format=torch.channels_last)  # faster convolutions; for images only, a cache needs no VAE
    data = {
        "samples": len(dataset),
        "seed": args.seed,
        "global_batch": args.batch_size * dist.world_size() * args.accum_iter,
    }
    if content is not None:
        state.load_state_dict(content, steps_per_epoch, str(source))
        logger.info(
            "resumed from %s at step %d: epoch %d, %d of its %d steps done",
            source,
            state.step,
            *divmod(state.step, steps_per_epoch),
            steps_per_epoch,
        )
        warn_of_other_data(content, data, source)
        warn_of_other_recipe(args, content, source, settings.lr)
        name_older_recipe(args, content, source)
    elif args.start_epoch:
        state.step = args.start_epoch * steps_per_epoch
    config = {
        "recipe": RECIPE,
        "model_name": args.model,
        "model": model.config.to_dict(),
        "vae": vae.config,
        "vae_fingerprint": vae.latent_fingerprint(),
        "classes": dataset.classes,
        "args": vars(args),
        "optimizer": optimizer_settings,
    }
    if state.power_emas:
        config["run"] = ((content or {}).get("config") or {}).get("run") or posthoc_ema.run_name(config, data)
        posthoc_ema.check_run(Path(args.output_dir), config["run"])
    output = check_writable(args.output_dir, "--output_dir")  # last, so that a refused command leaves no folder behind
    writer, saved = checkpoint.CheckpointWriter(output, args.keep_last), None
    snapshots = posthoc_ema.SnapshotWriter(output, config["run"], state.step) if state.power_emas else None

    def keep_averages() -> None:
        if snapshots is not None:
            snapshots.take(state.step, state.power_emas, state.fsdp)

    def save() -> None:
        nonlocal saved
        if saved == state.step:  # --save_every_steps, and then the end of an epoch
            return
        saved = state.step
        epoch, done = divmod(state.step, steps_per_epoch)
        snapshot = state.snapshot(steps_per_epoch)
        if snapshots is not None:
            snapshots.close()  # a checkpoint's snapshots are on the disk before it
        if snapshot is not None:
            writer.save(snapshot | {"config": config, "data": data | {"epoch": epoch, "steps_done": done}})

    log = JsonlLog(output / "log.jsonl", state.step, output) if dist.is_main() else None
    announce(args, model, settings, len(dataset), device)
    if state.step >= settings.total_steps:
        logger.info("nothing to do: %d of %d steps are done", state.step, settings.total_steps)
    loader = build_loader(dataset, sampler, args.num_workers, args.pin_mem)
    stop, stopped = StopRequest(), False
    try:
        with stop.listening():
            while state.step < settings.total_steps and not stopped:
                epoch, done = divmod(state.step, steps_per_epoch)
                sampler.set_epoch(epoch, done * args.accum_iter)
                stopped = train_one_epoch(
                    state,
                    vae,
                    loader,
                    settings,
                    device,
                    log,
                    save=save,
                    keep_averages=keep_averages,
                    should_stop=stop.agreed,
                )
                finished, ended = state.step >= settings.total_steps, state.step % steps_per_epoch == 0
                if finished:
                    keep_averages()
                if stopped or finished or due(epoch, args.save_last_freq):
                    save()
                if evaluator is not None and not stopped and (finished or due(epoch, args.eval_freq)):
                    evaluator(state.averaged_model(), vae, state.step)
                if args.sample_freq and not stopped and (finished or ended and (epoch + 1) % args.sample_freq == 0):
                    picture = sample_grid(
                        state.averaged_model(), vae, grid, output / "samples" / f"step-{state.step:08d}.png", device
                    )
                    if log is not None:
                        log.write_image("samples", picture, state.step)
    finally:
        if snapshots is not None:
            snapshots.close()
        writer.close()
        if log is not None:
            log.close()
    if stopped:
        logger.info(
            "stopped by a signal after step %d of %d; the same command with --resume %s continues",
            state.step,
            settings.total_steps,
            output,
        )


def warn_of_other_data(content: dict, data: dict, source: Path) -> None:
    """The order of the data follows from these numbers; a run that continues with others is not the run never stopped."""
    before = content.get("data")
    changed = [
        f"{key} {data[key]} instead of {before.get(key)}"
        for key in data
        if isinstance(before, dict) and before.get(key) != data[key]
    ]
    if changed:
        logger.warning("%s was trained with other data or another order of it: %s", source, ", ".join(changed))
