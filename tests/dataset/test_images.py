"""dataset/images.py: the ADM crop against a rewrite on arrays, uint8 rounding, PNG files, broken pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.images import center_crop_adm, read_image, save_grid, save_png, to_tensor, to_uint8
from tests.helpers import photographs


def photo(width: int, height: int) -> Image.Image:
    """A real picture of that size: crop, or repeat where the photograph is smaller."""
    picture = photographs()[0]
    picture = np.tile(picture, (math.ceil(height / 427), math.ceil(width / 640), 1))[:height, :width]
    return Image.fromarray(np.ascontiguousarray(picture))


def halve_with_box(pixels: np.ndarray, rows_first: bool) -> np.ndarray:
    """Means of pairs along one direction, then along the other, rounded half up as Pillow does; even sides only."""
    pixels = pixels.astype(np.uint16)
    for along_rows in (rows_first, not rows_first):
        pixels = (pixels[:, 0::2] + pixels[:, 1::2] + 1) // 2 if along_rows else (pixels[0::2] + pixels[1::2] + 1) // 2
    return pixels.astype(np.uint8)


def crop_rewritten(image: Image.Image, size: int, rows_first: bool) -> np.ndarray:
    """docs/spec.md 1 on arrays: halving by 2x2 means, bicubic by Pillow's own resize of the array, slicing."""
    pixels = np.asarray(image)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halve_with_box(pixels, rows_first)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = np.asarray(
        Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), resample=Image.BICUBIC)
    )
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


SHAPES = [(256, 256), (640, 424), (424, 640), (1280, 320), (160, 1280), (100, 48), (30, 50), (64, 64), (128, 128)]
SHAPES += [(65, 64), (64, 127), (31, 33)]


@pytest.mark.parametrize(
    ("shape", "size"),
    [(shape, 64) for shape in SHAPES] + [(shape, 32) for shape in SHAPES if shape not in ((65, 64), (64, 127))],
)
def test_crop_against_a_rewrite(shape, size):
    """Wide, tall, small, square, barely larger; a side that is halved is even (the rewrite would fail on others).

    Equal to the last bit, but for the order of Pillow's two passes: recent versions begin with columns of tall ones.
    """
    image = photo(*shape)
    found = np.asarray(center_crop_adm(image, size))
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert any(np.array_equal(found, crop_rewritten(image, size, rows_first)) for rows_first in (True, False))


@pytest.mark.parametrize(("shape", "steps"), [((131, 200), 1), ((259, 301), 2), ((127, 300), 0), ((1023, 517), 3)])
def test_odd_sides_are_halved_by_floor_division(shape, steps):
    """The sizes that resize is asked for, one after another, from docs/spec.md 1 with size 64."""
    asked = []

    class Spy:
        def __init__(self, size: tuple[int, int]):
            self.size, (self.width, self.height) = size, size

        def resize(self, size: tuple[int, int], resample: int) -> "Spy":
            asked.append((size, Image.Resampling(resample).name))
            return Spy(size)

        def crop(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
            return box

    box = center_crop_adm(Spy(shape), 64)
    sizes = [(shape[0] // 2**k, shape[1] // 2**k) for k in range(1, steps + 1)]
    width, height = sizes[-1] if sizes else shape
    scale = 64 / min(width, height)
    final = (round(width * scale), round(height * scale))
    assert asked == [(size, "BOX") for size in sizes] + [(final, "BICUBIC")]
    assert box == ((final[0] - 64) // 2, (final[1] - 64) // 2, (final[0] - 64) // 2 + 64, (final[1] - 64) // 2 + 64)


def test_crop_takes_the_centre():
    """Columns 0..9 of one colour each, crop 4 of height 4: columns 3..6; of 9 columns 2..5 (the offset is floored)."""
    for width, expected in ((10, [3, 4, 5, 6]), (9, [2, 3, 4, 5])):
        pixels = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (4, width, 3))
        assert (
            np.asarray(center_crop_adm(Image.fromarray(np.ascontiguousarray(pixels)), 4))[0, :, 0].tolist() == expected
        )


def test_to_uint8_by_hand():
    """round(clip((x + 1)/2, 0, 1) * 255): not truncated, clipped outside [-1, 1]."""
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.002, 0.5, 0.996, 1.0, 3.0])
    # 63.75, 127.5 (to even), 127.755, 191.25, 254.49
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 128, 191, 254, 255, 255]
    assert to_uint8(x).dtype == torch.uint8
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_every_pixel_survives_the_trip():
    """uint8 -> [-1, 1] -> uint8 is the identity for all 256 values; 0 is -1 and 255 is 1."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tensor = to_tensor(Image.fromarray(np.stack([pixels, pixels.T, 255 - pixels], -1)))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert tensor[0, 0, 3] == pytest.approx(3 / 127.5 - 1)
    np.testing.assert_array_equal(to_uint8(tensor).numpy(), np.stack([pixels, pixels.T, 255 - pixels]))


def test_png_keeps_every_pixel(tmp_path):
    image = torch.from_numpy(photographs()[1][:20, :30].copy()).permute(2, 0, 1)
    save_png(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image.permute(1, 2, 0).numpy())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]  # no temporary file is left


def test_grid_rows(tmp_path):
    """Six 4x4 pictures of one value each in rows of three, 2 pixels of white around each."""
    images = torch.stack([torch.full((3, 4, 4), 10 * i, dtype=torch.uint8) for i in range(6)])
    save_grid(tmp_path / "grid.png", images, columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]
    assert grid.shape == (2 * 6 + 2, 3 * 6 + 2)
    found = [[grid[2 + 6 * row, 2 + 6 * column] for column in range(3)] for row in range(2)]
    assert found == [[0, 10, 20], [30, 40, 50]]
    assert grid[0, 0] == 255


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "absent", "bomb"])
def test_broken_pictures_are_named(tmp_path, monkeypatch, kind):
    path = tmp_path / "bad.jpg"
    if kind in ("truncated", "bomb"):
        photo(64, 64).save(path)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:-400])
        else:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 4,096 pixels are then beyond twice the limit
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "empty":
        path.touch()
    with pytest.raises(ValueError, match="bad.jpg.*mend or remove it$"):
        read_image(path)
