"""Pictures: model output to uint8, PNG files and grids, all written atomically."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from util.files import replacing

PIXELS = ("truncate", "round")


def to_uint8(x: Tensor, pixels: str = "round") -> Tensor:
    """Images in [-1, 1] -> uint8: clip((x + 1) / 2, 0, 1) * 255, rounded (half to even) or truncated; same shape.

    The published sampler rounds, the published reconstruction script truncates, which darkens images by half a grey
    level.
    """
    values = ((x.float() + 1) / 2).clamp(0, 1).mul(255)
    return (values if pixels == "truncate" else values.round()).to(torch.uint8)


def atomic_write(image: Image.Image, path: str | Path) -> None:
    """Save as PNG under a temporary name, then rename."""
    with replacing(path) as file:
        image.save(file, format="PNG")


def save_png(path: str | Path, image: Tensor) -> None:
    """One uint8 image (3, H, W) to a PNG file."""
    atomic_write(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), path)


def save_grid(path: str | Path, images: Tensor, columns: int) -> None:
    """uint8 images (N, 3, H, W) to one PNG, row by row with `columns` in a row."""
    save_png(path, make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255))


def save_frames(path: str | Path, images: Tensor, milliseconds: int = 150) -> None:
    """uint8 images (N, 3, H, W) to a GIF that repeats and rests on the last."""
    frames = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    with replacing(path) as file:
        frames[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            loop=0,
            duration=[milliseconds] * (len(frames) - 1) + [10 * milliseconds],
        )


def read_image(path: str | Path) -> Image.Image:
    """An RGB image. ValueError naming the file if it is corrupt, cut short or too large to be safe."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {path} cannot be read ({error}); mend or remove it, or pass --on_bad_image skip"
        ) from error


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)
