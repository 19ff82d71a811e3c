"""Counts and times of the parts that were made fast, beside the plain way of doing the same, both in one run.

  python -m tools.bench eval                                                scores: images in memory against a folder of PNGs; memory for 50,000
  python -m tools.bench quantizer                                           nearest level: binary search against a (..., K) distance tensor
  python -m tools.bench sample --model tokenbridge_base --num_iter 8        sampling: one guided batch and a KV cache against neither
  python -m tools.bench train  --model tokenbridge_base --dry               training step: FLOPs, bytes, time
  python -m tools.bench cache                                               an epoch over cached latents: shards against a tree of .npz files

Each is a file tools/bench/<name>.py with `register`; the plain ways live there. `--dry` counts on fake tensors only, in seconds; without it the
same code is then run and timed. The benches may import models, inside their functions.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from util.cli import make_parser
from util.log import run_cli

BENCHES = ("quantizer", "sample", "train", "cache", "eval")
FILES = {"eval": "evaluation"}


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per bench, each with the flags that change it."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name in BENCHES:
        importlib.import_module(f"tools.bench.{FILES.get(name, name)}").register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run one bench. Raises ValueError for bad input."""
    args = build_parser().parse_args(argv)
    args.check(args)
    args.function(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
