"""Train a TokenBridge model, evaluate it (FID, Inception Score), or sample images from it.

train      torchrun --nproc_per_node=8 main_tokenbridge.py --model tokenbridge_large --data_path DIR --output_dir OUT
--resume OUT evaluate   torchrun --nproc_per_node=8 main_tokenbridge.py --evaluate --resume OUT --cfg 3.1 --temperature
0.96 --num_images 50000 sample     python main_tokenbridge.py --sample --resume OUT --classes 207,360 --num_images 8
--seed 0 --output_dir PICTURES
"""

import util.start  # noqa: F401  (first: see there)

# isort: split

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints import download, hub
from checkpoints.build import (
    StructureOptions,
    build_model,
    class_names,
    load_generator_weights,
    loaded_weights,
    read_checkpoint,
    with_new_classes,
)
from dataset.record import read_record
from dataset.training_set import DataOptions
from engine_tokenbridge import evaluate, train
from evaluation.evaluator import EvaluationOptions, Evaluator
from generation.pipeline import Pipeline, generation_settings
from generation.sample import SampleOptions, sample
from models.sampling.options import OPTION_NAMES, SamplerOptions
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from training.published import training_differences
from training.recipe import optimizer_settings
from training.settings import RunSettings, TrainSettings
from util import checkpoint, dist
from util.cli import add_process_flags, make_parser, parse, run_cli
from util.heap import keep_freed_memory
from util.launcher import launched
from util.log import doing, get_logger, log_lines
from util.options import add_options, flag_names, read_options
from util.presets import Preset, apply_preset, load_preset, preset_names

logger = get_logger()
# --cfg and --temperature take several values here; --compile is one flag for training and sampling
SAMPLER_FLAGS = [name for name in OPTION_NAMES if name not in ("cfg", "temperature", "compile")]
SWEPT = {  # help, and with what several values go
    "cfg": ("guidance scale; 1 means none; several: all of them in turn", ["evaluate", "online_eval", "sample"]),
    "temperature": ("divides the logits; several: all pairs with --cfg", ["evaluate", "online_eval"]),
}

MOST_PASSES = 10**10  # of the model, for an image and a step each; the published evaluation has 12.8 million


class Loaded(NamedTuple):
    """What a run starts from: models, and the checkpoint's path and content if there is one."""

    model: TokenBridge
    vae: AutoencoderKL
    source: Path | None
    content: dict | None


def build_parser() -> argparse.ArgumentParser:
    """All flags; the published ones keep name, meaning and default (docs/spec.md 10), but --device defaults to auto."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to do (default: train)")
    group.add_argument("--evaluate", action="store_true", help="generate --num_images images and print their scores")
    group.add_argument("--sample", action="store_true", help="write images of --classes to --output_dir")
    about = (
        "a recipe or evaluation of configs/: sets all its flags, printed, with the numbers to expect; a given flag wins"
    )
    group.add_argument("--preset", default=None, choices=preset_names(), help=about)
    add_options(parser, StructureOptions, "model and tokenizer")
    add_options(parser, TrainSettings, "training")
    add_options(parser, DataOptions, "data")
    add_options(parser, RunSettings, "checkpoints, and what is written during training")
    group = parser.add_argument_group("generation")
    about = "which of a checkpoint's weights generate images"
    group.add_argument("--weights", default="ema", choices=("ema", "model"), help=about)
    for name, (about, _) in SWEPT.items():
        group.add_argument(f"--{name}", type=float, nargs="+", default=1.0, help=about)
    add_options(parser, SamplerOptions, "sampler", only=SAMPLER_FLAGS, num_iter=256)
    add_options(parser, EvaluationOptions, "evaluation")
    add_options(parser, SampleOptions, "for --sample only")
    add_process_flags(parser, seed=1)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused without reading a file, and that the settings do not check by themselves."""
    if args.evaluate and args.sample:
        raise ValueError("--evaluate and --sample are two different things; choose one")
    for name in () if args.sample else ("interpolate", "init", "mask", "show_steps"):
        if getattr(args, name):
            raise ValueError(f"--{name} changes --sample only; give --sample too, or leave it out")
    if args.sample:
        read_options(SampleOptions, args)
    evaluation, evaluates = read_options(EvaluationOptions, args), args.evaluate or args.online_eval
    if evaluates:
        evaluation.check_enough_images()
    if (args.save_images != "none" and not args.evaluate) or (args.fid_infinity and not evaluates):
        raise ValueError("--save_images and --fid_infinity change --evaluate only; give it too, or leave them out")
    if args.num_images * args.num_iter > MOST_PASSES and (evaluates or args.sample):
        many = f"--num_images {args.num_images} x --num_iter {args.num_iter} is {args.num_images * args.num_iter:,}"
        raise ValueError(f"{many} passes of the model, more than {MOST_PASSES:,}: was that meant?")
    factors = len(args.channel_temperature)  # the number of dimensions is known later
    read_options(SamplerOptions, args).check(factors or 2)
    if args.use_quantized_value:
        logger.info("--use_quantized_value: always so here, the encoder sees dequantized values")


def make_evaluator(args: argparse.Namespace, device: torch.device, names: Sequence[str]) -> Evaluator:
    """What --evaluate and --online_eval need, read and checked. names: of the classes, for the records."""
    return Evaluator.prepare(
        read_options(EvaluationOptions, args),
        generation_settings(args, device),
        device,
        args.output_dir,
        img_size=args.img_size,
        num_workers=args.num_workers,
        model=args.model,
        vae_path=str(args.vae_path),
        class_names=list(names),
    )


def sweep_values(args: argparse.Namespace) -> list[tuple[float, float]]:
    """All pairs (guidance scale, temperature) of --cfg and --temperature; the flags then hold the first of each.

    ValueError if several are given where only one makes sense.
    """
    values = []
    for name, (_, modes) in SWEPT.items():
        given = getattr(args, name)
        several = list(dict.fromkeys(given if isinstance(given, list) else [given]))
        if len(several) > 1 and (args.sample and "sample" not in modes or not any(getattr(args, m) for m in modes)):
            raise ValueError(f"--{name} takes several values with {' and '.join(f'--{m}' for m in modes)} only")
        for value in several:
            SamplerOptions(**{name: value})  # refuses what is out of range
        values.append(several)
        setattr(args, name, several[0])
    return list(itertools.product(*values))


@doing("reading the checkpoint and the VAE")
def load_models(args: argparse.Namespace, given: set[str], device: torch.device) -> Loaded:
    """Model and VAE of the flags and of --resume, its path and its content; the model has its weights if it is to
    generate.
    """
    structure, trains = read_options(StructureOptions, args), not (args.evaluate or args.sample)
    if not trains:
        download.provide(args.vae_path, "--vae_path", args.no_download)
        download.provide(args.resume, "--resume", args.no_download)
    args.resume = hub.local_path(args.resume, "--resume")
    source, content = read_checkpoint(args.resume, args.output_dir, trains=trains, reset_classes=args.reset_classes)
    args.vae_path = hub.local_path(args.vae_path, "--vae_path")
    shape = (getattr(args, name) if name in given else None for name in ("vae_embed_dim", "vae_stride"))
    vae = load_vae(args.vae_path, *shape)
    checkpoint.seed_generators(args.seed)  # initial weights, the same on every process
    model, structure = build_model(structure, given, vae, content, source, trains=trains)
    vars(args).update(asdict(structure) | {"vae_path": args.vae_path})  # what a checkpoint records
    if args.reset_classes:
        content = with_new_classes(content, model, source)
    if not trains:
        load_generator_weights(model, content, source, args.weights)
        model = model.to(device)
    return Loaded(model, vae.to(device), source, content)


@doing("training")
def run_training(
    args: argparse.Namespace,
    settings: TrainSettings,
    preset: Preset | None,
    loaded: Loaded,
    device: torch.device,
    pairs: Sequence[tuple[float, float]],
) -> None:
    """Train with what the flags say; differences from a preset's published training are logged before and after."""
    cache = read_record(args.cached_path) if args.use_cached else None
    differences = training_differences(preset, vars(args), device, cache) if preset else []
    log_lines(differences)
    train(
        loaded.model,
        loaded.vae,
        read_options(DataOptions, args),
        device,
        settings,
        read_options(RunSettings, args),
        generation_settings(args, device),
        arguments=vars(args),
        resumed=(loaded.content, loaded.source),
        make_evaluator=lambda names: partial(make_evaluator(args, device, names).during_training, pairs),
    )
    log_lines(differences)  # again, where somebody looks after a long run


def run(args: argparse.Namespace, given: set[str]) -> None:
    """Check, load, then train, evaluate or sample."""
    preset = load_preset(args.preset) if args.preset else None
    if preset:
        apply_preset(args, given, preset, launched("WORLD_SIZE"))
    pairs = sweep_values(args)
    check_arguments(args)
    process = {"seed": args.seed, "num_workers": args.num_workers, "pin_memory": args.pin_mem}
    settings = read_options(TrainSettings, args, **process)
    read_options(RunSettings, args).check(settings)  # before anything is read
    read_options(StructureOptions, args)
    device = dist.init(args.device, args.dist_url)
    if device.type == "cpu" and not args.evaluate:  # the scores of many images need the memory more than the time
        keep_freed_memory()
    loaded = load_models(args, given, device)
    model, vae, source, content = loaded
    if args.evaluate:
        with doing("evaluating"):
            evaluator = make_evaluator(args, device, class_names(content))
            evaluate(evaluator, model, vae, pairs, checkpoint=source, weights=args.weights, preset=preset)
    elif args.sample:
        options = read_options(SampleOptions, args, num_images=args.num_images if "num_images" in given else None)
        if dist.world_size() > 1:
            loaded_weights(model, vae, source, args.vae_path)
        about = {"checkpoint": str(source), "step": content.get("step"), "weights": args.weights}
        scales = [cfg for cfg, _ in pairs]
        pipeline = Pipeline(model, vae, class_names=class_names(content))
        with doing("sampling"):
            sample(pipeline, options, generation_settings(args, device), scales, args.output_dir, about)
    else:
        settings = optimizer_settings(settings, given, content, source)
        args.weight_decay = settings.weight_decay
        run_training(args, settings, preset, loaded, device, pairs)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run. Raises ValueError or OSError for bad input."""
    parser = build_parser()
    with flag_names(parser, bits="quant_bits", quant_levels="quant_bits"):
        try:
            run(*parse(parser, argv))
        finally:
            dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
