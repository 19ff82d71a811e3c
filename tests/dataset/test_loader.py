"""dataset/loader.py (SPEC 1, 8): images, cached latents, and an order of samples that no number of processes changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.crop import center_crop_adm
from dataset.latents import CachedLatents
from dataset.loader import GlobalBatchSampler, ImageFolderDataset, build_loader, coin
from tests.helpers import photographs, write_image_folder


@pytest.fixture
def own_images(image_root: Path, tmp_path: Path) -> Path:
    """A copy of the pictures' train folder that a test may spoil."""
    return Path(shutil.copytree(image_root / "train", tmp_path / "train"))


def write_cache(root: Path, classes: int = 2, per_class: int = 3, compressed: bool = False) -> Path:
    """root/<class>/<image>.png.npz as published; `moments` is filled with the sample's number, `moments_flip` with minus that, minus one."""
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            number = np.full((8, 2, 2), c * per_class + i, dtype=np.float32)
            (np.savez_compressed if compressed else np.savez)(
                root / f"class{c}" / f"{i}.png.npz", moments=number, moments_flip=-number - 1
            )
    return root


# ------------------------------------------------------------------------------------------------------- images


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
    """The next readable image stands in, with its own label, so that batches keep their size; from the end it goes round."""
    for name in ("china/05.png", "flower/00.png", "flower/05.png"):
        (own_images / name).write_bytes(b"not a picture")
    data = ImageFolderDataset(own_images, img_size=64, flip=False, on_bad_image="skip")
    for _ in range(2):
        image, label = data[5]
        assert label == 1 and torch.equal(image, data[7][0])
        assert torch.equal(data[11][0], data[0][0]) and data[11][1] == 0
    assert data.bad_images == len(messages) == 3
    for i, (line, name) in enumerate(zip(messages, ("china/05.png", "flower/00.png", "flower/05.png"), strict=True)):
        assert line.startswith(f"skipped bad image {i + 1}: ") and name in line


def test_only_bad_images(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="not one image can be read"):
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
    with pytest.raises(ValueError, match="--on_bad_image 'ignore' is not one of error, skip"):
        ImageFolderDataset(image_root / "train", 64, on_bad_image="ignore")


def test_an_empty_class_keeps_its_number(own_images):
    """Labels must not shift because one class has no pictures yet."""
    (own_images / "dog").mkdir()
    data = ImageFolderDataset(own_images, 64)
    assert data.classes == ["china", "dog", "flower"] and sorted(set(data.labels)) == [0, 2]


# ------------------------------------------------------------------------------------------------------- cached latents


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


# ------------------------------------------------------------------------------------------------------- order


def job(
    world: int, batch: int, samples: int = 30, epoch: int = 0, start: int = 0, seed: int = 7
) -> list[list[tuple[int, int]]]:
    """What all ranks see at each step, in rank order."""
    ranks = []
    for rank in range(world):
        sampler = GlobalBatchSampler(samples, batch, rank, world, seed)
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
    return [[pair for part in step for pair in part] for step in zip(*ranks, strict=True)]


def test_no_number_of_processes_changes_the_order():
    assert job(1, 4) == job(2, 2) == job(4, 1)
    assert job(1, 4, epoch=3) == job(4, 1, epoch=3)
    assert len(job(1, 4)) == 7 and all(len(step) == 4 for step in job(1, 4))  # 30 = 7 * 4 + 2 left over


def test_an_epoch_sees_every_sample_once_and_each_epoch_anew():
    first, second = ([number for step in job(2, 5, epoch=epoch) for number, _ in step] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second and first != list(range(30))
    seeds = [seed for epoch in range(3) for step in job(2, 5, epoch=epoch) for _, seed in step]
    assert len(set(seeds)) == 90  # flips are drawn anew in every epoch
    assert job(2, 5) == job(2, 5) and job(2, 5) != job(2, 5, seed=8)


def test_shuffling_is_uniform():
    """Where sample 0 of 5 lands, over 2,000 epochs: 400 at each place, standard error 18."""
    places = np.bincount(
        [[n for step in job(1, 1, samples=5, epoch=e) for n, _ in step].index(0) for e in range(2000)], minlength=5
    )
    assert abs(places - 400).max() < 75


@pytest.mark.parametrize("start", [0, 1, 5, 7])
def test_start_leaves_out_what_an_interrupted_run_has_seen(start):
    assert job(2, 2, epoch=2, start=start) == job(2, 2, epoch=2)[start:]


def test_start_holds_for_its_epoch_only():
    sampler = GlobalBatchSampler(10, 2, 0, 1, 0)
    sampler.set_epoch(1, 3)
    assert len(list(sampler)) == 2 and len(sampler) == 5
    sampler.set_epoch(2)
    assert len(list(sampler)) == 5


def test_batches_that_are_refused():
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        GlobalBatchSampler(10, 0, 0, 1, 0)
    with pytest.raises(ValueError, match="10 samples, fewer than one global batch of 6 x 2.*--batch_size"):
        GlobalBatchSampler(10, 6, 0, 2, 0)
    with pytest.raises(ValueError, match="--eval_bsz"):
        GlobalBatchSampler(10, 0, 0, 1, 0, flag="--eval_bsz")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_samplers_batches(image_root, num_workers):
    """In its order, with its flips, whatever the number of loader processes; the second epoch too, from a start."""
    data = ImageFolderDataset(image_root / "train", img_size=32)
    sampler = GlobalBatchSampler(len(data), 5, 0, 1, seed=1)
    loader = build_loader(data, sampler, num_workers, pin_memory=True)
    for epoch, start in ((0, 0), (1, 1)):
        sampler.set_epoch(epoch, start)
        expected = list(sampler)
        batches = list(loader)
        assert len(batches) == len(expected) == 2 - start
        for (images, labels), pairs in zip(batches, expected, strict=True):
            assert torch.equal(images, torch.stack([data[pair][0] for pair in pairs]))
            assert labels.tolist() == [data.labels[number] for number, _ in pairs]


def test_an_error_in_a_worker_names_the_file(own_images):
    for path in (own_images / "china").iterdir():
        path.write_bytes(b"no picture")
    data = ImageFolderDataset(own_images, img_size=32)
    loader = build_loader(data, GlobalBatchSampler(len(data), 12, 0, 1, 0), num_workers=1, pin_memory=False)
    with pytest.raises(ValueError, match=r"china/0\d\.png"):
        next(iter(loader))
