"""dataset/folders.py and the published cache of dataset/latents.py: images, labels, latents, refused folders."""

import collections
import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import main_cache
from dataset.encoder_inputs import Source
from dataset.folders import list_folder
from dataset.image_folder import ImageFolderDataset, readable_images, substitutes
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


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_bad_image_is_an_error_that_names_it(own_images, kind):
    path = own_images / "china" / "02.png"
    path.write_bytes({"truncated": path.read_bytes()[:2000], "text": b"not a picture", "empty": b""}[kind])
    data = ImageFolderDataset(own_images, img_size=64)
    assert data[1][1] == 0
    with pytest.raises(ValueError, match="02.png.*skip such images .on_bad_image"):
        data[2]


def test_bad_images_are_skipped_named_once_and_counted(own_images, messages):
    """Another image replaces it, with its own label: the same one for the same number or seed."""
    names = ("china/05.png", "flower/00.png", "flower/05.png")
    for name in names:
        (own_images / name).write_bytes(b"not a picture")
    data = ImageFolderDataset(own_images, img_size=64, flip=False, on_bad_image="skip")
    good = [data.load(i) for i in range(12) if i not in (5, 6, 11)]
    for index in (5, 6, 11, (5, 1), (5, 2)):
        image, label = data[index]
        assert torch.equal(image, data[index][0]) and label == data[index][1]
        assert [torch.equal(image, x) for x in good].count(True) == 1
    skipped = [line for line in messages if line.startswith("skipped bad image")]
    assert len(data.bad.paths) == len(skipped) == 3
    assert all(sum(name in line for line in skipped) == 1 for name in names)
    assert [line.split(":")[0] for line in skipped] == [f"skipped bad image {i}" for i in (1, 2, 3)]


def test_substitutes_are_spread_over_the_whole_set(own_images):
    """A run of bad images: every good one replaces them equally often, whatever its place and class.

    Of 600 draws each of 8 images expects 75 with a standard deviation of 8.1.
    """
    for name in ("02", "03", "04", "05"):
        (own_images / "china" / f"{name}.png").write_bytes(b"not a picture")
    data = ImageFolderDataset(own_images, img_size=16, flip=False, on_bad_image="skip")
    good = {data.load(i).numpy().tobytes(): i for i in range(12) if i not in (2, 3, 4, 5)}
    counts = collections.Counter()
    for seed in range(600):
        image, label = data[2 + seed % 4, seed]
        number = good[image.numpy().tobytes()]
        assert label == data.labels[number]
        counts[number] += 1
    assert len(counts) == 8 and min(counts.values()) > 45 and max(counts.values()) < 105


def test_a_machine_without_file_descriptors_makes_no_bad_images(own_images, monkeypatch):
    """Nor does the cache count them as corrupt."""
    data = ImageFolderDataset(own_images, 16, on_bad_image="skip")
    source = Source(data.folder, lambda path, number: data.load(number))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    for call in (lambda: data[0], lambda: list(readable_images(data, [0], 1)), lambda: source[0]):
        with pytest.raises(OSError, match="Too many open files"):
            call()
    assert not data.bad.paths


def test_measurements_leave_bad_images_out(own_images):
    """Each readable image once, in order, none instead of a bad one: for vae_stats, main_vae and reconstruction."""
    for name in ("china/01.png", "flower/05.png"):
        (own_images / name).write_bytes(b"not a picture")
    data, bad = ImageFolderDataset(own_images, 16, on_bad_image="skip"), []
    batches = list(readable_images(data, range(12), 5, bad=bad))
    numbers = [number for _, found in batches for number in found]
    assert bad == [1, 11] and numbers == [i for i in range(12) if i not in bad]
    assert all(torch.equal(x, data.load(n)) for images, found in batches for x, n in zip(images, found, strict=True))
    with pytest.raises(ValueError, match="none of its images can be read"):
        list(readable_images(data, [1, 11], 5))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 30, 97])
def test_substitutes_visit_every_image_once(count):
    assert all(sorted(substitutes(seed, count)) == list(range(count)) for seed in range(50))


def test_only_bad_images(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of its images can be read"):
        ImageFolderDataset(tmp_path, 64, on_bad_image="skip")[1]


def test_folders_that_are_refused(tmp_path, image_root):
    with pytest.raises(FileNotFoundError, match="no folder.*absent.*data_path"):
        ImageFolderDataset(tmp_path / "absent", 64)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").touch()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        ImageFolderDataset(tmp_path / "flat", 64)
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="image_dir.*no image files"):
        ImageFolderDataset(tmp_path / "hollow", 64, argument="image_dir")
    with pytest.raises(ValueError, match="2 class folders, more than 1 .class_num"):
        ImageFolderDataset(image_root / "train", 64, class_num=1)
    assert ImageFolderDataset(image_root / "train", 64, class_num=2).classes == ["china", "flower"]
    with pytest.raises(ValueError, match="on_bad_image 'ignore' is not one of error, skip"):
        ImageFolderDataset(image_root / "train", 64, on_bad_image="ignore")


def test_order_is_torchvisions(own_images):
    """Paths, labels and classes of an ordinary data set: as the published code lists them."""
    for folder in ("china/b", "china/a-b", "china/a", "flower/x/y"):
        (own_images / folder).mkdir(parents=True)
        shutil.copy(own_images / "china" / "00.png", own_images / folder / "10.PNG")
    theirs, ours = ImageFolder(str(own_images)), list_folder(own_images)
    assert ours.samples == theirs.samples and ours.classes == theirs.classes and len(ours.samples) == 16


def test_what_a_listing_leaves_out(own_images, messages):
    """Hidden, loose and other files, pipes, broken links and empty classes are counted in one line, and shift no
    label.
    """
    before = list_folder(own_images)
    for name in (".ipynb_checkpoints", "china/.ipynb_checkpoints"):
        shutil.copytree(own_images / "flower", own_images / name)
    shutil.copy(own_images / "china" / "00.png", own_images / "china" / "._00.png")
    shutil.copy(own_images / "china" / "00.png", own_images / "loose.png")
    (own_images / "anemone").mkdir()
    (own_images / "texts").mkdir()
    (own_images / "texts" / "a.txt").touch()
    os.mkfifo(own_images / "china" / "pipe.png")
    (own_images / "china" / "gone.png").symlink_to("absent.png")
    (own_images / "china" / "folder.png").mkdir()
    after = list_folder(own_images, class_num=2)
    assert after.samples == before.samples and after.classes == before.classes
    assert len(messages) == 2 and messages[0].endswith("train: 12 images in 2 classes")
    assert "12 images in 2 classes; left out: 3 hidden (.ipynb_checkpoints, " in messages[1]
    for part in ("2 no regular files (china/gone.png, china/pipe.png)", "1 of other types (texts/a.txt)"):
        assert part in messages[1]
    for part in ("2 empty class folders (anemone, texts)", "1 beside the class folders (loose.png)"):
        assert part in messages[1]


def test_every_format_that_pillow_reads_is_listed(own_images):
    for i, suffix in enumerate(
        ("avif" if "AVIF" in Image.SAVE else "png", "jfif", "gif", "webp", "tga", "JPEG", "jp2", "bmp", "tif")
    ):
        Image.fromarray(photographs()[0][:20, :20]).save(own_images / "flower" / f"z{i}.{suffix}")
    Image.fromarray(photographs()[0]).convert("L").save(own_images / "flower" / "z9.jpg")
    (own_images / "flower" / "z.h5").touch()
    data = ImageFolderDataset(own_images, 16)
    assert len(data) == 22 and all(data[i][0].shape == (3, 16, 16) for i in range(12, 22))


def test_links_are_followed_without_loops(own_images, tmp_path):
    """Two links to the folder itself, to its parent and to a listed folder add nothing; one to other pictures does."""
    before = list_folder(own_images)
    (own_images / "china" / "deep").mkdir()
    shutil.move(own_images / "china" / "05.png", own_images / "china" / "deep" / "05.png")
    for name, target in (("l1", "."), ("l2", "."), ("up", ".."), ("again", "deep"), ("deep/back", "..")):
        (own_images / "china" / name).symlink_to(target, target_is_directory=True)
    listed = list_folder(own_images)
    assert len(listed.samples) == len(before.samples) and "china/deep/05.png" in listed.paths
    shutil.move(own_images / "flower", tmp_path / "elsewhere")
    (own_images / "flower").symlink_to(tmp_path / "elsewhere")
    (own_images / "china" / "06.png").symlink_to(tmp_path / "elsewhere" / "00.png")
    linked = list_folder(own_images)
    assert linked.classes == before.classes and linked.labels == [0] * 7 + [1] * 6
    (own_images / "self").symlink_to("self")
    assert list_folder(own_images).classes == before.classes


@pytest.mark.parametrize("children", [("train", "val"), ("train",), ("Test", "training", "valid")])
def test_parts_of_a_data_set_are_no_classes(image_root, tmp_path, children):
    for name in children:
        shutil.copytree(image_root / "train", tmp_path / name)
    part = "train" if "train" in children else "Test"
    for flat in (False, True):
        with pytest.raises(ValueError, match=rf"\(image_dir\) holds .*not classes; .* the class folders, .*/{part}$"):
            list_folder(tmp_path, argument="image_dir", allow_flat=flat)
    (tmp_path / "car").mkdir()
    shutil.copy(image_root / "train" / "china" / "00.png", tmp_path / "car")
    assert list_folder(tmp_path).classes == sorted([*children, "car"])


def test_flat_folders_and_class_folders_for_statistics(own_images, messages):
    """Without class folders all files count; with them the same ones as in training."""
    flat = list_folder(own_images / "china", allow_flat=True)
    assert flat.classes == [""] and flat.paths == [f"{i:02d}.png" for i in range(6)]
    shutil.copy(own_images / "china" / "00.png", own_images / "loose.png")
    assert list_folder(own_images, allow_flat=True).samples == list_folder(own_images).samples


def test_an_empty_class_of_a_recorded_cache_keeps_its_number(tmp_path):
    """A class without a readable image has a folder and no files."""
    root = write_cache(tmp_path)
    (root / "class0b").mkdir()
    assert CachedLatents(root).labels == [0, 0, 0, 1, 1, 1]
    record = dict(format="npz", complete=True, img_size=16, classes=["class0", "class0b", "class1"], images=6)
    (root / "cache.json").write_text(json.dumps(record))
    data = CachedLatents(root)
    assert data.classes == record["classes"] and data.labels == [0, 0, 0, 2, 2, 2]


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
    """The last file is spoilt; the others load. Of a small cache it is found at the start."""
    write_cache(tmp_path, compressed=kind == "flipped bits")
    path = tmp_path / "class1" / "2.png.npz"
    content, zeros, buffer = path.read_bytes(), np.zeros((8, 2, 2)), io.BytesIO()
    np.save(buffer, zeros)
    contents = {"truncated": content[: len(content) // 2], "text": b"not an archive", "empty": b""}
    contents |= {"array": buffer.getvalue()}
    contents |= {"flipped bits": content[:60] + bytes(b ^ 0xFF for b in content[60:90]) + content[90:]}
    arrays = {
        "no key": dict(latents=zeros),
        "nan": dict(moments=zeros + np.nan, moments_flip=zeros),
        "objects": dict(moments=np.array([{}], dtype=object)),
        "other shape": dict(moments=np.zeros((8, 4, 4)), moments_flip=np.zeros((8, 4, 4))),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        np.savez(path, **arrays[kind])
    with pytest.raises(ValueError, match=r"2\.png\.npz.*cached_path"):
        CachedLatents(tmp_path)
    data = CachedLatents(tmp_path, probed=1)
    assert data[4][1] == 1
    with pytest.raises(ValueError, match=r"2\.png\.npz.*cached_path"):
        data[5]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_caches_of_other_writers(tmp_path, dtype):
    """Other floating types are read; without moments_flip only with flip off, which is said at the start."""
    for number in range(2):
        (tmp_path / f"class{number}").mkdir()
        np.savez(tmp_path / f"class{number}" / "0.png.npz", moments=np.full((8, 2, 2), number + 0.5, dtype))
    with pytest.raises(ValueError, match=r"0\.png\.npz \(cached_path\) have no array moments_flip; .*no_flip"):
        CachedLatents(tmp_path)
    data = CachedLatents(tmp_path, flip=False)
    assert data[1, 7][0].dtype == torch.float32 and data[1, 7][0].unique().tolist() == [1.5]
    assert main_cache.verify(tmp_path).startswith(f"{tmp_path}: 2 images")
    for bad in (np.full((8, 2, 2), 3), np.full((8, 2, 2), 1e300), np.zeros((1, 8, 2, 2)), np.zeros((8, 2, 2), complex)):
        np.savez(tmp_path / "class1" / "0.png.npz", moments=bad)
        with pytest.raises(ValueError, match=r"class1/0\.png\.npz .*(numbers|infinite|shape)"):
            CachedLatents(tmp_path, flip=False)


def test_cache_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cached_path. is needed"):
        CachedLatents("")
    with pytest.raises(FileNotFoundError, match="cached_path"):
        CachedLatents(tmp_path / "absent")
    write_image_folder(tmp_path / "pictures", per_class=1)
    with pytest.raises(FileNotFoundError, match="no npz files"):
        CachedLatents(tmp_path / "pictures" / "train")
    with pytest.raises(ValueError, match="3 class folders, more than 2 .class_num"):
        CachedLatents(write_cache(tmp_path / "cache", classes=3), class_num=2)
