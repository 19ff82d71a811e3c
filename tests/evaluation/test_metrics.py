"""evaluation/metrics.py and dataset/latent_statistics.py: PSNR, SSIM, FID, sFID, Inception Score, precision, recall, KID against scikit-image, SciPy, NumPy and
torch-fidelity. test_fid_stats.py has the reference files."""

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric

from dataset.latent_statistics import frequency_order, latent_scale, low_frequency_share
from evaluation import metrics
from evaluation.metrics import (
    FEATURE_DIM,
    SPATIAL_DIM,
    FeatureStatistics,
    InceptionFeatures,
    InceptionScoreSums,
    fetch_inception_weights,
    fid,
    fid_infinity,
    find_inception_weights,
    inception_score,
    kid,
    precision_recall,
    psnr,
    ssim,
)
from tests.helpers import Explosive, photographs
from tools.bench.evaluation import write_random_inception
from util.dist import float32_precision

CPU = torch.device("cpu")


def crops(number: int, size: int, seed: int) -> Tensor:
    """uint8 (N, 3, S, S) from the real photographs."""
    rng, photos = np.random.default_rng(seed), photographs()
    images = []
    for i in range(number):
        top, left = rng.integers(427 - size), rng.integers(640 - size)
        images.append(np.array(photos[i % 2][top : top + size, left : left + size]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def damaged(images: Tensor, strength: float, seed: int = 0) -> Tensor:
    """Images with Gaussian noise of that many grey levels, uint8."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.float() + strength * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


# ------------------------------------------------------------------------------------------------------------- PSNR, SSIM


def test_psnr_is_scikit_images() -> None:
    a = crops(4, 48, seed=1)
    b = damaged(a, 12.0)
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(psnr(a, b).numpy(), expected, rtol=1e-6)


def test_psnr_of_equal_images_is_finite() -> None:
    a = crops(2, 16, seed=1)
    assert psnr(a, a).tolist() == [100.0, 100.0]
    one_pixel = a.clone()
    one_pixel[:, 0, 0, 0] ^= 1
    assert (psnr(a, one_pixel) < 100).all()


@pytest.mark.parametrize("height, width", [(64, 64), (11, 11), (40, 23)])
def test_ssim_is_scikit_images(height: int, width: int) -> None:
    a = crops(20, 64, seed=2)[..., :height, :width]  # more than one chunk
    b = torch.cat([damaged(a[:10], 5.0), damaged(a[10:], 40.0)])
    b[0], b[1] = 0, 255  # flat images have no variance at all
    expected = [
        structural_similarity(
            x, y, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    found = ssim(a, b)
    assert found.shape == (20,)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_ssim_of_equal_images_is_one_and_small_ones_are_refused() -> None:
    a = crops(2, 32, seed=3)
    np.testing.assert_allclose(ssim(a, a).numpy(), 1.0, atol=1e-7)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[..., :10], a[..., :10])


# ------------------------------------------------------------------------------------------------------------- FID


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


def test_statistics_of_one_image_are_refused() -> None:
    statistics = FeatureStatistics(4)
    statistics.update(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least two images"):
        _ = statistics.sigma


def test_statistics_merge_sums_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' statistics, here with the other one's sums handed in; test_evaluation.py does it with two real processes."""
    x = random_features(30, 6, seed=4, shift=100.0)
    mine, other = FeatureStatistics(6), FeatureStatistics(6)
    mine.update(torch.from_numpy(x[:20]))
    other.update(torch.from_numpy(x[20:]))
    mean = torch.from_numpy(x).double().mean(0)
    shift = other.mean - mean
    sums = iter([other.count, other.mean * other.count, other.scatter + other.count * torch.outer(shift, shift)])
    monkeypatch.setattr("evaluation.metrics.all_reduce_sum", lambda tensor: tensor + next(sums))
    merged = mine.merge()
    assert next(sums, None) is None and merged.count == 30
    np.testing.assert_allclose(merged.mu, x.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_a_process_without_images_merges_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, statistics = random_features(9, 4, seed=5), FeatureStatistics(4)
    statistics.update(torch.from_numpy(x))
    statistics.update(torch.zeros(0, 4))
    np.testing.assert_allclose(statistics.merge().sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError, match="at least two images"):
        _ = FeatureStatistics(4).merge().sigma


def stats_of(x: np.ndarray) -> dict[str, np.ndarray]:
    statistics = FeatureStatistics(x.shape[1])
    statistics.update(torch.from_numpy(x))
    return statistics.as_dict()


def test_fid_is_the_formula() -> None:
    a, b = stats_of(random_features(200, 16, seed=1)), stats_of(random_features(150, 16, seed=2, shift=0.5))
    difference = a["mu"] - b["mu"]
    expected = difference @ difference + np.trace(a["sigma"] + b["sigma"] - 2 * sqrtm(a["sigma"] @ b["sigma"]).real)
    assert fid(a, b) == pytest.approx(expected, rel=1e-8)
    assert fid(b, a) == pytest.approx(expected, rel=1e-8)


def test_fid_of_equal_and_shifted_statistics() -> None:
    x = random_features(200, 16, seed=1)
    assert abs(fid(stats_of(x), stats_of(x))) < 1e-6 * np.trace(stats_of(x)["sigma"])
    moved = stats_of(x) | {"mu": stats_of(x)["mu"] + 2.0}
    # equal covariances: the squared distance of the means
    assert fid(stats_of(x), moved) == pytest.approx(16 * 4.0, rel=1e-6)


def test_fid_of_two_gaussians_in_closed_form() -> None:
    """Diagonal covariances: the squared distance of the means, and the squared distance of the standard deviations."""
    rng = np.random.default_rng(3)
    (m1, m2), (s1, s2) = rng.standard_normal((2, 12)), rng.uniform(0.2, 3, (2, 12))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert fid({"mu": m1, "sigma": np.diag(s1**2)}, {"mu": m2, "sigma": np.diag(s2**2)}) == pytest.approx(
        expected, rel=1e-9
    )


def test_fid_infinity_removes_the_bias_of_few_images() -> None:
    """Samples of the reference's own Gaussian, whose FID is 0: of n images it is about 1/n times a number, which the extrapolation removes."""
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
    """In chunks of rows as in one matrix: the share of points within a ball to the third neighbour of a point of the other cloud."""
    monkeypatch.setattr("evaluation.metrics.PRC_CHUNK", 7)
    a, b = (torch.from_numpy(random_features(n, 6, seed=n, shift=0.3)).double() for n in (40, 55))

    def share_within(x: Tensor, y: Tensor) -> float:
        radius = torch.cdist(y, y).sort(1).values[:, 3]
        return (torch.cdist(x, y) <= radius).any(1).double().mean().item()

    assert precision_recall(a.float(), b.float()) == pytest.approx((share_within(a, b), share_within(b, a)))


def test_kid_of_equal_and_moved_clouds() -> None:
    """Equal clouds: about 0 (unbiased, so it may be below); moved ones: the mean of the polynomial kernel's MMD by the formula."""
    rng = np.random.default_rng(2)
    a, b = (torch.from_numpy(rng.standard_normal((200, 5)).astype(np.float32)) for _ in range(2))
    assert abs(kid(a, b)[0]) < 0.05 and kid(a, b + 1)[0] > 0.5
    x, y = a[:50].double().numpy(), b[:50].double().numpy() + 1

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / 5 + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (50 * 49) for k in (kernel(x, x), kernel(y, y))]
    assert kid(a[:50], b[:50] + 1)[0] == pytest.approx(sum(within) - 2 * kernel(x, y).mean(), rel=1e-4)


def test_inception_score_of_numbered_batches_is_torch_fidelitys() -> None:
    """From sums per split, batches in any order: equal to torch-fidelity's own function on all logits; merging with nothing changes nothing."""
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


# ------------------------------------------------------------------------------------------ precision of the arithmetic


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
        (lambda x: fid(stats_of(x.numpy()), stats_of(x.numpy())), metrics, "fid_statistics_to_metric"),
        (lambda x: precision_recall(x, x), metrics, "prc_features_to_metric"),
        (lambda x: kid(x, x), metrics, "kid_features_to_metric"),
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


# ------------------------------------------------------------------------------------------------------------- Inception


def offline(*args: object, **kwargs: object) -> None:
    raise URLError("no route")


def test_inception_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To torch-fidelity's own place, with the hash in its name checked; a file that is there is taken without a network."""
    asked = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url.rsplit("/", 1)[1], hash_prefix))
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = fetch_inception_weights(None), fetch_inception_weights(None)
    assert first == second == tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert asked == [(first.name, "6726825d")]


def test_inception_weights_absent_or_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="none.pth.*--inception_weights"):
        find_inception_weights(str(tmp_path / "none.pth"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        FileNotFoundError, match="download https://.*--inception_weights.*the download failed: .*no route"
    ):
        InceptionFeatures(None, CPU)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download that was ruled out")
    )
    with pytest.raises(FileNotFoundError, match="no Inception weights at"):
        fetch_inception_weights(None, download=False)
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.touch()
    assert find_inception_weights(None) == cached

    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    torch.save([Explosive(tmp_path / "ran")], tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("other.pth", "code.pth", "text.pth"):
        with pytest.raises(
            ValueError, match=rf"{name} \(--inception_weights\) does not hold torch-fidelity's Inception weights"
        ):
            InceptionFeatures(str(tmp_path / name), CPU)
    assert not (tmp_path / "ran").exists()


def test_truncated_inception_weights(tmp_path: Path, inception_weights: Path) -> None:
    cut = tmp_path / "cut.pth"
    with inception_weights.open("rb") as file:
        cut.write_bytes(file.read(5_000_000))
    with pytest.raises(ValueError, match=r"cut\.pth \(--inception_weights\)"):
        InceptionFeatures(str(cut), CPU)


def test_inception_features_are_torch_fidelitys(inception_weights: Path) -> None:
    """The extractor, fed in two batches, gives what torch-fidelity's own network gives at once; batches merge to numpy's statistics."""
    images = crops(5, 40, seed=7)
    ours = InceptionFeatures(str(inception_weights), CPU)
    parts = [ours(part) for part in images.split(3)]
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_weights))
    pool, logits = network(images)
    assert pool.std(0).mean() > 1e-3  # the images do differ under these weights
    torch.testing.assert_close(torch.cat([p["2048"] for p in parts]), pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([p["logits_unbiased"] for p in parts]), logits, rtol=1e-4, atol=1e-4)
    assert pool.shape == (5, FEATURE_DIM) and logits.shape == (5, 1008)
    maps = {}
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.update(mixed_6=output))
    network(images)
    spatial = torch.cat([p["spatial"] for p in parts])
    assert maps["mixed_6"].shape == (5, 768, 17, 17) and spatial.shape == (5, SPATIAL_DIM)
    # TensorFlow's layout, as ADM's evaluator flattens it
    expected = maps["mixed_6"].permute(0, 2, 3, 1)[..., :7].flatten(1)
    torch.testing.assert_close(spatial, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).mean() > 1e-3


@pytest.mark.slow
def test_scores_are_torch_fidelitys(tmp_path: Path, inception_weights: Path) -> None:
    """All scores of a small real set equal torch_fidelity.calculate_metrics on the same PNG files."""
    original = crops(12, 40, seed=8)
    changed = damaged(original, 30.0)
    for name, images in (("original", original), ("changed", changed)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:02d}.png")
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "changed"),
        input2=str(tmp_path / "original"),
        cuda=False,
        batch_size=12,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        kid_subset_size=12,
        verbose=False,
        feature_extractor_weights_path=str(inception_weights),
        save_cpu_ram=True,
        cache=False,
    )
    extractor = InceptionFeatures(str(inception_weights), CPU)
    real, made = extractor(original), extractor(changed)
    mean, std = inception_score(made["logits_unbiased"])
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-4, abs=1e-6)
    assert fid(stats_of(made["2048"].numpy()), stats_of(real["2048"].numpy())) == pytest.approx(
        expected["frechet_inception_distance"], rel=1e-3
    )
    assert kid(made["2048"], real["2048"])[0] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert precision_recall(made["2048"], real["2048"]) == (expected["precision"], expected["recall"])


# ------------------------------------------------------------------------------------------------------------- latents


def test_latent_scale_is_one_over_std() -> None:
    latents = 4.3 * torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 1.0
    assert latent_scale(latents) == pytest.approx(1 / latents.numpy().astype(np.float64).std(ddof=1), rel=1e-12)


def test_frequency_order_finds_slow_channels() -> None:
    """A gradient, a chequerboard and white noise: the order is gradient, noise, chequerboard, whatever mean and size they have."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    gradient, board = (x + y) / 8, (-1) ** (x + y)
    noise = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(0))
    wave = torch.linspace(-1, 1, 20)[:, None, None]
    latents = torch.stack([board * wave * 100, noise + 50, gradient * wave * 0.01], dim=1)  # (20, 3, 16, 16)
    share = low_frequency_share(latents)
    assert frequency_order(latents) == [2, 1, 0]
    assert share[2] > 0.95 and share[0] < 1e-6
    assert 0.1 < share[1] < 0.4  # white noise: the share of frequencies within the radius, about 0.2
    assert frequency_order(latents[:, [2, 1, 0]]) == [0, 1, 2]
