"""Train a TokenBridge model, evaluate it (FID, Inception Score), or sample images from it.

  train      torchrun --nproc_per_node=8 main_tokenbridge.py --model tokenbridge_large --data_path DIR \\
                 --output_dir OUT --resume OUT
  evaluate   torchrun --nproc_per_node=8 main_tokenbridge.py --evaluate --resume OUT --cfg 3.1 --temperature 0.96 \\
                 --num_images 50000
  sample     python main_tokenbridge.py --sample --resume OUT --classes 207,360 --num_images 8 --seed 0 \\
                 --output_dir PICTURES
"""

import util.start  # noqa: F401  (first: see there)

# isort: split

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch

from checkpoints.build import StructureOptions, loaded_weights
from checkpoints.content import class_names
from checkpoints.start import Start, load_start
from dataset.record import read_record
from dataset.training_set import DataOptions
from engine_tokenbridge import evaluate, train
from evaluation.evaluator import EvaluationOptions, Evaluator
from generation.pipeline import Pipeline, generation_settings
from generation.sample import SampleOptions, sample
from generation.sweep import SweepOptions, check_passes
from models.sampling.options import SamplerOptions
from training.published import training_differences
from training.recipe import optimizer_settings
from training.settings import RunSettings, TrainSettings
from util import dist
from util.cli import add_process_flags, make_parser, own_folder, parse, run_cli
from util.heap import keep_freed_memory
from util.launcher import launched
from util.log import doing, get_logger, log_lines
from util.options import add_options, flag_names, option_fields, read_options
from util.presets import Preset, apply_preset, load_preset, preset_names

logger = get_logger()
Pairs = list[tuple[float, float]]  # guidance scale, temperature
# --cfg and --temperature take several values here; --compile is one flag for training and sampling
SAMPLER_FLAGS = [name for name in option_fields(SamplerOptions) if name not in ("cfg", "temperature", "compile")]


def build_parser() -> argparse.ArgumentParser:
    """All flags; the published ones keep name, meaning and default (docs/spec.md 10), but --device defaults to auto."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to do (default: train)")
    group.add_argument("--evaluate", action="store_true", help="generate --num_images images and print their scores")
    group.add_argument("--sample", action="store_true", help="write images of --classes to --output_dir")
    what = "a recipe or evaluation of configs/: sets its flags, printed with the numbers to expect; a given flag wins"
    group.add_argument("--preset", default=None, choices=preset_names(), help=what)
    add_options(parser, StructureOptions, "model and tokenizer")
    add_options(parser, TrainSettings, "training")
    add_options(parser, DataOptions, "data")
    add_options(parser, RunSettings, "checkpoints, and what is written during training")
    group = parser.add_argument_group("generation")
    about = "which of a checkpoint's weights generate images"
    group.add_argument("--weights", default="ema", choices=("ema", "model"), help=about)
    add_options(group, SweepOptions)
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
    if evaluates or args.sample:
        check_passes(args.num_images, args.num_iter)
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


@doing("training")
def run_training(
    args: argparse.Namespace, settings: TrainSettings, preset: Preset | None, start: Start, pairs: Pairs
) -> None:
    """Train with what the flags say; differences from a preset's published training are logged before and after."""
    cache = read_record(args.cached_path) if args.use_cached else None
    differences = training_differences(preset, vars(args), start.device, cache) if preset else []
    log_lines(differences)
    train(
        start.model,
        start.vae,
        read_options(DataOptions, args),
        start.device,
        settings,
        read_options(RunSettings, args),
        generation_settings(args, start.device),
        arguments=vars(args),
        resumed=(start.content, start.source),
        make_evaluator=lambda names: partial(make_evaluator(args, start.device, names).during_training, pairs),
    )
    log_lines(differences)  # again, where somebody looks after a long run


def load_models(args: argparse.Namespace, given: set[str], device: torch.device, weights: str = "") -> Start:
    """Model and VAE of the flags; what a checkpoint decides is set in `args`, which checkpoints record."""
    where = {"resume": args.resume, "output_dir": args.output_dir, "no_download": args.no_download}
    start = load_start(read_options(StructureOptions, args), given, device, seed=args.seed, weights=weights, **where)
    vars(args).update(asdict(start.structure) | {"resume": start.resume})
    return start


def read_flags(args: argparse.Namespace, given: set[str]) -> tuple[Preset | None, Pairs, TrainSettings]:
    """Preset, pairs and settings of the flags; refuses all that can be refused without reading a file."""
    preset = load_preset(args.preset) if args.preset else None
    if preset:
        apply_preset(args, given, preset, launched("WORLD_SIZE"))
    modes = [name for name in ("evaluate", "online_eval", "sample") if getattr(args, name)]
    pairs = read_options(SweepOptions, args).pairs(modes)
    args.cfg, args.temperature = pairs[0]
    check_arguments(args)
    process = {"seed": args.seed, "num_workers": args.num_workers, "pin_memory": args.pin_mem}
    settings = read_options(TrainSettings, args, **process)
    read_options(RunSettings, args).check(settings)  # before anything is read
    read_options(StructureOptions, args)
    return preset, pairs, settings


def run(args: argparse.Namespace, given: set[str]) -> None:
    """Check, load, then train, evaluate or sample."""
    preset, pairs, settings = read_flags(args, given)
    device = dist.init(args.device, args.dist_url)
    if device.type == "cpu" and not args.evaluate:  # the scores of many images need the memory more than the time
        keep_freed_memory()
    if not (args.evaluate or args.sample):
        with dist.on_main(own_folder(args.output_dir, "--output_dir")):
            start = load_models(args, given, device)
            settings = optimizer_settings(settings, given, start.content, start.source)
            args.weight_decay = settings.weight_decay
            run_training(args, settings, preset, start, pairs)
        return
    start = load_models(args, given, device, args.weights)
    names = class_names(start.content)
    if args.evaluate:
        with doing("evaluating"):
            about = {"checkpoint": start.source, "weights": args.weights, "preset": preset}
            evaluate(make_evaluator(args, device, names), start.model, start.vae, pairs, **about)
        return
    options = read_options(SampleOptions, args, num_images=args.num_images if "num_images" in given else None)
    if dist.world_size() > 1:
        loaded_weights(start.model, start.vae, start.source, args.vae_path)
    about = {"checkpoint": str(start.source), "step": start.content.get("step"), "weights": args.weights}
    scales, pipeline = [cfg for cfg, _ in pairs], Pipeline(start.model, start.vae, class_names=names)
    with doing("sampling"):
        sample(pipeline, options, generation_settings(args, device), scales, args.output_dir, about)


def main(argv: Sequence[str] | None = None, work: Callable = run) -> None:
    """Parse and run; work=read_flags checks the flags only (scripts/). Raises ValueError or OSError for bad input."""
    parser = build_parser()
    with flag_names(parser, bits="quant_bits", quant_levels="quant_bits"):
        try:
            work(*parse(parser, argv))
        finally:
            dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_cli(main))
