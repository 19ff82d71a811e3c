"""PSNR, SSIM and LPIPS of pairs of images (docs/spec.md 9).

Letters: N images, H x W pixels.
"""

from pathlib import Path

import torch
from torch import Tensor

from dataset.images import from_uint8
from util.dist import float32_precision
from util.log import first_line
from util.options import ArgumentError

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the Gaussian window of Wang et al. 2004: 11 x 11 pixels
SMALLEST_FOR_SSIM = 2 * SSIM_RADIUS + 1
SSIM_CHUNK = 16  # images at a time, so that float64 maps stay small beside the VAE's
SMALLEST_FOR_LPIPS = 64
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's name for the weights that LPIPS was calibrated on


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images (N, 3, H, W): (N,). Equal images give 100."""
    error = (a.double() - b.double()).pow(2).flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error.clamp_min(255.0**2 * 1e-10))).float()


def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """Matrix (size, size - 10) from a row of pixels to its Gaussian means, only where the whole window fits."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64, device=device)
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    places = torch.arange(size - 2 * SSIM_RADIUS, device=device)
    band = torch.zeros(size, len(places), dtype=torch.float64, device=device)
    for offset, weight in enumerate(weights / weights.sum()):
        band[places + offset, places] = weight
    return band


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window, as scikit-image) of uint8 images (N, 3, H, W): (N,).

    Float64 on the images' device; a mean over the channels and all whole windows. ValueError below 11 pixels a side.
    """
    if min(a.shape[-2:]) < SMALLEST_FOR_SSIM:
        raise ValueError(f"SSIM needs images of at least {SMALLEST_FOR_SSIM} pixels a side, got {tuple(a.shape[-2:])}")
    rows, columns = _gaussian_band(a.shape[-2], a.device).T, _gaussian_band(a.shape[-1], a.device)

    def blur(x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 3, H-10, W-10)
        return rows @ (x @ columns)

    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.double().split(SSIM_CHUNK), b.double().split(SSIM_CHUNK), strict=True):
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        index = luminance * (2 * covariance + c2) / (variances + c2)
        values.append(index.flatten(1).mean(1))
    return torch.cat(values).float()


def find_alexnet_weights(path: str | None) -> Path:
    """AlexNet's weights for LPIPS: `path`, or where torch keeps downloads. ArgumentError says what to put where."""
    weights = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        advice = f"download https://download.pytorch.org/models/{ALEXNET} and give its path"
        raise ArgumentError("lpips_weights", f"no AlexNet weights at {weights}: {advice}")
    return weights


class Lpips:
    """LPIPS (Zhang et al. 2018) with AlexNet, by the package `lpips`, which brings the calibration.

    Two batches of uint8 images (N, 3, H, W) -> (N,). AlexNet's weights are torchvision's file
    (`find_alexnet_weights`). ArgumentError for a file that holds something else (its code is never run).
    """

    def __init__(self, path: str | None, device: torch.device):
        file = find_alexnet_weights(path)
        import lpips  # optional: slow to import, and needed for this alone

        self.network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        # slice2.3.weight is features.3.weight
        names = {key: f"features.{key.split('.', 1)[1]}" for key in self.network.net.state_dict()}
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.network.net.load_state_dict({key: state[name] for key, name in names.items()}, strict=True)
        except Exception as error:
            message = f"{file} does not hold torchvision's AlexNet: {first_line(error)}"
            raise ArgumentError("lpips_weights", message) from error
        self.network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of each pair, (N,)."""
        with float32_precision(self.device):
            return self.network(*(from_uint8(x.to(self.device)) for x in (a, b))).flatten()
