"""dataset/images.read_image: the picture that a viewer shows, for every format, mode and depth; what is refused."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from dataset import images
from dataset.images import center_crop_adm, image_extensions, read_image, readable_formats, to_rgb
from tests.helpers import photographs

Image.init()
FORMATS = sorted(Image.SAVE)
AVIF = ["avif"] if "AVIF" in FORMATS else []  # Pillow 11.3 and later
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I;16L", "I", "F")
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
LOSSY = {"JPEG": 12, "MPO": 12, "AVIF": 12, "WEBP": 12, "GIF": 6}  # largest mean difference in levels
NOT_READ_BACK = ("BUFR", "EPS", "GRIB", "HDF5", "ICNS", "PALM", "PDF", "WMF")  # no decoder; ICNS has its own sizes
MODES_OF = {
    "PNG": ("1", "L", "P", "RGB", "LA", "RGBA", "I;16"),
    "TIFF": ("1", "L", "P", "RGB", "RGBX", "CMYK", "LAB", "I;16", "I", "F", "LA", "PA", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("L", "RGB", "RGBA"),
}
DROPS_ALPHA = ("BMP", "DIB", "PPM")  # Pillow writes no alpha to PPM, and reads BMP's fourth byte as padding


def hidden_colours() -> Image.Image:
    """32 x 32 RGBA: an opaque photograph above, half transparent in the middle, magenta that is hidden below."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., :3] = photographs()[0][100:132, 100:132]
    pixels[:12, :, 3], pixels[12:20, :, 3] = 255, 128
    pixels[20:, :, :3] = 255, 0, 255
    return Image.fromarray(pixels)


def over_white(rgba: np.ndarray) -> np.ndarray:
    """The composite by the definition of alpha, float64."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def in_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture of that mode, and its 8-bit RGB twin over white, (32, 32, 3)."""
    rgba = hidden_colours()
    rgb = Image.fromarray(np.asarray(rgba)[..., :3].copy())
    grey = np.asarray(rgb.convert("L"))
    grey_rgb = np.repeat(grey[..., None], 3, -1)
    alpha = np.asarray(rgba)[..., 3:]
    if mode.startswith("I;16"):
        raw = (grey.astype("<u2") * 257).astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        return Image.frombytes(mode, (32, 32), raw), grey_rgb
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257), grey_rgb
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255), grey_rgb
    if mode in ("LA", "La"):
        grey_alpha = Image.merge("LA", (Image.fromarray(grey), rgba.getchannel("A")))
        return grey_alpha.convert(mode), over_white(np.concatenate([grey_rgb, alpha], -1))
    if mode == "PA":
        palette = rgb.convert("P").convert("PA")
        palette.putalpha(rgba.getchannel("A"))
        colours = np.asarray(rgb.convert("P").convert("RGB"))
        return palette, over_white(np.concatenate([colours, alpha], -1))
    if mode in ("RGBA", "RGBa"):
        return rgba.convert(mode), over_white(np.asarray(rgba))
    image = rgb.convert(mode)
    return image, np.asarray(image.convert("RGB"))


def difference(found: Image.Image, expected: np.ndarray) -> float:
    """Mean absolute difference in levels."""
    assert found.mode == "RGB" and found.size == (expected.shape[1], expected.shape[0]) and not found.info
    return float(np.abs(np.asarray(found, np.float64) - expected).mean())


@pytest.mark.parametrize("mode", [mode for mode in (*OPAQUE, *ALPHA) if mode not in ("I", "F")])
def test_every_mode_in_memory(mode: str) -> None:
    image, expected = in_mode(mode)
    before = image.tobytes()
    assert difference(to_rgb(image), expected) <= (1 if mode in ALPHA else 0)
    assert image.tobytes() == before and image.mode == mode


def write(mode: str, name: str, path: Path) -> Image.Image | None:
    """The picture of that mode written to a file, as Pillow reads it; None where that is not possible or not
    faithful.
    """
    image, _ = in_mode(mode)
    try:
        image.save(path, format=name)
        with Image.open(path) as written:
            written.load()
    except (OSError, ValueError, KeyError, SystemError):
        return None  # Pillow does not write this mode to this format, or does not read the format
    deep = mode.startswith(("I", "F")) and not written.mode.startswith(("I", "F"))
    return None if deep or written.size != image.size else written  # clipped while saving; resized as an icon


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_mode_that_pillow_writes(tmp_path: Path, name: str) -> None:
    """Equal to the 8-bit twin, or refused: never another picture."""
    compared, path = [], tmp_path / "picture"
    for mode in (*OPAQUE, *ALPHA):
        if (written := write(mode, name, path)) is None:
            continue
        compared.append(mode)
        if written.mode in ("I", "F") and (written.mode, name) not in (("I", "PNG"), ("I", "PPM")):
            with pytest.raises(ValueError, match=f"{path.name} cannot be read .*range of its values"):
                read_image(path)
            continue
        image, expected = in_mode(mode)
        if mode in ALPHA and name in DROPS_ALPHA or (mode, name) == ("LA", "GIF"):
            expected = np.asarray(image.convert("RGB"))
        if written.mode in ("1", "L") and mode not in ("1", "L", "LA"):
            expected = np.asarray(written.convert("RGB"))  # colours were dropped while saving
        found = read_image(path)
        if (mode, name) == ("RGBA", "GIF"):  # it has no half transparent pixels
            found, expected = found.crop((0, 20, 32, 32)), expected[20:]
        assert difference(found, expected) <= LOSSY.get(name, 1 if mode in ALPHA else 0), mode
    assert bool(compared) == (name not in NOT_READ_BACK)
    assert set(MODES_OF.get(name, ())) <= set(compared)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, chunks: dict[bytes, bytes] | None = None) -> bytes:
    """A PNG file of these packed rows; kind: 0 grey, 2 colour, 3 palette. chunks: before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    size = len(rows) // height
    packed = b"".join(b"\0" + rows[i * size : (i + 1) * size] for i in range(height))
    parts = {b"IHDR": header, **(chunks or {}), b"IDAT": zlib.compress(packed), b"IEND": b""}
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_grey_png_of_every_depth(tmp_path: Path, depth: int, transparent: bool) -> None:
    """All levels of 1, 2, 4 and 8 bits, 16 levels of 16 bits; the last but one is transparent, so it is white."""
    levels = list(range(2 ** min(depth, 8))) if depth < 16 else [4096 * i + 77 for i in range(16)]
    per_byte = max(1, 8 // depth)
    levels += [0] * (-len(levels) % per_byte)
    if depth < 8:
        packed = np.packbits(
            np.array([[level >> b & 1 for b in range(depth - 1, -1, -1)] for level in levels])
        ).tobytes()
    else:
        packed = np.array(levels, ">u2" if depth == 16 else "u1").tobytes()
    hidden = levels[-2]
    path = tmp_path / "grey.png"
    path.write_bytes(
        png(len(levels), 4, depth, 0, 4 * packed, {b"tRNS": struct.pack(">H", hidden)} if transparent else {})
    )
    expected = [level >> 8 if depth == 16 else round(level * 255 / (2**depth - 1)) for level in levels]
    if transparent:
        expected = [255 if level == hidden else value for level, value in zip(levels, expected, strict=True)]
    assert np.asarray(read_image(path))[0, :, 0].tolist() == expected


def test_colour_png_of_16_bits(tmp_path: Path) -> None:
    pixels = np.array([[[0x1234, 0xFFFF, 0], [0x00FF, 0x8000, 0x7FFF]]], ">u2")
    path = tmp_path / "deep.png"
    path.write_bytes(png(2, 1, 16, 2, pixels.tobytes()))
    assert np.asarray(read_image(path)).tolist() == [[[0x12, 255, 0], [0, 0x80, 0x7F]]]
    path.write_bytes(png(2, 1, 16, 2, pixels.tobytes(), {b"tRNS": pixels[0, 0].tobytes()}))
    with pytest.raises(ValueError, match="transparent colour of 16 bits"):
        read_image(path)


def test_palette_with_transparent_entries(tmp_path: Path) -> None:
    palette = bytes([255, 0, 255, 0, 0, 0, 10, 20, 30])
    path = tmp_path / "icon.png"
    path.write_bytes(png(3, 1, 8, 3, bytes([0, 1, 2]), {b"PLTE": palette, b"tRNS": bytes([0, 255, 102])}))
    assert np.asarray(read_image(path))[0].tolist() == [[255, 255, 255], [0, 0, 0], [157, 161, 165]]
    assert np.asarray(read_image(path, "black"))[0].tolist() == [[0, 0, 0], [0, 0, 0], [4, 8, 12]]


def tiff(bits: int, photometric: int, values: bytes, width: int) -> bytes:
    """A little-endian grey TIFF of one row."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(values)))
    values += b"\0" * (len(values) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory + struct.pack("<I", 0)


def test_grey_tiff_of_12_and_16_bits(tmp_path: Path) -> None:
    """12 bits are scaled by 12 bits; a 16-bit file in which zero is white is inverted, as one of 8 bits is."""
    levels, path = [0, 0x123, 0x800, 0xFFF], tmp_path / "scan.tif"
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in (levels[:2], levels[2:]))
    path.write_bytes(tiff(12, 1, packed, 4))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]
    for photometric, expected in ((1, [0, 0x12, 0x80, 0xFF]), (0, [255, 255 - 0x12, 255 - 0x80, 0])):
        path.write_bytes(tiff(16, photometric, np.array([16 * v for v in levels], "<u2").tobytes(), 4))
        assert np.asarray(read_image(path))[0, :, 0].tolist() == expected


def test_colour_tiff_of_16_bits_in_planes(tmp_path: Path) -> None:
    """Pillow reads the bytes of an uncompressed one as twice as many pixels; compressed ones go through libtiff."""
    pixels, path = np.asarray(hidden_colours())[..., :3], tmp_path / "scan.tif"
    planes = pixels.transpose(2, 0, 1).astype(np.uint16) * 257
    options = dict(photometric="rgb", planarconfig="separate")
    tifffile.imwrite(path, planes, **options, compression="zlib")
    assert difference(read_image(path), pixels) == 0
    tifffile.imwrite(path, planes, **options)
    with pytest.raises(ValueError, match="scan.tif cannot be read .*separate planes"):
        read_image(path)


@pytest.mark.parametrize("maxval", [1, 15, 255, 1023, 65535])
def test_portable_grey_maps_of_every_range(tmp_path: Path, maxval: int) -> None:
    path = tmp_path / "a.pgm"
    values = np.array([0, maxval // 2, maxval], ">u2" if maxval > 255 else "u1")
    path.write_bytes(b"P5 3 1 %d\n" % maxval + values.tobytes())
    found = np.asarray(read_image(path))[0, :, 0].astype(int)
    np.testing.assert_allclose(found, values.astype(int) * 255 / maxval, atol=1)
    assert found[0] == 0 and found[2] == 255


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", *AVIF])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation(tmp_path: Path, turn: int, suffix: str) -> None:
    """Rows and columns by the EXIF definition; a file of several frames and a 16-bit one are turned too."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {} if suffix in ("png", "tif") else {"quality": 95} | ({"subsampling": 0} if suffix == "jpg" else {})
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **options)
    mirrored, flipped = pixels[:, ::-1], pixels[::-1]
    shown = [pixels, mirrored, pixels[::-1, ::-1], flipped]
    shown += [np.swapaxes(x, 0, 1) for x in (pixels, flipped, pixels[::-1, ::-1], mirrored)]
    found = read_image(path)
    assert difference(found, shown[turn - 1]) < 12
    assert np.array_equal(np.asarray(to_rgb(found)), np.asarray(found))  # not turned twice


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "RGBA", "CMYK", "I;16"])
def test_tiff_on_its_side(tmp_path: Path, mode: str) -> None:
    """Pillow maps the modes with whole words to memory, with the turned width."""
    image, expected = in_mode(mode)
    image.crop((0, 0, 32, 24)).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    assert difference(read_image(tmp_path / "a.tif"), np.rot90(expected[:24], -1)) <= (1 if mode in ALPHA else 0)


@pytest.mark.parametrize("suffix", ["tga", "bmp"])
def test_padding_is_no_alpha(tmp_path: Path, suffix: str) -> None:
    """A fourth byte that is 0 in all pixels would make the picture white."""
    rgba = hidden_colours()
    rgba.putalpha(0)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    header = struct.pack("<2sIIIIiiHHII16x", b"BM", 0, 0, 122, 108, 32, -32, 1, 32, 3, 4096) + masks
    header = header if suffix == "bmp" else struct.pack("<BBB9xHHBB", 0, 0, 2, 32, 32, 32, 0x20)
    (tmp_path / f"a.{suffix}").write_bytes(header + rgba.tobytes("raw", "BGRA"))
    assert difference(read_image(tmp_path / f"a.{suffix}"), np.asarray(rgba)[..., :3]) == 0


def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(photographs()[0][:32, :48]).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(path).size == (48, 32)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_colour_profiles_are_ignored(tmp_path: Path, mode: str) -> None:
    """As in the published pipeline: tagged pictures, also with a damaged profile, are read as untagged ones."""
    image = in_mode(mode)[0]
    image.save(tmp_path / "untagged.jpg")
    profiles = [ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes() for space in ("sRGB", "LAB")]
    for profile in (*profiles, b"no profile"):
        image.save(tmp_path / "tagged.jpg", icc_profile=profile)
        with Image.open(tmp_path / "tagged.jpg") as tagged:
            assert tagged.info["icc_profile"] == profile
        assert read_image(tmp_path / "tagged.jpg").tobytes() == read_image(tmp_path / "untagged.jpg").tobytes()


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several(tmp_path: Path, name: str) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((200, 40, 40), (40, 40, 200)))
    first.save(tmp_path / "a", format=name, save_all=True, append_images=[second])
    assert difference(read_image(tmp_path / "a"), np.full((16, 16, 3), (200, 40, 40))) < 4


def test_long_pictures_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60,000 x 1 would take 12 GB at 256 pixels; 100 x 1 is allowed."""
    for width, height in ((60_000, 1), (1, 20_000), (101, 1)):
        Image.new("L", (width, height)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=f"a.png cannot be read .{width} x {height} pixels: one side is more than"):
            read_image(tmp_path / "a.png")
        with pytest.raises(ValueError, match="one side is more than"):
            center_crop_adm(Image.new("RGB", (width, height)), 256)
    Image.new("L", (100, 1)).save(tmp_path / "a.png")
    assert center_crop_adm(read_image(tmp_path / "a.png"), 64).size == (64, 64)


@pytest.mark.parametrize(
    "error",
    [RuntimeError, MemoryError, struct.error, zlib.error, EOFError, KeyError, IndexError, Image.DecompressionBombError],
)
def test_every_error_of_a_decoder_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def broken(image: Image.Image, background: str) -> None:
        raise error("two\nlines")

    monkeypatch.setattr(images, "to_rgb", broken)
    with pytest.raises(ValueError, match=r"^image \S*a\.png cannot be read \(.*two.*lines.*\); mend or remove it$"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "suffix", [*AVIF, "webp", "png", "jpg", "tif", "gif", "jp2", "ppm", "tga", "ico", "sgi", "pcx", "dds"]
)
def test_damaged_files_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    """Flipped and missing bytes, seeded: an RGB picture or a ValueError that names the file, in one line."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photographs()[0][:32, :32]).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for trial in range(40):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for place in rng.integers(len(damaged), size=1 + trial % 5):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error) and "--on_bad_image" not in str(error)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_image(path)


def test_formats_that_are_not_decoded(tmp_path: Path) -> None:
    """PostScript would start Ghostscript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(ValueError, match="cannot identify"):
        read_image(tmp_path / "a.png")
    assert not {"EPS", "HDF5", "MPEG"} & set(readable_formats())
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"} <= set(
        extensions
    )
    assert not {".eps", ".h5", ".mpg", ".pdf", ".npz"} & set(extensions)
