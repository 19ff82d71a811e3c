"""The ADM centre crop (SPEC 1), and a random one for caches with several crops of an image."""

import numpy as np
from PIL import Image


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """size x size centre of an RGB image: halve it with BOX while its short side is at least 2*size, bring that to `size` with BICUBIC, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, smallest_share: float = 0.8) -> Image.Image:
    """A size x size part of an RGB image: its short side is brought to between size and size/smallest_share, the place is drawn evenly."""
    short = int(rng.integers(size, round(size / smallest_share) + 1))
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return image.crop((left, top, left + size, top + size))
