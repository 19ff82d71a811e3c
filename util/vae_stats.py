"""What a VAE's latents look like: their scale, and which channels carry low frequencies (SPEC 6, last item)."""

import torch
from torch import Tensor


def latent_scale(latents: Tensor) -> float:
    """1/std over all entries of raw latents (N, C, h, w): the factor that brings them to unit variance."""
    return float(1 / latents.double().std())


def low_frequency_share(latents: Tensor) -> Tensor:
    """Share of each channel's FFT energy (mean removed) within half the Nyquist frequency: latents (N, C, h, w) -> (C,).

    A channel whose energy varies slowly over the grid describes layout; one with energy at high frequencies describes detail.
    """
    x = latents.double()
    x = x - x.mean(dim=(0, 2, 3), keepdim=True)
    energy = torch.fft.fft2(x).abs().square().mean(0)                                        # (C, h, w)
    frequency = [torch.fft.fftfreq(n, dtype=torch.float64) for n in x.shape[-2:]]
    radius = (frequency[0][:, None] ** 2 + frequency[1][None, :] ** 2).sqrt()                # (h, w), cycles per position
    return (energy * (radius <= 0.25)).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-30)


def frequency_order(latents: Tensor) -> list[int]:
    """Channels from the most to the least low-frequency energy: the order in which the head predicts them (SPEC 6)."""
    return low_frequency_share(latents).argsort(descending=True, stable=True).tolist()
