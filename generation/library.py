"""From class numbers to pictures, in one call: `images = generate(model, vae, [207, 360], cfg=3.0, seed=0)`; editing of given pictures.

Letters: B images, S their side in pixels, L tokens, C latent channels, H and W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.sampling.loop import SamplerState
from models.vae import AutoencoderKL
from util.seeds import mixed_seed

if TYPE_CHECKING:
    from models.tokenbridge import TokenBridge

Picture = Image.Image | Tensor | np.ndarray
Classes = Sequence[int | None | Mapping[int, float]]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8: round(clip((x + 1) / 2, 0, 1) * 255), same shape (SPEC 6)."""
    return ((x.float() + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 images (B, 3, S, S) -> PIL images."""
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]


def autocast(device: torch.device, precision: str | None) -> torch.autocast:
    """Autocast to a precision; None: bf16, but float32 on a CPU. Weights stay float32."""
    precision = precision or ("fp32" if device.type == "cpu" else "bf16")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose from {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


@dataclass
class GenerationStep:
    """One step of `generate_steps`: what is known so far, and the means to look at it."""

    state: SamplerState
    vae: AutoencoderKL

    @property
    def step(self) -> int:
        """0-based."""
        return self.state.step

    @property
    def num_iter(self) -> int:
        return self.state.num_iter

    @property
    def done(self) -> bool:
        """Whether this was the last step: `images` then gives the results."""
        return self.state.step == self.state.num_iter - 1

    def images(self) -> list[Image.Image]:
        """The pictures so far, PIL, with tokens that are not known yet in grey. Decodes: about the cost of an image through the VAE each time."""
        return to_pil(preview(self.vae, self.state))


@torch.no_grad()
def preview(vae: AutoencoderKL, state: SamplerState) -> Tensor:
    """uint8 (B, 3, S, S): the decoded latents, grey where a token is masked."""
    images = to_bytes(vae.decode(vae.unscale(state.latents.float())))
    if state.num_masked == 0:
        return images
    hidden = state.masked.repeat_interleave(vae.stride, 1).repeat_interleave(vae.stride, 2)  # (B, S, S)
    return images.masked_fill(hidden.unsqueeze(1), 128)


def decode(vae: AutoencoderKL, latents: Tensor, numbers: Sequence[int], hint: str = "") -> Tensor:
    """uint8 images (B, 3, S, S) from scaled latents; ValueError that names the first image (of `numbers`) that is not finite."""
    images = vae.decode(vae.unscale(latents.float()))  # float32: half precision can overflow here
    bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"image {numbers[bad[0]]} (and {len(bad) - 1} more of its batch) came out NaN: the weights are broken, or the precision "
            f"overflowed; look at the checkpoint, or use --precision fp32{hint}"
        )
    return to_bytes(images)


# ------------------------------------------------------------------------------------------------------------- editing


def picture_tensor(picture: Picture, size: int) -> Tensor:
    """(3, S, S) in [-1, 1] from a PIL image or a uint8 array (S, S, 3); a float tensor is taken as it is. ValueError for another size."""
    if isinstance(picture, Tensor):
        x = picture.float()
    else:
        array = np.array(picture.convert("RGB")) if isinstance(picture, Image.Image) else np.asarray(picture)
        x = torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)
    if tuple(x.shape) != (3, size, size):
        raise ValueError(
            f"the image to edit (--init) is {x.shape[-1]} x {x.shape[-2]} pixels, the model makes {size} x {size}"
        )
    return x


def token_mask(mask: Picture, size: int, grid: int) -> Tensor:
    """(L,) bool: the tokens to regenerate. A mask of S x S pixels chooses a token if any of its pixels is white (above half), one of H x W
    entries chooses tokens directly (nonzero). ValueError for another size, or if nothing is chosen."""
    if isinstance(mask, Image.Image):
        chosen = torch.from_numpy(np.array(mask.convert("L"))) > 127
    else:
        mask = torch.as_tensor(mask)
        chosen = mask > 127 if mask.dtype == torch.uint8 and mask.shape[-1] == size else mask != 0
    if tuple(chosen.shape) == (size, size):
        chosen = chosen.view(grid, size // grid, grid, size // grid).any(3).any(1)
    if tuple(chosen.shape) != (grid, grid):
        raise ValueError(
            f"the mask (--mask) is {tuple(chosen.shape)[::-1]}, it must have the image's {size} x {size} pixels or {grid} x {grid} tokens"
        )
    if not chosen.any():
        raise ValueError("the mask (--mask) chooses nothing: white pixels are regenerated")
    return chosen.flatten()


@torch.no_grad()
def encode_init(vae: AutoencoderKL, pictures: Sequence[Picture], size: int, device: torch.device) -> Tensor:
    """Scaled latents (B, C, H, W) of pictures to edit: the posterior's mean."""
    x = torch.stack([picture_tensor(picture, size) for picture in pictures]).to(device)
    return vae.scale(vae.encode(x).mode())


# ------------------------------------------------------------------------------------------------------------- generating


def generate_steps(
    model: TokenBridge,
    vae: AutoencoderKL,
    classes: Classes,
    *,
    seed: int = 0,
    first_index: int = 0,
    precision: str | None = None,
    init: Picture | None = None,
    mask: Picture | None = None,
    **options: object,
) -> Iterator[GenerationStep]:
    """Draw one batch, a picture per entry of `classes`, and yield after every step; stop early by closing the iterator.

    Arguments as for `generate`. Everything is checked at the call, before the first step.
    """
    size, device = model.config.img_size, model.mask_token.device
    embedding = model.class_embeddings(classes)
    if (init is None) != (mask is None):
        raise ValueError("editing needs both an image and a mask of what to regenerate (init, mask)")
    if init is not None:
        options |= dict(init=encode_init(vae, [init], size, device), regenerate=token_mask(mask, size, model.grid_size))
    seeds = [mixed_seed(seed, first_index + i) for i in range(len(classes))]
    states = model.sample_steps(len(classes), class_embedding=embedding, seeds=seeds, **options)
    context = autocast(device, precision)
    return _wrapped(states, vae, context)


def _wrapped(states: Iterator[SamplerState], vae: AutoencoderKL, context: torch.autocast) -> Iterator[GenerationStep]:
    while True:
        with context:  # left while the caller has control
            state = next(states, None)
        if state is None:
            return
        yield GenerationStep(state, vae)


def generate(
    model: TokenBridge,
    vae: AutoencoderKL,
    classes: Classes,
    *,
    seed: int = 0,
    batch_size: int = 64,
    precision: str | None = None,
    init: Picture | None = None,
    mask: Picture | None = None,
    on_step: Callable[[GenerationStep], None] | None = None,
    progress: bool = False,
    **options: object,
) -> list[Image.Image]:
    """One PIL image per entry of `classes`: a class number, None for no class, or a mixture such as {207: 0.5, 360: 0.5}.

    Image i depends on (seed, i) alone, and is the one that `main_tokenbridge.py --sample --seed` writes as number i. options: num_iter, cfg,
    temperature, order and the other fields of models.sampling.loop.SamplerOptions. init and mask: regenerate only the white part of the mask
    (see `token_mask`). on_step(step) is called after every step of every batch with a GenerationStep. ValueError for what does not fit.
    """
    images = []
    starts = range(0, len(classes), batch_size)
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=len(starts) * int(options.get("num_iter", 64)), unit="step")
    for first in starts:
        part = classes[first : first + batch_size]
        for step in generate_steps(
            model, vae, part, seed=seed, first_index=first, precision=precision, init=init, mask=mask, **options
        ):
            if on_step is not None:
                on_step(step)
            if progress:
                bar.update()
        with torch.no_grad():
            images += to_pil(decode(vae, step.state.latents, range(first, first + len(part))))
    if progress:
        bar.close()
    return images
