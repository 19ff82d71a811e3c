"""The ADM centre crop (SPEC 1)."""

from PIL import Image


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """size x size centre of an RGB image: halve it with BOX while its short side is at least 2*size, bring that to `size` with BICUBIC, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
