"""evaluation/scores.py, store.py, evaluator.py: every image is scored once, resuming, saved images, guards."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.images import read_image
from evaluation import evaluator, metrics, report
from evaluation.evaluator import spread_of_labels, vae_roundtrip
from evaluation.feature_sums import FeatureStatistics, FeatureSums
from evaluation.metrics import METRICS, Metric, Reference, fid, kid, precision_recall
from evaluation.scores import Scores, evaluate, warn_of_flaws
from evaluation.store import EvalStore, batches_of, image_flaws
from generation.pipeline import GenerationSettings
from generation.sample import balanced_labels
from tests.helpers import tiny_model, tiny_vae
from tests.stand_ins import SMALL, FewColours, as_tensor, crops, small_reference

LABELS = balanced_labels(20, range(10))
FIRST_SHARDS = [f"{i:06d}.npz" for i in range(0, 20, 4)]


@pytest.fixture(scope="module")
def images() -> Tensor:
    """The 20 images of the evaluations of this file (20, 3, 64, 64)."""
    return as_tensor(crops(20, 64))


@pytest.fixture
def run(images: Tensor) -> Callable[..., tuple[dict, list[list[int]]]]:
    """run(die_at=None, **options) -> scores of an evaluation in batches of four, and the batches that it generated."""

    def call(die_at: int | None = None, **options: object) -> tuple[dict, list[list[int]]]:
        made: list[list[int]] = []

        def make_images(numbers: range) -> Tensor:
            if len(made) == die_at:
                raise KeyboardInterrupt
            made.append(list(numbers))
            return images[list(numbers)]

        return evaluate(make_images, LABELS, 4, FewColours(), small_reference(), **options), made

    return call


def features_of(images: Tensor) -> dict[str, Tensor]:
    """What a shard holds of these images."""
    return FewColours()(images) | image_flaws(images)


def test_every_image_is_scored_once(run: Callable, images: Tensor) -> None:
    found, statistics, reference = FewColours()(images), FeatureStatistics(SMALL), small_reference()
    statistics.update(found["2048"])
    result, made = run(requested=["fid_infinity"])
    assert made == [list(batch) for batch in batches_of(20, 4)]
    assert result["fid"] == pytest.approx(fid(statistics.as_dict(), reference.pool), rel=1e-9)
    pair = (result["inception_score"], result["inception_score_std"])
    assert pair == pytest.approx(metrics.inception_score(found["logits_unbiased"]), rel=1e-9)
    assert (result["precision"], result["recall"]) == precision_recall(found["2048"], reference.features)
    assert (result["kid"], result["kid_std"]) == pytest.approx(kid(found["2048"], reference.features), rel=1e-6)
    assert math.isfinite(result["fid_infinity"]) and result["sfid"] is None


def test_without_real_features_there_is_no_precision() -> None:
    images = torch.full((12, 3, 32, 32), 7, dtype=torch.uint8)
    sums = Scores(12, small_reference(with_features=False))
    sums.add(range(12), features_of(images))
    result = sums.finish()
    assert result["precision"] is result["recall"] is result["kid"] is result["fid_infinity"] is None
    assert result["near_constant_share"] == 1 and result["fid"] is not None


def test_sfid_needs_its_statistics(images: Tensor) -> None:
    reference = small_reference()
    reference.mu_s, reference.sigma_s = np.zeros(5), np.eye(5)
    sums, statistics = Scores(20, reference), FeatureStatistics(5)
    sums.spatial = FeatureStatistics(5)
    spatial = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (20, 5)))
    statistics.update(spatial)
    sums.add(range(20), features_of(images) | {"spatial": spatial})
    assert sums.finish()["sfid"] == pytest.approx(fid(statistics.as_dict(), reference.spatial), rel=1e-9)


def test_a_metric_is_a_function_and_a_registry_line(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, the printed line, the table and the CSV follow from METRICS."""

    def brightness(generated: FeatureSums, reference: Reference) -> list[float]:
        return [float(generated.pool.mu.mean()), 0.25]

    monkeypatch.setitem(METRICS, "brightness", Metric(brightness, {"brightness": "light", "brightness_std": ""}))
    record, _ = run()
    record |= {"cfg": 1.0, "temperature": 1.0}
    assert record["brightness"] > 0
    assert f"light {record['brightness']:.4g} +- 0.25" in report.scores_in_words(record)
    title, line = report.sweep_table([record]).splitlines()
    assert "light" in title and f"{record['brightness']:.4g}" in line
    report.write_sweep([record], tmp_path)
    assert "brightness,brightness_std" not in (tmp_path / "eval_sweep.csv").read_text()  # titled columns come first
    assert {"brightness", "brightness_std"} <= set((tmp_path / "eval_sweep.csv").read_text().splitlines()[0].split(","))


def test_the_table_marks_the_lowest_fid() -> None:
    empty = dict.fromkeys(metrics.columns())
    pairs = ((1.0, 7.0), (2.0, 3.5), (3.0, 4.0))
    rows = report.sweep_table(
        [empty | dict(cfg=cfg, temperature=1.0, fid=value, inception_score=9.0) for cfg, value in pairs]
    ).splitlines()
    assert [line.endswith("*") for line in rows] == [False, False, True, False] and "3.5" in rows[2]
    assert all(line.split()[4] == "-" for line in rows[1:])


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (20, "2 of each of 10 classes"),
        (23, "2 of each of 10 classes and one more of each of the first 3"),
        (4, "one of each of the first 4 of 10 classes, none of the others"),
    ],
)
def test_labels_that_do_not_divide_are_explained(count: int, words: str) -> None:
    labels = balanced_labels(count, range(10))
    counts = np.bincount(labels, minlength=10)
    assert spread_of_labels(labels, 10) == words and len(labels) == count and max(counts) - min(counts) <= 1


def test_a_second_run_generates_nothing(run: Callable, tmp_path: Path) -> None:
    store = EvalStore(tmp_path, "none")
    (first, _), (again, made) = run(store=store), run(store=store)
    assert not made and again.pop("images_per_s") is None and first.pop("images_per_s") > 0
    assert again == first
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == FIRST_SHARDS


@pytest.mark.parametrize("damage", ["deleted", "truncated", "another size", "a missing array"])
def test_a_lost_shard_costs_its_batch_only(damage: str, run: Callable, tmp_path: Path, messages: list[str]) -> None:
    store = EvalStore(tmp_path, "none")
    first, shard = run(store=store)[0], store.shard(8)
    with np.load(shard) as file:
        arrays = {key: file[key] for key in file.files}
    if damage == "deleted":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "another size":
        np.savez(shard, **{key: value[:2] for key, value in arrays.items()})
    else:
        np.savez(shard, **{key: value for key, value in arrays.items() if key != "spatial"})
    again, made = run(store=store)
    assert again["fid"] == first["fid"] and made == [[8, 9, 10, 11]]
    assert damage == "deleted" or any("000008.npz cannot be used" in line for line in messages)


def test_saved_pngs_are_the_images(run: Callable, images: Tensor, tmp_path: Path) -> None:
    store = EvalStore(tmp_path, "png")
    run(store=store)
    for number, image in enumerate(images):
        assert torch.equal(torch.from_numpy(np.array(read_image(store.picture(number)))), image.permute(1, 2, 0))
    store.picture(13).unlink()  # its features are there, but the image is wanted
    assert run(store=store)[1] == [[12, 13, 14, 15]] and store.picture(13).is_file()


def test_the_archive_is_the_adm_evaluators_format(run: Callable, images: Tensor, tmp_path: Path) -> None:
    """arr_0 uint8 (N, S, S, 3) in image order, labels beside it; the same after an interruption; nothing else stays."""
    store = EvalStore(tmp_path, "npz")
    with pytest.raises(KeyboardInterrupt):
        run(die_at=3, store=store)
    assert not store.archive.exists()
    (tmp_path / "images" / "000004.npy").write_bytes(b"")  # as a power cut can leave it
    assert [batch[0] for batch in run(store=store)[1]] == [4, 12, 16]  # and the two batches that were left
    with np.load(store.archive) as arrays:
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert arrays["arr_1"].tolist() == LABELS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "samples.npz"]
    assert not run(store=store)[1]


def test_an_archive_of_lost_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000000\.npy and 4 more batches are not on this machine") as caught:
        EvalStore(tmp_path, "npz").write_archive(LABELS, 4)
    assert caught.value.argument == "save_images"


def test_flawed_images_are_reported(messages: list[str]) -> None:
    noise = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey, black_and_white = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8), (noise[:1] > 127).to(torch.uint8) * 255
    flaws = image_flaws(torch.cat([noise, grey, black_and_white]))
    assert flaws["near_constant"].tolist() == [False, False, False, True, False]
    assert flaws["saturated"].tolist() == [False, False, False, False, True]
    warn_of_flaws({"near_constant_share": 0.05, "saturated_share": 0.0})
    assert not messages
    warn_of_flaws({"near_constant_share": 0.5, "saturated_share": 0.9})
    assert "50 % of the images show next to nothing" in messages[0]
    assert "90 % of the images are saturated" in messages[1]


def test_the_vae_check_warns_of_a_wrong_scale(
    images: Tensor, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vae()
    monkeypatch.setattr(evaluator, "ROUNDTRIP_PSNR", 0.0)  # random weights reproduce nothing
    latents = vae.encode(images[:8].float() / 127.5 - 1).mode().detach()
    vae.scale_factor = float(1 / latents.std())
    found = vae_roundtrip(vae, images, -5.0, 5.0)
    assert found["latent_std"] == pytest.approx(1, abs=0.01) and found["out_of_range"] < 0.1 and not messages
    vae.scale_factor *= 30
    found = vae_roundtrip(vae, images, -5.0, 5.0)
    assert found["latent_std"] == pytest.approx(30, rel=0.01) and found["out_of_range"] > 0.5
    assert "is --vae_path the model's VAE, and is its scale right?" in messages[0]
    monkeypatch.setattr(evaluator, "ROUNDTRIP_PSNR", 90.0)
    vae.scale_factor /= 30
    vae_roundtrip(vae, images, -5.0, 5.0)
    assert len(messages) == 2


def test_images_are_those_of_the_pipeline(messages: list[str]) -> None:
    """The maker of --evaluate: uint8 images of the model; the VAE is checked with the first of them, once."""
    model, settings = tiny_model(), GenerationSettings(num_iter=1, seed=5, batch_size=4)
    make_images = evaluator.ImageMaker(model, tiny_vae(), LABELS, settings, torch.device("cpu"))
    assert make_images.roundtrip is None
    batch = make_images(range(8, 12))
    assert batch.shape == (4, 3, 64, 64) and batch.dtype == torch.uint8 and make_images.roundtrip["psnr"] > 0
    assert torch.equal(make_images(range(8, 12)), batch)
    assert len([line for line in messages if "does not reproduce" in line]) <= 1
