"""Editing a given image: which tokens are regenerated, and the latents of those that are kept.

Letters: B images, S their side in pixels, C latent channels, H and W latent grid, L = H*W tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.images import from_uint8, to_rgb, to_tensor
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util.options import ArgumentError

Picture = Image.Image | Tensor | np.ndarray
LARGEST_VALUE = 1.5  # of a tensor to edit: what a decoder gives may exceed 1 somewhat


@dataclass
class Edit:
    """Only the tokens of `regenerate` are sampled; the others keep the quantized values of `latents`."""

    latents: Tensor  # (1, C, H, W), scaled
    regenerate: Tensor  # (L,) bool


def make_edit(model: TokenBridge, vae: AutoencoderKL, init: Picture | None, mask: Picture | None) -> Edit | None:
    """The edit of an image and a mask, None without both; ArgumentError if one is missing or has another size."""
    if init is None and mask is None:
        return None
    if init is None or mask is None:
        raise ArgumentError("init", "editing needs both an image and a mask of what to regenerate (init, mask)")
    size, device = model.grid_size * vae.stride, model.mask_token.device
    return Edit(encode_init(vae, [init], size, device), token_mask(mask, size, model.grid_size))


def picture_tensor(picture: Picture, size: int) -> Tensor:
    """(3, S, S) in [-1, 1] of a PIL image, a uint8 array (S, S, 3), or a tensor (3, S, S), uint8 or in [-1, 1].

    ArgumentError for another size or range.
    """
    if isinstance(picture, Tensor):
        x = from_uint8(picture) if picture.dtype == torch.uint8 else picture.float()
        if not (x.abs() <= LARGEST_VALUE).all():
            raise ArgumentError("init", "the tensor to edit has values outside [-1, 1], and is not of type uint8")
    else:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
        x = to_tensor(to_rgb(image))
    if tuple(x.shape) != (3, size, size):
        found = f"{x.shape[-1]} x {x.shape[-2]}"
        raise ArgumentError("init", f"the image to edit is {found} pixels, the model makes {size} x {size}")
    return x


def token_mask(mask: Picture, size: int, grid: int) -> Tensor:
    """(L,) bool: the tokens to regenerate.

    A mask of S x S pixels chooses a token if any of its pixels is white (above half; in an array that is not of type
    uint8, above 0.5); a mask of H x W entries chooses tokens directly (nonzero). ArgumentError for another size, or if
    no token is chosen.
    """
    if isinstance(mask, Image.Image):
        chosen = torch.from_numpy(np.array(to_rgb(mask, "black").convert("L"))) > 127
    else:
        mask = torch.as_tensor(mask)
        half = 127 if mask.dtype == torch.uint8 else 0.5
        chosen = mask > half if mask.shape[-1] == size else mask != 0
    if tuple(chosen.shape) == (size, size):
        chosen = chosen.view(grid, size // grid, grid, size // grid).any(3).any(1)  # (H, W)
    if tuple(chosen.shape) != (grid, grid):
        expected = f"the image's {size} x {size} pixels or {grid} x {grid} tokens"
        raise ArgumentError("mask", f"the mask is {tuple(chosen.shape)[::-1]}, it must have {expected}")
    if not chosen.any():
        raise ArgumentError("mask", "the mask chooses nothing: white pixels are regenerated")
    return chosen.flatten()


@torch.no_grad()
def encode_init(vae: AutoencoderKL, pictures: Sequence[Picture], size: int, device: torch.device) -> Tensor:
    """Scaled latents (B, C, H, W) of the images to edit: the mean of the posterior."""
    x = torch.stack([picture_tensor(picture, size) for picture in pictures]).to(device)  # (B, 3, S, S)
    return vae.scale(vae.encode(x).mode())
