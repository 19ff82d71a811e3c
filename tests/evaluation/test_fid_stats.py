"""evaluation/reference.py: reference statistics from files, folders and archives of images; what is refused; one process and two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import reference as fid_stats
from evaluation.metrics import FEATURE_DIM, SPATIAL_DIM
from evaluation.reference import (
    Reference,
    UintImages,
    load_reference,
    load_reference_stats,
    load_references,
    main,
    make_reference,
    npz_batches,
)
from tests.helpers import Explosive, photographs, run_processes

SIZE = 24


class Colours:
    """A stand-in extractor with the real one's shapes: block means of an image, repeated; no weights needed."""

    sha256 = "stand-in"

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 64  # (B, 48)
        return {
            "2048": blocks.repeat(1, 43)[:, :FEATURE_DIM],
            "spatial": blocks.repeat(1, 43)[:, :SPATIAL_DIM],
            "logits_unbiased": blocks.repeat(1, 21),
        }


def crops(count: int, size: int = SIZE) -> np.ndarray:
    """uint8 (N, S, S, 3) of the photographs."""
    rng, photos = np.random.default_rng(0), photographs()
    return np.stack(
        [
            photos[i % 2][y : y + size, x : x + size]
            for i, (y, x) in enumerate(zip(rng.integers(400, size=count), rng.integers(600, size=count), strict=True))
        ]
    )


def write_folder(folder: Path, images: np.ndarray) -> Path:
    for i, image in enumerate(images):
        path = folder / str(i % 2) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_stats(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def adm(dim: int = FEATURE_DIM, spatial: int = SPATIAL_DIM) -> dict[str, np.ndarray]:
    """Arrays with the names and sizes of ADM's file, cheap to write."""
    return {
        "mu": np.zeros(dim, np.float32),
        "sigma": np.broadcast_to(np.float32(0), (dim, dim)),
        "mu_s": np.zeros(spatial, np.float32),
        "sigma_s": np.broadcast_to(np.float32(0), (spatial, spatial)),
    }


# ------------------------------------------------------------------------------------------------------------- making


def test_folder_and_archive_give_the_same_statistics(tmp_path: Path) -> None:
    """numpy's mean and covariance of the features of all images, whatever the batch size; features of the first images are kept."""
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
        torch.testing.assert_close(reference.features, features[:5])
        assert (reference.num_images, reference.img_size, reference.crop) == (
            11,
            SIZE,
            "none",
        ) and reference.mu_s.shape == (SPATIAL_DIM,)
    assert make_reference(folder, Colours(), img_size=16, num_images=6).crop == "adm"


def test_an_archive_is_read_as_a_stream(tmp_path: Path) -> None:
    images = crops(10)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, arr_0=images)
    found = list(npz_batches(path, 4, 10))
    assert [len(part) for part in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_a_saved_reference_comes_back(tmp_path: Path) -> None:
    reference = make_reference(write_folder(tmp_path / "p", crops(6)), Colours(), img_size=SIZE, keep_features=4)
    fid_stats.save_reference(tmp_path / "s.npz", reference)
    again = load_reference(tmp_path / "s.npz", Colours(), SIZE)
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reference, name))
    assert torch.equal(again.features, reference.features)
    assert (again.img_size, again.crop, again.num_images, again.inception_sha256) == (SIZE, "adm", 6, "stand-in")


def test_adms_kinds_of_file(tmp_path: Path) -> None:
    """Statistics alone; statistics of everything together with some images, whose features then serve precision and recall; images alone."""
    plain = load_reference(write_stats(tmp_path / "stats.npz", **adm()), Colours(), SIZE)
    assert (
        plain.mu.dtype == plain.sigma_s.dtype == np.float64
        and plain.features is None
        and plain.spatial["mu"].shape == (SPATIAL_DIM,)
    )
    only = load_reference_stats(write_stats(tmp_path / "two.npz", mu=np.arange(8.0), sigma=np.eye(8)), dim=8)
    assert only.spatial is None and only.pool["mu"].tolist() == list(range(8))
    images = crops(5)
    batch = load_reference(write_stats(tmp_path / "batch.npz", arr_0=images, **adm()), Colours(), SIZE)
    assert batch.features.shape == (5, FEATURE_DIM) and not batch.mu.any()
    alone = load_reference(write_stats(tmp_path / "images.npz", arr_0=images), Colours(), SIZE)
    torch.testing.assert_close(alone.features, batch.features)
    np.testing.assert_allclose(alone.mu, batch.features.double().numpy().mean(0), rtol=1e-6)


def test_adms_batch_beside_other_statistics(tmp_path: Path) -> None:
    """--pr_reference gives the features for precision and recall, and nothing else; the batch alone, as --fid_stats,
    gives everything.
    """
    stats = write_stats(tmp_path / "stats.npz", **adm())
    labelled = adm() | {"mu": np.full(FEATURE_DIM, 2, np.float32), "arr_0": crops(5), "arr_1": np.arange(5)}
    batch = write_stats(tmp_path / "VIRTUAL_labeled.npz", **labelled)
    both, one = load_references(stats, batch, Colours(), SIZE), load_references(batch, None, Colours(), SIZE)
    expected = Colours()(torch.from_numpy(crops(5)).permute(0, 3, 1, 2))["2048"]
    torch.testing.assert_close(both.features, expected)
    torch.testing.assert_close(one.features, expected)
    assert not both.mu.any() and (one.mu == 2).all() and one.spatial["mu"].shape == (SPATIAL_DIM,)
    assert load_references(stats, None, Colours(), SIZE).features is None
    fid_stats.save_reference(
        tmp_path / "mine.npz",
        make_reference(write_folder(tmp_path / "p", crops(6)), Colours(), img_size=SIZE, keep_features=4),
    )
    assert len(load_references(batch, tmp_path / "mine.npz", Colours(), SIZE).features) == 4
    with pytest.raises(
        ValueError,
        match=r"stats\.npz \(--pr_reference\) holds neither images \(arr_0\) nor features.*util\.download adm_batch",
    ):
        load_references(batch, stats, Colours(), SIZE)
    with pytest.raises(FileNotFoundError, match=r"none\.npz \(--pr_reference\).*adm_batch"):
        load_references(stats, tmp_path / "none.npz", Colours(), SIZE)


# ------------------------------------------------------------------------------------------------------------- refusing


def test_bad_statistics_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npz \(--fid_stats\).*util\.fid_stats"):
        load_reference_stats(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="no array sigma, only mu"):
        load_reference_stats(write_stats(tmp_path / "half.npz", mu=np.zeros(FEATURE_DIM)))
    with pytest.raises(ValueError, match="only one of mu_s and sigma_s"):
        load_reference_stats(
            write_stats(tmp_path / "third.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(4)), dim=4
        )
    with pytest.raises(ValueError, match=r"mu \(4,\), sigma \(4, 4\); expected \(2048,\)"):
        load_reference_stats(write_stats(tmp_path / "small.npz", mu=np.zeros(4), sigma=np.eye(4)))
    with pytest.raises(ValueError, match=r"mu_s \(5,\), sigma_s \(5, 5\); expected \(2023,\)"):
        load_reference_stats(
            write_stats(tmp_path / "spatial.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(5), sigma_s=np.eye(5)),
            dim=4,
        )
    with pytest.raises(ValueError, match=r"features \(3, 5\), expected \(N, 4\)"):
        load_reference_stats(
            write_stats(tmp_path / "features.npz", mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((3, 5))), dim=4
        )
    with pytest.raises(ValueError, match="sigma holds NaN"):
        load_reference_stats(write_stats(tmp_path / "nan.npz", mu=np.zeros(4), sigma=np.eye(4) * np.nan), dim=4)
    cut = write_stats(tmp_path / "cut.npz", mu=np.zeros(64), sigma=np.eye(64))
    cut.write_bytes(cut.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut\.npz \(--other\) is not a file of FID statistics"):
        load_reference_stats(cut, flag="--other")
    with pytest.raises(ValueError, match="not a file of FID statistics"):
        load_reference_stats(
            write_stats(
                tmp_path / "code.npz", mu=np.array([Explosive(tmp_path / "ran")], dtype=object), sigma=np.eye(1)
            ),
            dim=1,
        )
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
        load_reference(write_stats(tmp_path / "s.npz", **adm(), **extra), Colours(), size)


def test_adms_file_is_for_its_size_only(tmp_path: Path, messages: list[str]) -> None:
    path = write_stats(tmp_path / "adm_in256_stats.npz", **adm())
    assert isinstance(load_reference(path, Colours(), 256), Reference) and any(
        "taken on trust" in line for line in messages
    )
    with pytest.raises(ValueError, match="is of images of 256 pixels, the model makes 64"):
        load_reference(path, Colours(), 64)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty \(--data_path\) holds no images"):
        make_reference(tmp_path / "empty", Colours(), img_size=SIZE)
    with pytest.raises(ValueError, match="holds 1 image"):
        make_reference(write_folder(tmp_path / "one", crops(1)), Colours(), img_size=SIZE)
    mixed = write_folder(tmp_path / "mixed", crops(4))
    Image.fromarray(crops(1, size=30)[0]).save(mixed / "1" / "999.png")
    with pytest.raises(
        ValueError, match=r"999\.png is 30 x 30 pixels, expected 24 x 24 as the others; mixed sizes need --crop adm"
    ):
        make_reference(mixed, Colours(), img_size=None, crop="none")
    assert make_reference(mixed, Colours(), img_size=SIZE).num_images == 5
    assert UintImages([mixed / "1" / "999.png"], SIZE, "adm")[0].shape == (3, SIZE, SIZE)
    (mixed / "0" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000\.png cannot be read"):
        make_reference(mixed, Colours(), img_size=SIZE)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "x.txt"], "must end with .npz"),
        (["--out", "x.npz", "--num_images", "1"], "--num_images must be at least 2"),
        (["--out", "/proc/x/y.npz"], r"cannot write to /proc/x \(--out\)"),
        (["--out", "x.npz", "--data_path", "/nowhere"], r"no /nowhere \(--data_path\)"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        main(["--data_path", str(tmp_path), "--device", "cpu", *flags])


def test_an_archive_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(--data_path\) holds no array arr_0 of images"):
        make_reference(write_stats(tmp_path / "x.npz", other=np.zeros(3)), Colours(), img_size=SIZE)


TWO = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from tests.evaluation.test_fid_stats import Colours, SIZE
from util import dist
from evaluation.reference import make_reference, save_reference
dist.init("cpu")
made = make_reference(sys.argv[1], Colours(), img_size=SIZE, keep_features=7, batch_size=3)
print(f"features {len(made.features)}\\n", end="", flush=True)
if dist.is_main():
    save_reference(sys.argv[2], made)
dist.shutdown()
"""


@pytest.mark.slow
def test_two_processes_make_the_same_statistics(tmp_path: Path) -> None:
    folder, script = write_folder(tmp_path / "p", crops(13)), tmp_path / "two.py"
    script.write_text(TWO)
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
