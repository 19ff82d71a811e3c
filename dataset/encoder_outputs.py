"""From the VAE's posteriors to what a cache stores: moments, their mean, or indices of one quantized sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.shards import RecordSpec
from models.latent_space import DiagonalGaussian
from models.quantizer import TableQuantizer
from models.vae import AutoencoderKL
from util import dist
from util.seeds import mixed_seed


@dataclass(frozen=True)
class RecordMaker:
    """Posteriors -> what a cache stores of them. Indices need a quantizer and a scale; the noise is drawn from seed."""

    spec: RecordSpec
    quantizer: TableQuantizer | None = None
    scale: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __call__(self, views: Sequence[DiagonalGaussian], numbers: Sequence[int]) -> Tensor:
        """Posteriors of the V views of the images `numbers` -> records (b, V, *shape) on the CPU."""
        return torch.stack([self._record(view, numbers, v) for v, view in enumerate(views)], 1).cpu()

    def _record(self, posterior: DiagonalGaussian, numbers: Sequence[int], view: int) -> Tensor:
        if self.spec.mode == "moments":
            return posterior.parameters
        if self.spec.mode == "mean":
            return posterior.mean
        generators = [torch.Generator().manual_seed(mixed_seed(self.seed, number, view)) for number in numbers]
        noise = torch.stack([torch.randn(self.spec.shape, generator=g) for g in generators])  # (b, C, h, w)
        sample = posterior.sample(noise=noise.to(posterior.mean))
        return self.quantizer.quantize(self.scale(sample)).to(torch.int16)


@torch.no_grad()
def encode_images(
    crops: Tensor,
    numbers: Sequence[int],
    *,
    vae: AutoencoderKL,
    make: RecordMaker,
    flips: bool,
    device: torch.device,
    precision: str = "fp32",
) -> Tensor:
    """Crops (b, crops, 3, S, S) of the images `numbers` -> records (b, V, *shape). ValueError unless finite."""
    views = []
    for crop in crops.to(device, non_blocking=True).unbind(1):
        for images in (crop, crop.flip(-1)) if flips else (crop,):
            with dist.autocast(device, precision):
                moments = vae.encode(images).parameters
            if not torch.isfinite(moments).all():
                what = f"the VAE's latents of an image are NaN or infinite in {precision} (precision)"
                raise ValueError(f"{what}; use fp32 or bf16 or check the VAE (vae_path)")
            views.append(DiagonalGaussian(moments.float()))
    return make(views, numbers)


@torch.no_grad()
def convert_moments(moments: Tensor, numbers: Sequence[int], *, make: RecordMaker, device: torch.device) -> Tensor:
    """Moments (b, V, 2C, h, w) of the images `numbers` -> records (b, V, *shape)."""
    return make([DiagonalGaussian(view) for view in moments.to(device, non_blocking=True).unbind(1)], numbers)
