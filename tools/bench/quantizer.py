"""`python -m tools.bench quantizer`: nearest level by binary search against an argmin over distances (..., K)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.quantizer import MAX_BITS, GaussianQuantizer, quantize
from tools.bench.counting import OpCounter, print_table, ratio_row, timed
from tools.bench.options import REPEATS, BenchOptions
from util import dist
from util.options import ArgumentError, option

MAX_GIB = 8  # of memory for the baseline's distance tensors


@dataclass
class Options(BenchOptions):
    """What is quantized, and to how many levels."""

    repeats: int = option(20, REPEATS, lowest=1)
    bits: int = option(6, f"1 to {MAX_BITS}", lowest=1, highest=MAX_BITS)
    range: float = option(5.0, "the quantizer covers [-range, range]", lowest=1e-6)
    shape: tuple[int, ...] = option((64, 16, 16, 16), "of the latents", nargs="+", lowest=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = 2 * 4 * 2**self.bits * torch.Size(self.shape).numel() / 2**30
        if needed > MAX_GIB:
            raise ArgumentError("shape", f"the distance tensors would take {needed:.0f} GiB; lower bits or shape")


def quantize_by_distance(x: Tensor, values: Tensor, min_value: float, max_value: float) -> Tensor:
    """The baseline: index of the nearest of `values` (K,) by an argmin over distances (..., K); x (...) -> int64."""
    x = ((x - min_value) / (max_value - min_value) * 6.0 - 3.0).clamp(-3.0, 3.0)
    return (x.unsqueeze(-1) - values).abs().argmin(-1)


def run(options: Options) -> None:
    """Time, largest tensor and equality of the indices for the same latents."""
    device = dist.pick_device(options.device)
    tables = GaussianQuantizer(options.bits, -options.range, options.range).to(device)
    latents = torch.randn(*options.shape, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = latents, tables.reconstruction_values, -options.range, options.range
    ways, indices, largest = [partial(quantize_by_distance, *arguments), partial(quantize, *arguments)], [], []
    for way in ways:
        with OpCounter() as counter:
            indices.append(way())
        largest.append(counter.largest_bytes / 2**20)
    milliseconds = [1e3 * seconds for seconds in timed(ways, options.repeats, device)]
    same = (indices[0] == indices[1]).double().mean().item()
    print_table(
        f"Quantizing {tuple(options.shape)} float32 latents at {2**options.bits} levels on {device}",
        ["distances", "bucketize", "ratio"],
        [
            ratio_row("median time, ms", *milliseconds, ".3f"),
            ratio_row("largest tensor made, MiB", *largest, ".2f"),
            ("equal indices", ["", f"{same:.4%}", ""]),
        ],
    )
