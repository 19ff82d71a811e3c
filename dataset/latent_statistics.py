"""Statistics of a VAE's latents, and the scale, channel order, bits and range that they suggest (docs/spec.md 3, 6).

Letters: N images, C latent channels, h and w latent grid.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.quantizer import TableQuantizer


def latent_scale(latents: Tensor) -> float:
    """1/std over all entries of raw latents (N, C, h, w): the factor that scales them to unit variance."""
    return float(1 / latents.double().std())


def low_frequency_share(latents: Tensor) -> Tensor:
    """Share of each channel's FFT energy (mean removed) within half the Nyquist frequency: (N, C, h, w) -> (C,).

    A channel whose energy varies slowly over the grid describes layout; one with energy at high frequencies, detail.
    """
    x = latents.double()
    x = x - x.mean(dim=(0, 2, 3), keepdim=True)
    energy = torch.fft.fft2(x).abs().square().mean(0)  # (C, h, w)
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in x.shape[-2:])
    radius = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()  # (h, w), cycles per position
    return (energy * (radius <= 0.25)).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-30)


def frequency_order(latents: Tensor) -> list[int]:
    """Channels from the most to the least low-frequency energy: the order in which the head predicts them."""
    return low_frequency_share(latents).argsort(descending=True, stable=True).tolist()


def channel_moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of latents (N, C, h, w): (C,) each, float64."""
    x = latents.double()
    return x.mean((0, 2, 3)), x.std((0, 2, 3))


def normal_distance(latents: Tensor) -> Tensor:
    """Excess kurtosis of each channel, (C,): 0 for a normal distribution, larger for heavy tails."""
    x = latents.double()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return x.pow(4).mean((0, 2, 3)) - 3


def channel_figures(latents: Tensor) -> dict[str, list[float]]:
    """All figures of the channels, C each."""
    mean, std = channel_moments(latents)
    figures = {"mean": mean, "std": std, "excess_kurtosis": normal_distance(latents)}
    figures["low_frequency_share"] = low_frequency_share(latents)
    return {name: values.tolist() for name, values in figures.items()}


def suggest_scale(latents: Tensor, per_channel: bool) -> tuple[float | list[float], float | list[float]]:
    """scale_factor and shift for unit variance: one factor and no shift, or 1/std and mean of each channel."""
    if not per_channel:
        return latent_scale(latents), 0.0
    mean, std = channel_moments(latents)
    return (1 / std.clamp_min(1e-12)).tolist(), mean.tolist()


def entropy_bits(indices: Tensor, levels: int) -> float:
    """Entropy of the indices (any shape), bits per latent scalar: the rate of an ideal code."""
    share = torch.bincount(indices.flatten(), minlength=levels).double() / indices.numel()
    return float(-(share[share > 0] * share[share > 0].log2()).sum())


def quantizer_point(latents: Tensor, quantizer: TableQuantizer, bits: int, half: float) -> dict:
    """A quantizer on scaled latents: {bits, range, mse, rate (entropy, bits), clamped (share)}."""
    indices = quantizer.quantize(latents)
    error = (quantizer.dequantize(indices) - latents).double().square().mean()
    clamped = (latents.abs() > half).double().mean()
    about = {"bits": bits, "range": half, "mse": float(error), "rate": entropy_bits(indices, 2**bits)}
    return about | {"clamped": float(clamped)}


def rate_distortion(
    latents: Tensor, build: Callable[[int, float], TableQuantizer], bits: Sequence[int], ranges: Sequence[float]
) -> list[dict]:
    """A `quantizer_point` for every pair of bits and half range; build(bits, half range) -> quantizer."""
    return [quantizer_point(latents, build(b, half), b, half) for b in bits for half in ranges]


def best_ranges(points: Sequence[dict]) -> list[dict]:
    """For each number of bits the point with the least error."""
    best: dict[int, dict] = {}
    for point in sorted(points, key=lambda p: p["mse"]):
        best.setdefault(point["bits"], point)
    return [best[bits] for bits in dict.fromkeys(point["bits"] for point in points)]


def suggest_point(best: Sequence[dict], psnr_alone: float, tolerance: float) -> tuple[dict, bool]:
    """The point of the fewest bits within `tolerance` dB of the VAE alone, and True; else the best one, and False."""
    good = [point for point in best if point["psnr"] >= psnr_alone - tolerance]
    return (good[0], True) if good else (max(best, key=lambda p: p["psnr"]), False)
