"""evaluation/metrics.py, feature_sums.py: all scores against SciPy, NumPy and torch-fidelity."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy.linalg import sqrtm
from torch import Tensor
from torch_fidelity import metric_fid, metric_kid, metric_prc
from torch_fidelity.metric_isc import isc_features_to_metric

from evaluation import feature_sums, metrics
from evaluation.feature_sums import FeatureStatistics, InceptionScoreSums
from evaluation.inception import InceptionFeatures, write_random_inception
from evaluation.metrics import fid, fid_infinity, inception_score, kid, precision_recall
from tests.stand_ins import as_tensor, crops, damaged, stats_of, write_folder
from util.dist import float32_precision

CPU = torch.device("cpu")


def random_features(number: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((number, dim)) @ rng.standard_normal((dim, dim)) + shift).astype(np.float32)


def test_statistics_in_batches_are_numpys() -> None:
    x = random_features(101, 24, seed=0, shift=30.0)  # a mean far from 0 is where sums of squares lose digits
    statistics = FeatureStatistics(24)
    for part in torch.from_numpy(x).split(17):
        statistics.update(part)
    np.testing.assert_allclose(statistics.mu, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)
    assert statistics.sigma.dtype == statistics.mu.dtype == np.float64


def test_statistics_merge_sums_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' statistics, here with the other one's sums handed in; test_command.py has two real ones."""
    x = random_features(30, 6, seed=4, shift=100.0)
    mine, other = FeatureStatistics(6), FeatureStatistics(6)
    mine.update(torch.from_numpy(x[:20]))
    other.update(torch.from_numpy(x[20:]))
    mean = torch.from_numpy(x).double().mean(0)
    shift = other.mean - mean
    sums = iter([other.count, other.mean * other.count, other.scatter + other.count * torch.outer(shift, shift)])
    monkeypatch.setattr(feature_sums, "all_reduce_sum", lambda tensor: tensor + next(sums))
    merged = mine.merge()
    assert next(sums, None) is None and merged.count == 30
    np.testing.assert_allclose(merged.mu, x.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_a_process_without_images_merges_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, statistics = random_features(9, 4, seed=5), FeatureStatistics(4)
    statistics.update(torch.from_numpy(x))
    statistics.update(torch.zeros(0, 4))
    np.testing.assert_allclose(statistics.merge().sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    alone = FeatureStatistics(4)
    alone.update(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least two images"):
        _ = alone.merge().sigma


def test_fid_is_the_formula() -> None:
    a, b = stats_of(random_features(200, 16, seed=1)), stats_of(random_features(150, 16, seed=2, shift=0.5))
    difference = a["mu"] - b["mu"]
    expected = difference @ difference + np.trace(a["sigma"] + b["sigma"] - 2 * sqrtm(a["sigma"] @ b["sigma"]).real)
    assert fid(a, b) == pytest.approx(expected, rel=1e-8)
    assert fid(b, a) == pytest.approx(expected, rel=1e-8)


def test_fid_of_two_gaussians_in_closed_form() -> None:
    """Diagonal covariances: the squared distance of the means, and the squared distance of the standard deviations."""
    rng = np.random.default_rng(3)
    (m1, m2), (s1, s2) = rng.standard_normal((2, 12)), rng.uniform(0.2, 3, (2, 12))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert fid({"mu": m1, "sigma": np.diag(s1**2)}, {"mu": m2, "sigma": np.diag(s2**2)}) == pytest.approx(
        expected, rel=1e-9
    )


def test_fid_infinity_removes_the_bias_of_few_images() -> None:
    """Samples of the reference's own Gaussian, whose FID is 0: that of n images is about c/n, which is removed."""
    reference, plain, extrapolated = {"mu": np.zeros(8), "sigma": np.eye(8)}, [], []
    for seed in range(20):
        features = torch.from_numpy(np.random.default_rng(seed).standard_normal((500, 8)).astype(np.float32))
        plain.append(fid(stats_of(features.numpy()), reference))
        extrapolated.append(fid_infinity(features, reference))
    assert np.mean(plain) > 0.03 and abs(np.mean(extrapolated)) < 0.3 * np.mean(plain)
    with pytest.raises(ValueError, match="at least 20 images"):
        fid_infinity(features[:19], reference)


def test_precision_and_recall_of_separated_equal_and_nested_clouds() -> None:
    rng = np.random.default_rng(1)
    cloud, far = (torch.from_numpy(rng.standard_normal((60, 8)).astype(np.float32)) for _ in range(2))
    assert precision_recall(cloud, cloud) == (1.0, 1.0)
    assert precision_recall(cloud, far + 100) == (0.0, 0.0)
    mixed = torch.cat([cloud, cloud + 100])  # all generated images lie among the real ones, which have a mode more
    assert precision_recall(cloud, mixed) == (1.0, 0.5) and precision_recall(mixed, cloud) == (0.5, 1.0)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(cloud[:3], far)


def test_precision_and_recall_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of rows as in one matrix: the share of points within the third-neighbour balls of the other cloud."""
    monkeypatch.setattr(metrics, "PRC_CHUNK", 7)
    a, b = (torch.from_numpy(random_features(n, 6, seed=n, shift=0.3)).double() for n in (40, 55))

    def share_within(x: Tensor, y: Tensor) -> float:
        radius = torch.cdist(y, y).sort(1).values[:, 3]
        return (torch.cdist(x, y) <= radius).any(1).double().mean().item()

    assert precision_recall(a.float(), b.float()) == pytest.approx((share_within(a, b), share_within(b, a)))


def test_kid_of_equal_and_moved_clouds() -> None:
    """Equal clouds: about 0 (unbiased, so it may be below); moved ones: the MMD of the polynomial kernel."""
    rng = np.random.default_rng(2)
    a, b = (torch.from_numpy(rng.standard_normal((200, 5)).astype(np.float32)) for _ in range(2))
    assert abs(kid(a, b)[0]) < 0.05 and kid(a, b + 1)[0] > 0.5
    x, y = a[:50].double().numpy(), b[:50].double().numpy() + 1

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / 5 + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (50 * 49) for k in (kernel(x, x), kernel(y, y))]
    assert kid(a[:50], b[:50] + 1)[0] == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-4)


def test_inception_score_of_numbered_batches_is_torch_fidelitys() -> None:
    """From sums per split, batches in any order: equal to torch-fidelity's own function on all logits."""
    logits = 3 * torch.randn(53, 1008, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    sums = InceptionScoreSums(53)
    for numbers in (range(40, 53), range(0, 17), range(17, 40)):
        sums.update(numbers, logits[numbers.start : numbers.stop])
    assert sums.merge().score() == pytest.approx(
        (expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-12
    )


def test_inception_score_of_known_logits() -> None:
    uniform = torch.zeros(50, 1008)
    assert inception_score(uniform)[0] == pytest.approx(1.0, abs=1e-9)  # no image says anything about its class
    sure = 100 * torch.eye(1008)[torch.arange(5).repeat(2)]  # five classes, each certain, evenly
    mean, std = inception_score(sure, splits=1)
    assert mean == pytest.approx(5.0, rel=1e-9) and std == 0
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(uniform[:9])


def allowed_tf32() -> set[object]:
    """What the process lets float32 products be rounded to at this moment."""
    convolutions = [
        getattr(torch.backends.cudnn, name).fp32_precision
        for name in ("conv", "rnn")
        if hasattr(torch.backends.cudnn, "conv")
    ]
    return {
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.is_autocast_enabled("cpu"),
        *convolutions,
    }


@pytest.mark.parametrize(
    "score, owner, function",
    [
        (lambda x: fid(stats_of(x.numpy()), stats_of(x.numpy())), metric_fid, "fid_statistics_to_metric"),
        (lambda x: precision_recall(x, x), metric_prc, "prc_features_to_metric"),
        (lambda x: kid(x, x), metric_kid, "kid_features_to_metric"),
        (lambda x: fid_infinity(x, stats_of(x.numpy())), np.linalg, "eigh"),
        (lambda x: inception_score(x), torch.Tensor, "index_add_"),
        (lambda x: FeatureStatistics(4).update(x), torch.Tensor, "addmm_"),
    ],
    ids=["fid", "precision_recall", "kid", "fid_infinity", "inception_score", "statistics"],
)
def test_scores_are_computed_without_tf32(
    score: Callable[[Tensor], object], owner: object, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the process and its autocast allow; afterwards the settings are what they were."""
    original, inside = getattr(owner, function), []

    def recorded(*args: object, **more: object) -> object:
        inside.append(allowed_tf32())
        return original(*args, **more)

    monkeypatch.setattr(owner, function, recorded)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        with torch.autocast("cpu", torch.bfloat16):
            outside = allowed_tf32()
            score(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
            assert allowed_tf32() == outside and "high" in outside
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside and all(one <= {"highest", False, "ieee"} for one in inside), inside


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch below 2.9 has no setting for all backends"
)
def test_tf32_for_all_backends_does_not_reach_the_scores() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with float32_precision(CPU):
            assert allowed_tf32() == {"highest", False, "ieee"}
        assert torch.backends.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.slow
def test_scores_are_torch_fidelitys(tmp_path: Path) -> None:
    """All scores of a small real set equal torch_fidelity.calculate_metrics on the same PNG files."""
    original, weights = as_tensor(crops(12, 40, seed=8)), write_random_inception(tmp_path / "weights.pth")
    changed = damaged(original, 30.0)
    for name, images in (("original", original), ("changed", changed)):
        write_folder(tmp_path / name, images.permute(0, 2, 3, 1).numpy())
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "changed"),
        input2=str(tmp_path / "original"),
        samples_find_deep=True,
        cuda=False,
        batch_size=12,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        kid_subset_size=12,
        verbose=False,
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
        cache=False,
    )
    extractor, in_order = InceptionFeatures(str(weights), CPU), [*range(0, 12, 2), *range(1, 12, 2)]
    real, made = extractor(original[in_order]), extractor(changed[in_order])
    mean, std = inception_score(made["logits_unbiased"])
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-4, abs=1e-6)
    distance = fid(stats_of(made["2048"]), stats_of(real["2048"]))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert kid(made["2048"], real["2048"])[0] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert precision_recall(made["2048"], real["2048"]) == (expected["precision"], expected["recall"])
