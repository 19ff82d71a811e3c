"""dataset/folders.py and the published cache of dataset/latents.py: images, labels, latents, refused folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.folders import ImageFolderDataset
from dataset.images import center_crop_adm
from dataset.latents import CachedLatents
from tests.helpers import photographs, write_image_folder
from util.seeds import coin


def write_cache(root: Path, classes: int = 2, per_class: int = 3, compressed: bool = False) -> Path:
    """root/<class>/<image>.png.npz: `moments` is filled with the sample's number n, `moments_flip` with -n - 1."""
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            number = np.full((8, 2, 2), c * per_class + i, dtype=np.float32)
            (np.savez_compressed if compressed else np.savez)(
                root / f"class{c}" / f"{i}.png.npz", moments=number, moments_flip=-number - 1
            )
    return root


def test_images_and_labels(image_root):
    data = ImageFolderDataset(image_root / "train", img_size=64)
    assert data.classes == ["china", "flower"] and data.labels == [0] * 6 + [1] * 6 and len(data) == 12
    image, label = data[7]
    assert label == 1 and image.shape == (3, 64, 64) and image.dtype == torch.float32
    pixels = np.asarray(center_crop_adm(Image.open(image_root / "train" / "flower" / "01.png"), 64)).astype(np.float64)
    np.testing.assert_allclose(image.numpy(), (pixels / 255 * 2 - 1).transpose(2, 0, 1), rtol=0, atol=1e-6)


def test_images_are_mirrored_by_their_seed_alone(image_root):
    """Half of the seeds mirror left and right; without a seed, or with flip off, none does."""
    data = ImageFolderDataset(image_root / "train", img_size=64)
    plain, _ = data[3]
    mirrored = torch.from_numpy(plain.numpy()[:, :, ::-1].copy())
    assert not torch.equal(plain, mirrored)
    kinds = []
    for seed in range(200):
        image, label = data[3, seed]
        assert label == 0 and (torch.equal(image, plain) or torch.equal(image, mirrored))
        assert torch.equal(image, mirrored) == coin(seed)
        kinds.append(torch.equal(image, mirrored))
    assert 70 < sum(kinds) < 130  # 100 expected, 4.2 standard errors of 7.1
    assert torch.equal(data[3, 0][0], data[3, 0][0])
    never = ImageFolderDataset(image_root / "train", img_size=64, flip=False)
    assert all(torch.equal(never[3, seed][0], plain) for seed in range(20))


def test_other_modes_and_sizes_come_out_alike(own_images):
    photo = photographs()[0]
    Image.fromarray(photo).convert("L").save(own_images / "china" / "grey.jpg")
    Image.fromarray(photo[:40, :30]).convert("RGBA").save(own_images / "china" / "small.webp")
    Image.fromarray(photo).save(own_images / "china" / "LARGE.JPEG")
    (own_images / "china" / "notes.txt").write_text("no picture, no sample")
    data = ImageFolderDataset(own_images, img_size=64)
    assert len(data) == 15 and {data[i][0].shape for i in range(15)} == {(3, 64, 64)}


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_bad_image_is_an_error_that_names_it(own_images, kind):
    path = own_images / "china" / "02.png"
    path.write_bytes({"truncated": path.read_bytes()[:2000], "text": b"not a picture", "empty": b""}[kind])
    data = ImageFolderDataset(own_images, img_size=64)
    assert data[1][1] == 0
    with pytest.raises(ValueError, match="02.png.*--on_bad_image skip"):
        data[2]


def test_bad_images_are_skipped_named_once_and_counted(own_images, messages):
    """The next readable image replaces it, with its own label; after the last image comes the first."""
    for name in ("china/05.png", "flower/00.png", "flower/05.png"):
        (own_images / name).write_bytes(b"not a picture")
    data = ImageFolderDataset(own_images, img_size=64, flip=False, on_bad_image="skip")
    for _ in range(2):
        image, label = data[5]
        assert label == 1 and torch.equal(image, data[7][0])
        assert torch.equal(data[11][0], data[0][0]) and data[11][1] == 0
    assert len(data.bad.paths) == len(messages) == 3
    for i, (line, name) in enumerate(zip(messages, ("china/05.png", "flower/00.png", "flower/05.png"), strict=True)):
        assert line.startswith(f"skipped bad image {i + 1}: ") and name in line


def test_only_bad_images(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of its images can be read"):
        ImageFolderDataset(tmp_path, 64, on_bad_image="skip")[1]


def test_folders_that_are_refused(tmp_path, image_root):
    with pytest.raises(FileNotFoundError, match="no folder.*absent.*--data_path"):
        ImageFolderDataset(tmp_path / "absent", 64)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").touch()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        ImageFolderDataset(tmp_path / "flat", 64)
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="--image_dir.*no .*png"):
        ImageFolderDataset(tmp_path / "hollow", 64, flag="--image_dir")
    with pytest.raises(ValueError, match="2 class folders, more than --class_num 1"):
        ImageFolderDataset(image_root / "train", 64, class_num=1)
    assert ImageFolderDataset(image_root / "train", 64, class_num=2).classes == ["china", "flower"]
    with pytest.raises(ValueError, match="on_bad_image 'ignore' is not one of error, skip"):
        ImageFolderDataset(image_root / "train", 64, on_bad_image="ignore")


def test_an_empty_class_keeps_its_number(own_images):
    """Labels must not shift because one class has no pictures yet."""
    (own_images / "dog").mkdir()
    data = ImageFolderDataset(own_images, 64)
    assert data.classes == ["china", "dog", "flower"] and sorted(set(data.labels)) == [0, 2]


@pytest.mark.parametrize("compressed", [False, True])
def test_cache_as_published(tmp_path, compressed):
    data = CachedLatents(write_cache(tmp_path, compressed=compressed))
    assert data.classes == ["class0", "class1"] and data.labels == [0, 0, 0, 1, 1, 1] and data.shape == (8, 2, 2)
    for i in range(6):
        moments, label = data[i]
        assert (
            label == i // 3 and moments.dtype == torch.float32 and torch.equal(moments, torch.full((8, 2, 2), float(i)))
        )
    kinds = {seed: data[4, seed][0][0, 0, 0].item() for seed in range(200)}
    assert set(kinds.values()) == {4.0, -5.0}
    assert 70 < sum(value < 0 for value in kinds.values()) < 130
    assert all((value < 0) == coin(seed) for seed, value in kinds.items())
    assert {CachedLatents(tmp_path, flip=False)[4, seed][0][0, 0, 0].item() for seed in range(20)} == {4.0}


@pytest.mark.parametrize(
    "kind", ["truncated", "text", "empty", "no key", "array", "nan", "objects", "flipped bits", "other shape"]
)
def test_bad_cache_files_are_named(tmp_path, kind):
    """The last file is spoilt; the others load."""
    write_cache(tmp_path, compressed=kind == "flipped bits")
    path = tmp_path / "class1" / "2.png.npz"
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no key":
        np.savez(path, latents=np.zeros((8, 2, 2)))
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros((8, 2, 2)))
    elif kind == "nan":
        np.savez(path, moments=np.full((8, 2, 2), np.nan), moments_flip=np.zeros((8, 2, 2)))
    elif kind == "objects":
        np.savez(path, moments=np.array([{}], dtype=object))
    elif kind == "flipped bits":
        path.write_bytes(content[:60] + bytes(b ^ 0xFF for b in content[60:90]) + content[90:])
    else:
        np.savez(path, moments=np.zeros((8, 4, 4)), moments_flip=np.zeros((8, 4, 4)))
    data = CachedLatents(tmp_path)
    assert data[4][1] == 1
    with pytest.raises(ValueError, match=r"2\.png\.npz.*--cached_path"):
        data[5]


def test_cache_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give --cached_path"):
        CachedLatents("")
    with pytest.raises(FileNotFoundError, match="--cached_path"):
        CachedLatents(tmp_path / "absent")
    write_image_folder(tmp_path / "pictures", per_class=1)
    with pytest.raises(FileNotFoundError, match="no npz files"):
        CachedLatents(tmp_path / "pictures" / "train")
    with pytest.raises(ValueError, match="3 class folders, more than --class_num 2"):
        CachedLatents(write_cache(tmp_path / "cache", classes=3), class_num=2)
