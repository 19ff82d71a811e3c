"""An EMA of any length, chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

  python -m tools.posthoc_ema OUT/model --sigma_rel 0.08 [--step 40000] [--output FILE.pth]

Needs the snapshots that training writes with --posthoc_ema_freq N. --sigma_rel is the standard deviation of the
average's profile, as a share of the steps trained. --resume takes the written file, for --sample and --evaluate.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.ema import power_exponent
from training.posthoc_ema import reconstruct
from util.checkpoint import atomic_save, find_file
from util.cli import check_writable, make_parser, run_cli
from util.log import doing
from util.options import flag_names


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = make_parser(__doc__)
    parser.add_argument("run", help="the folder of a training with --posthoc_ema_freq, or one of its checkpoints")
    about = "length: the profile's standard deviation over the steps trained"
    parser.add_argument("--sigma_rel", type=float, required=True, help=about)
    about = "step of the snapshot at which the average ends; default: the last"
    parser.add_argument("--step", type=int, default=None, help=about)
    parser.add_argument("--output", default="", help="file to write; default: RUN/ema-SIGMA_REL-STEP.pth")
    return parser


@doing("adding up the averages")
def run(args: argparse.Namespace) -> None:
    """Check, fit, write."""
    power_exponent(args.sigma_rel)  # refused before a file is read
    source, output = find_file(args.run), Path(args.output)
    if args.output and (output.suffix != ".pth" or output.exists()):
        why = "exists already" if output.exists() else "does not end in .pth"
        raise ValueError(f"{args.output} (--output) {why}: choose another name")
    content = reconstruct(source, args.sigma_rel, args.step)
    if not args.output:
        output = source.parent / f"ema-{args.sigma_rel:g}-{content['step']:08d}.pth"
    check_writable(output.parent, "--output")
    atomic_save(content, output)
    fit = content["fit"]
    print(
        f"sigma_rel {args.sigma_rel:g} at step {content['step']} from {fit['snapshots']} snapshots: "
        f"relative error of the profile {fit['residual']:.3g}; wrote {output}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run. ValueError or OSError for bad input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with flag_names(parser):
        run(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
