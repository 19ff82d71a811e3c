"""The paper's figures in one command: the published commands, each figure beside the published one, with tolerances.

  python -m tools.reproduce --data_path IMAGENET                     everything, on 8 GPUs
  python -m tools.reproduce --data_path IMAGENET --dry_run           the commands only
  python -m tools.reproduce --data_path IMAGENET --quick             5,000 images, compared with nothing published
  python -m tools.reproduce --demo                                   the same stages on a laptop, with stand-ins
  python -m tools.reproduce --data_path IMAGENET --train large       the first 2,000 steps of the published training

Missing published files are downloaded first. Rerunning skips finished stages and resumes the interrupted evaluation or
training. Writes OUT/reproduction.md and OUT/reproduction.json; exit status 2 if a stage failed or a figure is out of
its tolerance.
"""

import os
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from tools.reproduce.commands import PUBLISHED, PlannedStage
from tools.reproduce.cost import DOWNLOAD_BYTES
from tools.reproduce.machine import Rates, describe_machine, full_disks, rates_here
from tools.reproduce.options import Options
from tools.reproduce.plan import CLASSES, Plan
from tools.reproduce.report import build_report, problems, write_report
from training.progress import duration
from util import dist
from util.cli import ROOT, check_writable, make_parser, parse, run_cli
from util.locks import folder_lock
from util.options import ArgumentError, add_options, flag_names, read_options
from util.stages import StageRunner

NEEDS = {"steps": "train", "cached_path": "train", "bands": "train", "demo_dir": "demo"}  # flag -> another


def print_commands(stages: Sequence[PlannedStage]) -> None:
    """The commands as a shell script; comments say what is published and what is added."""
    for stage in stages:
        print(f"# {stage.name}: {stage.about}")
        if stage.published:
            print(f"#   published: {PUBLISHED[stage.published]}")
        if stage.added:
            print(f"#   added or changed: {'; '.join(stage.added)}")
        print(shlex.join(stage.command) or "#   (no command: computed by tools.reproduce)")


def check_images(folder: Path, classes: int) -> None:
    """ArgumentError unless the folder has that many class folders."""
    if not folder.is_dir():
        raise ArgumentError("data_path", f"no {folder}: data_path is the ImageNet folder with train/ and val/")
    found = sum(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))
    if found != classes:
        raise ArgumentError("data_path", f"{folder} has {found} class folders, ImageNet has {classes}")


def check_before_work(options: Options, plan: Plan, stages: Sequence[PlannedStage], finished: Collection[str]) -> None:
    """ValueError for what would fail later: data, GPUs, space. Nothing is written."""
    if options.demo:
        return
    if options.train and options.cached_path and not Path(options.cached_path).is_dir():
        advice = "without the flag it is made in OUT/cache"
        raise ArgumentError("cached_path", f"no latent cache at {options.cached_path}; {advice}")
    reads_images = "reconstruction" in options.sections and not options.train
    for part in ["train", "val"] if reads_images else ["train"] if options.train and not options.cached_path else []:
        check_images(Path(options.data_path) / part, CLASSES)
    if dist.device_count() < options.processes:
        found = f"{options.processes} GPUs are wanted, this machine has {dist.device_count()}"
        raise ArgumentError("gpus", f"gpus: {found}; the figures are the same with fewer, which only take longer")
    rest = [stage for stage in stages if stage.name not in finished and stage.name != "download"]
    needed = [(options.out, stage.cost.written) for stage in rest]
    needed += [(plan.inception if name == "inception" else Path(), DOWNLOAD_BYTES[name]) for name in plan.missing()]
    if full := full_disks(needed):
        raise ArgumentError("output_dir", f"output_dir: not enough space: {'; '.join(full)}")


def print_plan(options: Options, stages: Sequence[PlannedStage], finished: Collection[str], rates: Rates) -> None:
    """The stages with their state and estimated time."""
    total, count = 0.0, options.processes if not options.demo else 1
    print(f"{'stage':<18}{'TFLOP':>14}{'estimated time':>16}   (h:mm:ss on {count} x {rates.device})")
    for stage in stages:
        done, seconds = stage.name in finished, stage.cost.seconds(count * rates.half, count * rates.single)
        total += 0 if done else seconds
        flops = (stage.cost.half + stage.cost.single) / 1e12
        state = "finished" if done else duration(seconds) if flops else "-"
        print(f"{stage.name:<18}{flops:>14,.1f}{state:>16}   {stage.about}")
    measured = f"{rates.half / 1e12:.3g} TFLOP/s of a transformer block, {rates.single / 1e12:.3g} of a convolution"
    print(f"{'left':<18}{'':>14}{duration(total):>16}   computed, at the measured {measured}\n", flush=True)


def reproduce(options: Options) -> None:
    """Check, print the plan, run the stages, write the report. ValueError at the end if anything is wrong."""
    plan = Plan(options)
    stages = plan.stages()
    finished = StageRunner(stages, options.out).finished()
    check_before_work(options, plan, stages, finished)
    check_writable(options.out, "--output_dir")
    if options.train:
        check_writable(options.bands, "--bands")
    config = plan.config(options.train or "large")
    with folder_lock(options.out, "--output_dir"):
        runner = StageRunner(stages, options.out)
        if len(finished) < len(stages):
            rates = rates_here(plan.device, config.decoder_embed_dim, config.decoder_num_heads, plan.precision)
            print_plan(options, stages, finished, rates)
        report = build_report(options, plan, stages, runner.run(machine=describe_machine(plan.device)))
        write_report(report, options.out)
    print(f"\nwrote {options.out / 'reproduction.md'} and .json", flush=True)
    if wrong := problems(report):
        raise ValueError(f"{'; '.join(wrong)} ({options.out / 'reproduction.md'} has all figures)")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = make_parser(__doc__)
    add_options(parser, Options)
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and do nothing")
    args, given = parse(parser, argv)
    with flag_names(parser):
        options = read_options(Options, args)
        for name, other in NEEDS.items():
            if name in given and not getattr(args, other):
                raise ArgumentError(name, f"{name} goes with {other} only")
        if args.dry_run:
            return print_commands(Plan(options).stages())
        if Path.cwd() != ROOT:  # the published paths are relative to the repository
            names = ("data_path", "output_dir", "demo_dir", "cached_path", "bands")
            places = {name: getattr(options, name) for name in names}
            options = replace(options, **{name: str(Path(p).absolute()) for name, p in places.items() if p})
            os.chdir(ROOT)
        reproduce(options)


if __name__ == "__main__":
    sys.exit(run_cli(main))
