"""`python -m tools.bench quantizer`: nearest level by binary search against an argmin over a (..., K) tensor of distances."""

import argparse

import torch
from torch import Tensor

from tools.bench.counting import OpCounter, add_command, print_table, timed
from util import dist
from util.cli import at_least


def quantize_by_distance(x: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """The reference: index of the nearest of `values` (K,) by an argmin over a (..., K) tensor of distances; x of any shape -> int64."""
    x = ((x - min_value) / (max_value - min_value) * 6.0 - 3.0).clamp(-3.0, 3.0)
    return (x.unsqueeze(-1) - values).abs().argmin(-1)


def bench_quantizer(args: argparse.Namespace) -> None:
    """Both ways on the same latents: time, largest tensor, equal indices."""
    from models.quantizer import GaussianQuantizer, quantize

    device = dist.pick_device(args.device)
    tables = GaussianQuantizer(args.bits, -args.range, args.range).to(device)
    values = tables.reconstruction_values
    x = torch.randn(*args.shape, generator=torch.Generator("cpu").manual_seed(0)).to(device)

    def plain() -> Tensor:
        return quantize_by_distance(x, values, -args.range, args.range)

    def ours() -> Tensor:
        return quantize(x, values, -args.range, args.range)

    found, largest = [], []
    for function in (plain, ours):
        with OpCounter() as counter:
            found.append(function())
        largest.append(counter.largest_bytes)
    seconds = timed([plain, ours], args.repeats, device)
    same = (found[0] == found[1]).double().mean().item()
    shape = "(" + ", ".join(map(str, args.shape)) + ")"
    print_table(
        f"Quantizing {shape} float32 latents at {2**args.bits} levels on {device}",
        ["distances", "bucketize", "ratio"],
        [
            (
                "median time, ms",
                [f"{1e3 * seconds[0]:.3f}", f"{1e3 * seconds[1]:.3f}", f"{seconds[0] / seconds[1]:.1f}x"],
            ),
            ("largest tensor made, MiB", [f"{b / 2**20:.2f}" for b in largest] + [f"{largest[0] / largest[1]:.1f}x"]),
            ("equal indices", ["", f"{same:.4%}", ""]),
        ],
    )


def check(args: argparse.Namespace) -> None:
    """ValueError naming the flag for what can be refused before any work."""
    from models.quantizer import gaussian_tables

    gaussian_tables(args.bits)
    at_least(args, repeats=1, range=1e-6)
    if min(args.shape) < 1:
        raise ValueError(f"--shape takes sizes of at least 1, got {args.shape}")
    needed = 2 * 4 * 2**args.bits * torch.Size(args.shape).numel() / 2**30
    if needed > 8:
        raise ValueError(f"the distance tensors would take {needed:.0f} GiB; lower --bits or --shape")


def register(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    from models.quantizer import MAX_BITS

    sub = add_command(
        commands, "quantizer", bench_quantizer, check, "nearest level: binary search against a distance tensor", 20
    )
    sub.add_argument("--bits", type=int, default=6, help=f"1 to {MAX_BITS}")
    sub.add_argument("--range", type=float, default=5.0, help="the quantizer covers [-range, range]")
    sub.add_argument("--shape", type=int, nargs="+", default=[64, 16, 16, 16], help="of the latents")
