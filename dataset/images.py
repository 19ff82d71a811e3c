"""Images: decoding for all commands, the ADM centre crop (docs/spec.md 1), tensors, and files that are written
atomically.
"""

import errno
import functools
import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin
from torch import Tensor
from torchvision.utils import make_grid

from util.files import replacing

PIXELS = ("truncate", "round")
CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]")  # line breaks and other control characters
LARGEST_RATIO = 100  # of the sides: 100 x 1 resized to 256 takes 20 MB, 60,000 x 1 would take 12 GB


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Names of the formats that Pillow decodes itself, in its order of attempts.

    Left out: stubs that recognise a file without decoding it, and those that start another program (Ghostscript).
    """
    Image.init()
    return tuple(name for name in Image.ID if name not in ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"))


@functools.cache
def image_extensions() -> tuple[str, ...]:
    """Sorted extensions, such as ".png", of the files that `read_image` decodes; with Pillow's plug-ins in use."""
    formats, registered = readable_formats(), Image.registered_extensions()
    return tuple(sorted(suffix for suffix, name in registered.items() if suffix.startswith(".") and name in formats))


def read_image(path: str | Path, background: str = "white") -> Image.Image:
    """The RGB picture that a viewer shows: the first frame, upright (EXIF), 8 bits, over `background` where
    transparent. Colour profiles (ICC) are ignored, as in the published pipeline (docs/differences.md).

    ValueError naming the file if it is no regular file, damaged, too large or too long to be safe, or has values of an
    unknown range (`to_rgb`). OSError if the machine, not the file, is the reason (`of_the_machine`).
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a regular file")
        return decode(path, background)
    except Exception as error:  # each decoder has its own, AVIF's is RuntimeError
        if of_the_machine(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"image {printable(path)} cannot be read ({reason}); mend or remove it") from error


def decode(file: str | Path | BinaryIO, background: str = "white", most_pixels: float = math.inf) -> Image.Image:
    """As `read_image`, also of an open file, with the decoders' own errors. ValueError for more than `most_pixels`."""
    with Image.open(file, formats=readable_formats()) as image:
        image.filename = ""  # then Pillow maps no memory: of a TIFF on its side it would map rows of the wrong length
        check_ratio(image)
        if image.width * image.height > most_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        return to_rgb(image, background)


def of_the_machine(error: Exception) -> bool:
    """Whether file descriptors or memory ran out: then a file that cannot be read is no bad image."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def printable(path: str | Path) -> str:
    """A path on one line: control characters in its names as escapes."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], str(path))


def check_ratio(image: Image.Image) -> None:
    """ValueError for sides of which one is over LARGEST_RATIO times the other: enlarged, it would fill the memory."""
    if max(image.size) > LARGEST_RATIO * min(image.size):
        sides = f"{image.size[0]} x {image.size[1]} pixels"
        raise ValueError(f"{sides}: one side is more than {LARGEST_RATIO} times the other")


def scale_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the depth that its pixels are decoded to. ValueError if that is ambiguous.

    Pillow leaves it at the file's depth, 1, 2, 4 or 16 bits.
    """
    if image.format != "PNG" or not image.tile or "transparency" not in image.info:
        return  # not a PNG, or decoded already
    value, layout = image.info["transparency"], str(image.tile[0][3])
    if image.mode == "RGB" and ";16" in layout:
        raise ValueError("a transparent colour of 16 bits per channel is not supported: save it with 8 bits")
    if image.mode == "L":
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}.get(layout, 1)
    elif image.mode == "1":
        image.info["transparency"] = 255 if value else 0


def refuse_deep_planes(image: Image.Image) -> None:
    """ValueError for an uncompressed TIFF of 16-bit colours in separate planes, which Pillow reads as 8-bit ones."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    planes, bits = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2, tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))
    if planes and bits[0] > 8 and image.tile and image.tile[0][0] == "raw":
        raise ValueError("16-bit colours in separate planes are not supported: save it with 8 bits, or interleaved")


def has_alpha(image: Image.Image) -> bool:
    """Whether parts of an image are transparent. In TGA and BMP a fourth byte that is 0 everywhere is padding."""
    padded = image.format in ("TGA", "BMP") and image.mode in ("LA", "RGBA")
    return image.has_transparency_data and not (padded and image.getchannel("A").getextrema() == (0, 0))


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) if there is none or the EXIF data are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned and mirrored as EXIF's orientation says."""
    turn = Image.Transpose
    turns = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE)
    turns += (turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90)
    return image.transpose(turns[orientation - 2]) if orientation in range(2, 9) else image


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An image of any mode as RGB, upright, composited over `background` where it is transparent, without metadata.

    16-bit values keep their high byte, as Pillow's own decoders of 16-bit colours do. ValueError for 32-bit integers
    and floats, whose black and white are unknown.
    """
    scale_transparency(image)
    refuse_deep_planes(image)
    image.load()  # some formats store EXIF behind the pixels
    turn = orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = grey_to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = upright(image.convert("RGB"), turn)
    image.info = {}  # orientation and transparency are applied
    return image


def grey_to_8_bits(image: Image.Image) -> Image.Image:
    """L, or LA with a transparent value, of a grey image of up to 16 bits. ValueError if its range is not known."""
    sixteen = image.mode.startswith("I;16") and image.format != "FITS"
    if not sixteen and not (image.mode == "I" and image.format in ("PNG", "PPM")):  # these are scaled to 16 bits
        raise ValueError(f"the range of its values (mode {image.mode}) is unknown: save it with 8 or 16 bits")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, white_is_zero = tags.get(258, (16,))[0], tags.get(262) == 0  # BitsPerSample, PhotometricInterpretation
    values = np.asarray(image).astype(np.int32)
    grey = (values >> (bits - 8)).astype(np.uint8)
    picture = Image.fromarray(255 - grey if white_is_zero else grey)
    if "transparency" in image.info:
        opaque = (values != image.info["transparency"]).astype(np.uint8) * 255
        picture.putalpha(Image.fromarray(opaque))
    return picture


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """The image with its short side at `size`: halved with BOX while at least 2·size, then resized with BICUBIC.

    ValueError for sides too different to be enlarged.
    """
    check_ratio(image)
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
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1], same shape."""
    return images.float().div_(127.5).sub_(1)


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
