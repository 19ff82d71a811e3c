"""Train a TokenBridge model, evaluate it (FID, Inception Score), or sample images from it.

train      torchrun --nproc_per_node=8 main_tokenbridge.py --model tokenbridge_large --data_path DIR --output_dir OUT --resume OUT
evaluate   torchrun --nproc_per_node=8 main_tokenbridge.py --evaluate --resume OUT --cfg 3.1 --temperature 0.96 --num_images 50000
sample     python main_tokenbridge.py --sample --resume OUT --classes 207,360 --num_images 8 --seed 0 --output_dir PICTURES
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch

from checkpoints import download
from checkpoints.build import StructureOptions, build_model, load_generator_weights, read_checkpoint
from dataset.record import read_record
from dataset.training_set import DataOptions
from evaluation.evaluator import EvaluationOptions, Evaluator
from generation.pipeline import Pipeline, generation_settings
from generation.sample import SampleOptions, sample
from models.sampling.options import SamplerOptions
from models.sampling.orders import ORDERS
from models.sampling.schedules import CFG_SCHEDULES, MASK_SCHEDULES, TEMPERATURE_SCHEDULES
from models.vae_loading import load_vae
from training.lr_sched import LR_SCHEDULES
from training.published import training_differences
from training.recipe import take_optimizer_settings
from training.run import train
from util import checkpoint, dist
from util.cli import add_process_flags, at_least, make_parser, parse
from util.heap import keep_freed_memory
from util.log import get_logger, log_lines, run_cli
from util.options import add_options, flag_names, read_options
from util.presets import apply_preset, load_preset, preset_names

logger = get_logger()


def build_parser() -> argparse.ArgumentParser:
    """All flags; the published ones keep name, meaning and default (SPEC 10), but --device defaults to auto."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to do (default: train)")
    group.add_argument(
        "--evaluate", action="store_true", help="generate --num_images images and print FID and Inception Score"
    )
    group.add_argument("--sample", action="store_true", help="write images of --classes to --output_dir")
    group.add_argument(
        "--preset",
        default=None,
        choices=preset_names(),
        help="a recipe or evaluation of configs/, with the numbers to expect: sets all its flags, printed; any flag given wins",
    )

    add_options(parser, StructureOptions, "model and tokenizer")

    group = parser.add_argument_group("training")
    group.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="per process and micro-batch; global = this x processes x --accum_iter",
    )
    group.add_argument("--accum_iter", type=int, default=1, help="micro-batches per optimizer step")
    group.add_argument("--epochs", type=int, default=400)
    group.add_argument(
        "--max_steps", type=int, default=None, help="stop after so many optimizer steps; the lr schedule ends there too"
    )
    group.add_argument("--lr", type=float, default=None, help="peak learning rate; default: blr x global batch / 256")
    group.add_argument("--blr", type=float, default=1e-4, help="learning rate per 256 images")
    group.add_argument("--min_lr", type=float, default=0.0)
    group.add_argument("--lr_schedule", default="cosine", choices=LR_SCHEDULES)
    group.add_argument("--warmup_epochs", type=int, default=100)
    group.add_argument(
        "--weight_decay", type=float, default=0.02, help="of AdamW; when resuming, default: the checkpoint's"
    )
    group.add_argument("--grad_clip", type=float, default=3.0, help="largest gradient norm; 0 for no limit")
    group.add_argument("--ema_rate", type=float, default=0.9999)
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
    group.add_argument(
        "--ema_warmup",
        action="store_true",
        help="a lower EMA rate in the first steps, (1 + t) / (10 + t); published: off",
    )
    group.add_argument(
        "--posthoc_ema_freq",
        type=int,
        default=0,
        help="steps between snapshots for an EMA whose length is chosen afterwards (python -m tools.posthoc_ema); 0 for none",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer blocks, or the sampler (torch.compile): slower start, faster steps",
    )
    group.add_argument(
        "--fsdp", action="store_true", help="cut weights, gradients, optimizer and EMA over the processes (fully_shard)"
    )
    group.add_argument("--log_freq", type=int, default=20, help="steps between progress lines")
    group.add_argument(
        "--peak_tflops", type=float, default=None, help="of one device, dense, for MFU; default: by the device's name"
    )
    group.add_argument(
        "--sample_freq",
        type=int,
        default=0,
        help="epochs between grids of samples (EMA weights, same seeds); 0 for none",
    )

    add_options(parser, DataOptions, "data")

    group = parser.add_argument_group("checkpoints")
    group.add_argument("--output_dir", default="./output_dir")
    group.add_argument("--resume", default="", help="a checkpoint file, or a folder with checkpoint-last.pth")
    group.add_argument("--start_epoch", type=int, default=0)
    group.add_argument(
        "--save_last_freq",
        type=int,
        default=5,
        help="a checkpoint after epochs 0, N, 2N, ... (0-based, as published) and at the end",
    )
    group.add_argument("--save_every_steps", type=int, default=None, help="a checkpoint every so many steps too")
    group.add_argument(
        "--keep_last", type=int, default=1, help="keep so many; from 2 on each as checkpoint-<step>.pth, too"
    )
    group.add_argument(
        "--weights", default="ema", choices=("ema", "model"), help="which of a checkpoint's weights generate images"
    )

    group = parser.add_argument_group("generation and evaluation")
    group.add_argument("--num_iter", type=int, default=256, help="sampling steps")
    group.add_argument(
        "--cfg",
        type=float,
        nargs="+",
        default=1.0,
        help="guidance scale; 1 means none; several with --evaluate, --online_eval and --sample: all of them in turn",
    )
    group.add_argument(
        "--cfg_schedule", default="linear", choices=CFG_SCHEDULES, help="guidance over the steps; linear as published"
    )
    group.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=1.0,
        help="several with --evaluate and --online_eval: all pairs with --cfg",
    )
    group.add_argument(
        "--online_eval",
        action="store_true",
        help="evaluate the EMA weights during training: at cfg 1, then at each --cfg that is neither 1 nor 0 (as published)",
    )
    group.add_argument(
        "--eval_freq", type=int, default=40, help="--online_eval: after epochs 0, N, 2N, ... (0-based) and at the end"
    )
    add_options(parser, EvaluationOptions, "evaluation")
    add_sampler_flags(parser)
    add_options(parser, SampleOptions, "for --sample only")
    add_process_flags(parser, seed=1)
    return parser


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """What the published sampler lacks (models/sampling/loop.py); the defaults are the published sampler's."""
    o = SamplerOptions()
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--order", default=o.order, choices=ORDERS, help="which tokens are revealed first; random as published"
    )
    group.add_argument(
        "--mask_schedule",
        default=o.mask_schedule,
        choices=list(MASK_SCHEDULES),
        help="how many tokens stay masked over the steps",
    )
    group.add_argument(
        "--cfg_interval",
        type=float,
        nargs=2,
        default=list(o.cfg_interval),
        metavar=("FROM", "TO"),
        help="--cfg_schedule interval: guide while the share of revealed tokens is in it",
    )
    group.add_argument(
        "--temperature_schedule",
        default=o.temperature_schedule,
        choices=TEMPERATURE_SCHEDULES,
        help="linear and cosine go from --temperature to --temperature_end",
    )
    group.add_argument("--temperature_end", type=float, default=o.temperature_end)
    group.add_argument(
        "--channel_temperature",
        type=float,
        nargs="+",
        default=list(o.channel_temperature),
        metavar="FACTOR",
        help="factors of the temperature by dimension in the head's order: one each, or two, for the first and the last",
    )
    group.add_argument("--top_k", type=int, default=o.top_k, help="draw from the k most likely levels only; 0 for all")
    group.add_argument(
        "--top_p", type=float, default=o.top_p, help="draw from the most likely levels that make up this probability"
    )
    group.add_argument(
        "--confidence_temperature",
        type=float,
        default=o.confidence_temperature,
        help="--order confidence: weight of its noise",
    )
    group.add_argument(
        "--reuse_features",
        type=int,
        default=o.reuse_features,
        help="run the whole backbone at every n-th step, the changed tokens only between (approximate)",
    )
    group.add_argument(
        "--reuse_guidance",
        type=int,
        default=o.reuse_guidance,
        help="run the unconditional half at every n-th step, reuse its difference between (approximate)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused without reading a file."""
    check_sample_arguments(args)
    if args.evaluate and args.sample:
        raise ValueError("--evaluate and --sample are two different things; choose one")
    at_least(
        args,
        num_iter=1,
        num_images=1,
        eval_bsz=1,
        batch_size=1,
        accum_iter=1,
        epochs=1,
        max_steps=1,
        log_freq=1,
        max_bad_steps=1,
        save_last_freq=1,
        eval_freq=1,
        save_every_steps=1,
        keep_last=1,
    )
    at_least(
        args,
        warmup_epochs=0,
        weight_decay=0,
        grad_clip=0,
        lr=0,
        blr=0,
        min_lr=0,
        start_epoch=0,
        seed=0,
        sample_freq=0,
        posthoc_ema_freq=0,
    )
    for name in ("grad_clip", "lr", "blr", "min_lr", "weight_decay"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name} must be finite, got {getattr(args, name)}")
    if args.posthoc_ema_freq and args.start_epoch:
        raise ValueError(
            "--posthoc_ema_freq averages from the first step on: it does not go with --start_epoch; leave one of them out"
        )
    if args.peak_tflops is not None and not (args.peak_tflops > 0 and math.isfinite(args.peak_tflops)):
        raise ValueError(f"--peak_tflops must be a positive number, got {args.peak_tflops}")
    if args.evaluate or args.online_eval:
        read_options(EvaluationOptions, args).check_enough_images()
    if (
        args.save_images != "none"
        and not args.evaluate
        or args.fid_infinity
        and not (args.evaluate or args.online_eval)
    ):
        raise ValueError(
            "--save_images and --fid_infinity change --evaluate only; give --evaluate too, or leave them out"
        )
    factors = len(args.channel_temperature)  # the number of dimensions is known later
    read_options(SamplerOptions, args).check(factors or 2)
    if args.use_quantized_value:
        logger.info("--use_quantized_value: always so here, the encoder sees dequantized values")


def check_sample_arguments(args: argparse.Namespace) -> None:
    """ValueError for flags of --sample without it, or that do not go together."""
    if args.sample:
        read_options(SampleOptions, args)
        return
    for name in ("interpolate", "init", "mask", "show_steps"):
        if getattr(args, name):
            raise ValueError(f"--{name} changes --sample only; give --sample too, or leave it out")


def make_evaluator(args: argparse.Namespace, device: torch.device) -> Evaluator:
    """What --evaluate and --online_eval need, read and checked."""
    return Evaluator.prepare(
        read_options(EvaluationOptions, args),
        generation_settings(args, device),
        device,
        args.output_dir,
        img_size=args.img_size,
        num_workers=args.num_workers,
        model=args.model,
        vae_path=str(args.vae_path),
    )


def sweep_values(args: argparse.Namespace) -> list[tuple[float, float]]:
    """All pairs (guidance scale, temperature) of --cfg and --temperature; the flags then hold the first of each, one number.

    ValueError if several are given where only one makes sense.
    """
    values = {
        name: list(dict.fromkeys(value)) if isinstance(value := getattr(args, name), list) else [value]
        for name in ("cfg", "temperature")
    }
    for name, several in values.items():
        modes = ["evaluate", "online_eval"] + (["sample"] if name == "cfg" else [])
        if len(several) > 1 and (args.sample and name != "cfg" or not any(getattr(args, mode) for mode in modes)):
            raise ValueError(f"--{name} takes several values with {' and '.join(f'--{mode}' for mode in modes)} only")
        for value in several:
            if not math.isfinite(value):
                raise ValueError(f"--{name} must be finite, got {value}")
            if name == "temperature" and value < 0:
                raise ValueError(f"--temperature must be at least 0, got {value}")
        setattr(args, name, several[0])
    return list(itertools.product(values["cfg"], values["temperature"]))


@flag_names(build_parser(), bits="quant_bits", quant_levels="quant_bits")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, load, then train, evaluate or sample. Raises ValueError or OSError for bad input."""
    args, given = parse(build_parser(), argv)
    preset = load_preset(args.preset) if args.preset else None
    if preset:
        apply_preset(args, given, preset, int(os.environ.get("WORLD_SIZE", "1")))
    pairs = sweep_values(args)
    check_arguments(args)
    structure, trains = read_options(StructureOptions, args), not (args.evaluate or args.sample)
    try:
        device = dist.init(args.device, args.dist_url)
        if device.type == "cpu" and not args.evaluate:  # the scores of many images need the memory more than the time
            keep_freed_memory()
        if args.evaluate or args.sample:
            download.provide(args.vae_path, "--vae_path", args.no_download)
            download.provide(args.resume, "--resume", args.no_download)
        args.resume = download.local_path(args.resume, "--resume")
        source, content = read_checkpoint(args.resume, args.output_dir, trains=trains)
        args.vae_path = download.local_path(args.vae_path, "--vae_path")
        vae = load_vae(
            args.vae_path, *(getattr(args, n) if n in given else None for n in ("vae_embed_dim", "vae_stride"))
        )
        checkpoint.seed_generators(args.seed)  # initial weights, the same on every process
        model, structure = build_model(structure, given, vae, content, source, trains=trains)
        vars(args).update(asdict(structure) | {"vae_path": args.vae_path})  # what a checkpoint records
        vae = vae.to(device)
        if args.evaluate or args.sample:
            load_generator_weights(model, content, source, args.weights)
            model = model.to(device)
        if args.evaluate:
            evaluator = make_evaluator(args, device)
            about = {"vae_path": args.vae_path, "weights": args.weights, "preset": preset}
            evaluator.run(model, vae, pairs, checkpoint=source, **about)
        elif args.sample:
            settings, count = generation_settings(args, device), args.num_images if "num_images" in given else None
            sample(
                Pipeline(model, vae),
                read_options(SampleOptions, args, num_images=count),
                settings,
                [cfg for cfg, _ in pairs],
                args.output_dir,
                {"checkpoint": str(source), "weights": args.weights},
            )
        else:
            optimizer_settings = take_optimizer_settings(args, given, content, source)
            cache = read_record(args.cached_path) if args.use_cached else None
            differences = training_differences(preset, vars(args), device, cache) if preset else []
            log_lines(differences)
            train(
                args,
                model,
                vae,
                content,
                source,
                device,
                optimizer_settings,
                (lambda: partial(make_evaluator(args, device).during_training, pairs)) if args.online_eval else None,
            )
            log_lines(differences)  # again, where somebody looks after a long run
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
