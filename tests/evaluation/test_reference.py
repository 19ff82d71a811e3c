"""evaluation/reference.py: references from files, folders and archives of images; one process and two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.image_source import ImageFiles, npz_batches, open_images
from evaluation.inception import FEATURE_DIM, SPATIAL_DIM
from evaluation.metrics import Reference
from evaluation.reference import load_reference, load_reference_stats, load_references, make_reference, save_reference
from tests.helpers import REPO, Explosive
from tests.processes.forked import run_processes
from tests.stand_ins import Colours, adm_arrays, crops, write_folder, write_stats
from tools.fid_stats import main

SIZE = 24


def test_folder_and_archive_give_the_same_statistics(tmp_path: Path) -> None:
    """numpy's mean and covariance of all features, whatever the batch size; features of evenly spaced images."""
    images = crops(11)
    folder = write_folder(tmp_path / "pictures", images)
    in_order = np.concatenate([images[0::2], images[1::2]])  # sorted by path: class 0, then class 1
    archive = write_stats(tmp_path / "pictures.npz", arr_0=in_order)
    features = Colours()(torch.from_numpy(in_order).permute(0, 3, 1, 2))["2048"]
    a = make_reference(folder, Colours(), img_size=SIZE, crop="none", keep_features=5, batch_size=4)
    b = make_reference(archive, Colours(), img_size=SIZE, keep_features=5, batch_size=3)
    for reference in (a, b):
        np.testing.assert_allclose(reference.mu, features.double().numpy().mean(0), rtol=1e-6)
        np.testing.assert_allclose(reference.sigma, np.cov(features.double().numpy(), rowvar=False), atol=1e-9)
        torch.testing.assert_close(reference.features, features[[0, 2, 4, 6, 8]])
        assert (reference.num_images, reference.img_size, reference.crop) == (
            11,
            SIZE,
            "none",
        ) and reference.mu_s.shape == (SPATIAL_DIM,)
    assert make_reference(folder, Colours(), img_size=16, num_images=6).crop == "adm"


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_part_of_the_images_is_spread_over_the_classes(tmp_path: Path, kind: str) -> None:
    """4 of 11 images, of which class 0 has six: numbers 0, 2, 5 and 8 of the sorted list; the file records it."""
    images = crops(11)
    in_order = np.concatenate([images[0::2], images[1::2]])
    source = write_folder(tmp_path / "pictures", images)
    if kind == "archive":
        source = write_stats(tmp_path / "pictures.npz", arr_0=in_order)
    features = Colours()(torch.from_numpy(in_order[[0, 2, 5, 8]]).permute(0, 3, 1, 2))["2048"]
    settings = dict(img_size=SIZE, num_images=4, keep_features=2, batch_size=3)
    part = make_reference(source, Colours(), **settings)
    np.testing.assert_allclose(part.mu, features.double().numpy().mean(0), rtol=1e-6)
    torch.testing.assert_close(part.features, features[[0, 2]])
    save_reference(tmp_path / "s.npz", part)
    again = load_reference_stats(tmp_path / "s.npz")
    assert (again.num_images, again.num_available, again.selection) == (4, 11, "evenly spaced")


def test_an_archive_is_read_as_a_stream(tmp_path: Path) -> None:
    images = crops(10)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, arr_0=images)
    found = list(npz_batches(path, [range(4), range(4, 8), range(8, 10)]))
    assert [len(part) for part in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), torch.from_numpy(images).permute(0, 3, 1, 2))
    (some,) = npz_batches(path, [[1, 5, 9]])
    assert torch.equal(some, torch.from_numpy(images[[1, 5, 9]]).permute(0, 3, 1, 2))


def test_a_saved_reference_comes_back(tmp_path: Path) -> None:
    reference = make_reference(write_folder(tmp_path / "p", crops(6)), Colours(), img_size=SIZE, keep_features=4)
    save_reference(tmp_path / "s.npz", reference)
    again = load_reference(tmp_path / "s.npz", Colours(), SIZE)
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reference, name))
    assert torch.equal(again.features, reference.features)
    assert (again.img_size, again.crop, again.num_images, again.inception_sha256) == (SIZE, "adm", 6, "stand-in")


def test_adms_kinds_of_file(tmp_path: Path) -> None:
    """Statistics alone; statistics with some images, whose features serve precision and recall; images alone."""
    plain = load_reference(write_stats(tmp_path / "stats.npz", **adm_arrays()), Colours(), SIZE)
    assert (
        plain.mu.dtype == plain.sigma_s.dtype == np.float64
        and plain.features is None
        and plain.spatial["mu"].shape == (SPATIAL_DIM,)
    )
    only = load_reference_stats(write_stats(tmp_path / "two.npz", mu=np.arange(8.0), sigma=np.eye(8)), dim=8)
    assert only.spatial is None and only.pool["mu"].tolist() == list(range(8))
    images = crops(5)
    batch = load_reference(write_stats(tmp_path / "batch.npz", arr_0=images, **adm_arrays()), Colours(), SIZE)
    assert batch.features.shape == (5, FEATURE_DIM) and not batch.mu.any()
    alone = load_reference(write_stats(tmp_path / "images.npz", arr_0=images), Colours(), SIZE)
    torch.testing.assert_close(alone.features, batch.features)
    np.testing.assert_allclose(alone.mu, batch.features.double().numpy().mean(0), rtol=1e-6)


def test_adms_batch_beside_other_statistics(tmp_path: Path) -> None:
    """--pr_reference gives the features for precision and recall, and nothing else; the batch alone, as --fid_stats,
    gives everything.
    """
    stats = write_stats(tmp_path / "stats.npz", **adm_arrays())
    labelled = adm_arrays() | {"mu": np.full(FEATURE_DIM, 2, np.float32), "arr_0": crops(5), "arr_1": np.arange(5)}
    batch = write_stats(tmp_path / "VIRTUAL_labeled.npz", **labelled)
    both, one = load_references(stats, batch, Colours(), SIZE), load_references(batch, None, Colours(), SIZE)
    expected = Colours()(torch.from_numpy(crops(5)).permute(0, 3, 1, 2))["2048"]
    torch.testing.assert_close(both.features, expected)
    torch.testing.assert_close(one.features, expected)
    assert not both.mu.any() and (one.mu == 2).all() and one.spatial["mu"].shape == (SPATIAL_DIM,)
    assert load_references(stats, None, Colours(), SIZE).features is None
    save_reference(
        tmp_path / "mine.npz",
        make_reference(write_folder(tmp_path / "p", crops(6)), Colours(), img_size=SIZE, keep_features=4),
    )
    assert len(load_references(batch, tmp_path / "mine.npz", Colours(), SIZE).features) == 4
    with pytest.raises(
        ValueError,
        match=r"stats\.npz \(--pr_reference\) holds neither images \(arr_0\) nor features.*tools\.download adm_batch",
    ):
        load_references(batch, stats, Colours(), SIZE)
    few = write_stats(tmp_path / "few.npz", arr_0=crops(3), **adm_arrays())
    assert load_references(few, None, Colours(), SIZE).features is None  # the other scores need no features
    with pytest.raises(ValueError, match=r"few\.npz \(--pr_reference\) holds neither .*, or fewer than 4"):
        load_references(stats, few, Colours(), SIZE)
    with pytest.raises(FileNotFoundError, match=r"none\.npz \(--pr_reference\).*adm_batch"):
        load_references(stats, tmp_path / "none.npz", Colours(), SIZE)


def small_arrays(**changes: object) -> dict[str, object]:
    """Arrays of a statistics file of four dimensions."""
    return {"mu": np.zeros(4), "sigma": np.eye(4)} | changes


@pytest.mark.parametrize(
    ("arrays", "dim", "message"),
    [
        ({"mu": np.zeros(FEATURE_DIM)}, FEATURE_DIM, "no array sigma, only mu"),
        (small_arrays(mu_s=np.zeros(4)), 4, "only one of mu_s and sigma_s"),
        (small_arrays(), FEATURE_DIM, r"mu \(4,\), sigma \(4, 4\); expected \(2048,\)"),
        (small_arrays(mu_s=np.zeros(5), sigma_s=np.eye(5)), 4, r"mu_s \(5,\), sigma_s \(5, 5\); expected \(2023,\)"),
        (small_arrays(features=np.zeros((3, 5))), 4, r"features \(3, 5\), expected \(N, 4\)"),
        (small_arrays(sigma=np.eye(4) * np.nan), 4, "sigma holds NaN"),
        (small_arrays(features=np.full((5, 4), np.nan)), 4, "features holds NaN"),
        (small_arrays(num_images="many"), 4, "num_images is 'many'"),
    ],
)
def test_bad_statistics(arrays: dict, dim: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"bad\.npz \(--other\).*{message}"):
        load_reference_stats(write_stats(tmp_path / "bad.npz", **arrays), flag="--other", dim=dim)


def test_files_that_hold_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npz \(--fid_stats\).*tools\.fid_stats"):
        load_reference_stats(tmp_path / "none.npz")
    short = write_stats(tmp_path / "short.npz", mu=np.zeros(64), sigma=np.eye(64))
    short.write_bytes(short.read_bytes()[:900])
    code = np.array([Explosive(tmp_path / "ran")], dtype=object)
    for path in (short, write_stats(tmp_path / "code.npz", mu=code, sigma=np.eye(1))):
        with pytest.raises(ValueError, match=rf"{path.name} \(--fid_stats\) is not a file of FID statistics"):
            load_reference_stats(path, dim=1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "extra, size, message",
    [
        (dict(img_size=64), SIZE, "made from images of 64 pixels, the model makes 24"),
        (dict(img_size=SIZE, crop="squeeze"), SIZE, "the crop 'squeeze'"),
        (dict(img_size=SIZE, inception_sha256="another"), SIZE, "made with other Inception weights"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8)), SIZE, "holds images of 8 pixels, the model makes 24"),
        (dict(arr_0=np.zeros((2, 8, 8), np.uint8)), SIZE, r"arr_0 is uint8 \(2, 8, 8\), expected uint8 images"),
        (dict(arr_0=np.zeros((0, 24, 24, 3), np.uint8)), SIZE, r"arr_0 is uint8 \(0, 24, 24, 3\), expected"),
        (dict(arr_0=np.zeros((2, 24, 24, 3), np.float32)), SIZE, "arr_0 is float32"),
    ],
)
def test_references_that_do_not_fit(extra: dict, size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_reference(write_stats(tmp_path / "s.npz", **adm_arrays(), **extra), Colours(), size)


def test_adms_file_is_for_its_size_only(tmp_path: Path, messages: list[str]) -> None:
    path = write_stats(tmp_path / "adm_in256_stats.npz", **adm_arrays())
    assert isinstance(load_reference(path, Colours(), 256), Reference) and any(
        "256 pixels are assumed" in line for line in messages
    )
    with pytest.raises(ValueError, match="made from images of 256 pixels, the model makes 64"):
        load_reference(path, Colours(), 64)


def test_a_folder_of_samples_holds_its_images_only(tmp_path: Path) -> None:
    """grid.png and the unmasking are no images of the model; an interrupted run is refused, a sweep names its parts."""
    folder, images = tmp_path / "samples", crops(5)
    (folder / "steps").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    for extra in ("grid.png", "steps/000000.png"):
        Image.fromarray(crops(1, size=100)[0]).save(folder / extra)
    record = {"labels": [0] * 5, "cfg": 1.0, "complete": True}
    (folder / "samples.json").write_text(json.dumps(record))
    made = make_reference(folder, Colours(), img_size=None, crop="none")
    assert made.num_images == 5 and made.img_size == SIZE
    for change, words in (({"complete": False}, "holds part of 5 images"), ({"cfg": [1, 2]}, "name one of them")):
        (folder / "samples.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=words):
            open_images(folder, img_size=None)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty \(data_path\) holds no images"):
        make_reference(tmp_path / "empty", Colours(), img_size=SIZE)
    with pytest.raises(ValueError, match="holds 1 image"):
        make_reference(write_folder(tmp_path / "one", crops(1)), Colours(), img_size=SIZE)
    mixed = write_folder(tmp_path / "mixed", crops(4))
    Image.fromarray(crops(1, size=30)[0]).save(mixed / "1" / "999.png")
    with pytest.raises(
        ValueError, match=r"999\.png is 30 x 30 pixels, expected 24 x 24 as the others; mixed sizes need the crop adm"
    ):
        make_reference(mixed, Colours(), img_size=None, crop="none")
    assert make_reference(mixed, Colours(), img_size=SIZE).num_images == 5
    assert ImageFiles([mixed / "1" / "999.png"], SIZE, "adm")[0].shape == (3, SIZE, SIZE)
    (mixed / "0" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000\.png cannot be read"):
        make_reference(mixed, Colours(), img_size=SIZE)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "x.txt"], "x.txt must end with .npz"),
        (["--out", "x.npz", "--num_images", "1"], "num_images must be at least 2"),
        (["--out", "/proc/x/y.npz"], "cannot write to /proc/x"),
        (["--out", "x.npz", "--data_path", "/nowhere"], "no /nowhere"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*\({flags[-2]}\)"):
        main(["--data_path", str(tmp_path), "--device", "cpu", *flags])


def test_an_archive_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(--data_path\) holds no array arr_0 of images"):
        make_reference(write_stats(tmp_path / "x.npz", other=np.zeros(3)), Colours(), img_size=SIZE)


@pytest.mark.slow
def test_two_processes_make_the_same_statistics(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "p", crops(13))
    script = REPO / "tests" / "processes" / "make_reference.py"
    result = run_processes([script, folder, tmp_path / "two.npz"], nproc=2, timeout=400)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("features 7") == 2, "every process has them, or knows that there are some"
    one, two = (
        make_reference(folder, Colours(), img_size=SIZE, keep_features=7, batch_size=3),
        load_reference_stats(tmp_path / "two.npz"),
    )
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(two.mu_s, one.mu_s, rtol=1e-12)
    assert torch.equal(two.features, one.features)


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(b"precious")
    (tmp_path / "data").mkdir()
    with pytest.raises(FileExistsError, match=r"mine\.npz \(--out\) is there already: choose another name"):
        main(["--data_path", str(tmp_path / "data"), "--out", str(tmp_path / "mine.npz")])
    assert (tmp_path / "mine.npz").read_bytes() == b"precious"
