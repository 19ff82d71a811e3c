"""A training run: its data, its settings, its checkpoints, epoch after epoch (engine_tokenbridge.py has the loop within one). No parsing."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from engine_data import build_dataset
from engine_tokenbridge import TrainSettings, TrainState, train_one_epoch
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import checkpoint, dist
from util.cli import check_writable
from util.loader import GlobalBatchSampler, build_loader
from util.log import JsonlLog, get_logger
from util.lr_sched import base_learning_rate

logger = get_logger()


def train(args: argparse.Namespace, model: TokenBridge, vae: AutoencoderKL, content: dict | None, source: Path | None, device: torch.device,
          make_evaluator: Callable[[], Callable] | None = None) -> None:
    """Train to --epochs or --max_steps; writes checkpoint-last.pth, log.jsonl and tensorboard events to --output_dir.

    make_evaluator: called once the data is known to be good; what it returns is called every --eval_freq epochs (--online_eval).
    """
    world = dist.world_size()
    dataset = build_dataset(args, model, vae, ((content or {}).get("config") or {}).get("classes"))
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, dist.rank(), world, args.seed)
    steps_per_epoch = len(sampler) // args.accum_iter
    if steps_per_epoch == 0:
        raise ValueError(f"the data set has {len(dataset)} samples, fewer than one optimizer step needs "
                         f"({args.batch_size} x {world} processes x --accum_iter {args.accum_iter})")
    evaluator = make_evaluator() if make_evaluator is not None else None
    global_batch = args.batch_size * world * args.accum_iter
    settings = TrainSettings(
        batch_size=args.batch_size, epochs=args.epochs, steps_per_epoch=steps_per_epoch, lr=base_learning_rate(args.lr, args.blr, global_batch),
        min_lr=args.min_lr, lr_schedule=args.lr_schedule, warmup_epochs=args.warmup_epochs, grad_clip=args.grad_clip, seed=args.seed,
        precision=dist.pick_precision(args.precision, device), accum_iter=args.accum_iter, max_steps=args.max_steps,
        max_bad_steps=args.max_bad_steps, log_freq=args.log_freq)
    if content is not None:
        checkpoint.load_state(model, content["model"], str(source))
    state = TrainState(model.to(device), weight_decay=args.weight_decay, ema_rate=args.ema_rate, precision=settings.precision)
    if content is not None:
        state.load_state_dict(content, steps_per_epoch, str(source))
        logger.info("resumed from %s at step %d", source, state.step)
    elif args.start_epoch:
        state.step = args.start_epoch * steps_per_epoch
    output = check_writable(args.output_dir, "--output_dir")               # last, so that a refused command leaves no folder behind
    config = {"model_name": args.model, "model": model.config, "vae": vae.config, "vae_fingerprint": vae.latent_fingerprint(),
              "classes": dataset.classes, "args": vars(args)}

    def save() -> None:
        if dist.is_main():
            checkpoint.atomic_save(state.state_dict(steps_per_epoch) | {"config": config}, output / checkpoint.LAST)
            logger.info("wrote %s at step %d", output / checkpoint.LAST, state.step)

    log = JsonlLog(output / "log.jsonl", state.step, output) if dist.is_main() else None
    levels, width = model.config["quant_levels"], model.config["channel_embed_dim"]
    start = math.log(levels) + width / (width + levels)                    # xavier-uniform logits of a normalised feature have twice that variance
    logger.info("%s: %.2f M parameters, %d tokens x %d dimensions x %d levels; %d images, global batch %d, lr %.3g, %d epochs of %d steps, %s on %s",
                args.model, sum(p.numel() for p in model.parameters()) / 1e6, model.num_tokens, model.token_dim, levels, len(dataset), global_batch,
                settings.lr, args.epochs, steps_per_epoch, settings.precision, device)
    logger.info("the loss starts near %.2f; below ln %d = %.3f something has been learned", start, levels, math.log(levels))
    if state.step >= settings.total_steps:
        logger.info("nothing to do: %d of %d steps are done", state.step, settings.total_steps)
    loader = build_loader(dataset, sampler, args.num_workers, args.pin_mem)
    while state.step < settings.total_steps:
        epoch, done = divmod(state.step, steps_per_epoch)
        sampler.set_epoch(epoch, done * args.accum_iter)
        train_one_epoch(state, vae, loader, settings, device, log)
        finished = state.step >= settings.total_steps
        if finished or (epoch + 1) % args.save_last_freq == 0:
            save()
        if evaluator is not None and (finished or (epoch + 1) % args.eval_freq == 0):
            with state.ema.swapped():
                evaluator(model, vae, step=state.step, weights="ema")
    if log is not None:
        log.close()
