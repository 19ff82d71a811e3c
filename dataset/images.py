"""Images: reading, the ADM centre crop (docs/spec.md 1), tensors, and files that are written atomically."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from util.files import replacing

PIXELS = ("truncate", "round")


def read_image(path: str | Path) -> Image.Image:
    """An RGB image. ValueError naming the file if it is corrupt, truncated or too large to be safe."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {path} cannot be read ({error}); mend or remove it, or pass --on_bad_image skip"
        ) from error


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """The image with its short side at `size`: halved with BOX while at least 2·size, then resized with BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """The size x size centre of an RGB image whose short side is resized to `size`; offsets are rounded down."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, smallest_share: float = 0.8) -> Image.Image:
    """A random size x size crop; the short side is first resized to between size and size / smallest_share."""
    image = resize_short_side(image, int(rng.integers(size, round(size / smallest_share) + 1)))
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_uint8(x: Tensor, pixels: str = "round") -> Tensor:
    """Images in [-1, 1] -> uint8: clip((x + 1) / 2, 0, 1) * 255, rounded (half to even) or truncated; same shape.

    The published sampler rounds; the published reconstruction script truncates, which darkens images by half a level.
    """
    values = ((x.float() + 1) / 2).clamp(0, 1).mul(255)
    return (values if pixels == "truncate" else values.round()).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 images (N, 3, H, W) -> PIL images."""
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]


def atomic_write(image: Image.Image, path: str | Path) -> None:
    """Save as PNG under a temporary name, then rename."""
    with replacing(path) as file:
        image.save(file, format="PNG")


def save_png(path: str | Path, image: Tensor) -> None:
    """One uint8 image (3, H, W) to a PNG file."""
    atomic_write(to_pil(image.unsqueeze(0))[0], path)


def save_grid(path: str | Path, images: Tensor, columns: int) -> None:
    """uint8 images (N, 3, H, W) to one PNG, row by row with `columns` in a row."""
    save_png(path, make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255))


def save_frames(path: str | Path, images: Tensor, milliseconds: int = 150) -> None:
    """uint8 images (N, 3, H, W) to a looping GIF that shows the last frame ten times as long."""
    first, *rest = to_pil(images)
    durations = [milliseconds] * len(rest) + [10 * milliseconds]
    with replacing(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, loop=0, duration=durations)
