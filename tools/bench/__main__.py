"""Counts and times of the optimized parts beside a baseline that does the same, both in one run.

  python -m tools.bench eval                                      scores: images in memory against a folder of PNGs
  python -m tools.bench quantizer                                 nearest level: binary search against distances
  python -m tools.bench sample --model tokenbridge_base --dry     sampling: one guided batch and a KV cache
  python -m tools.bench train --model tokenbridge_base --dry      training step: FLOPs, bytes, time
  python -m tools.bench gpu --budget 360                          one GPU: training, sampling, latency, kernels
  python -m tools.bench cache                                     an epoch over cached latents: shards against .npz

`--dry` only counts, on fake tensors, in seconds; without it the same code is also run and timed.
"""

import argparse
import sys
from collections.abc import Sequence

from tools.bench import cache, evaluation, gpu, quantizer, sample, train
from util.cli import HelpFormatter, make_parser, run_cli
from util.options import add_options, flag_names, read_options

BENCHES = {"quantizer": quantizer, "sample": sample, "train": train, "cache": cache, "eval": evaluation, "gpu": gpu}
MORE_FLAGS = {"dry": ("--flops_only", "store_true"), "pairs": ("--no-pairs", "store_false")}  # of options so named


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per bench, each with the flags of its options."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        about = bench.__doc__.split(": ", 1)[1].splitlines()[0]
        more = dict(allow_abbrev=False, formatter_class=HelpFormatter)
        sub = commands.add_parser(name, help=about, description=bench.__doc__, **more)
        add_options(sub, bench.Options)
        for option, (flag, action) in MORE_FLAGS.items():
            if hasattr(bench.Options, option):
                sub.add_argument(flag, dest=option, action=action, help=f"sets --{option}")
        sub.set_defaults(parser=sub)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run one bench. Raises ValueError for bad input."""
    args = build_parser().parse_args(argv)
    bench = BENCHES[args.bench]
    with flag_names(args.parser):
        bench.run(read_options(bench.Options, args))


if __name__ == "__main__":
    sys.exit(run_cli(main))
